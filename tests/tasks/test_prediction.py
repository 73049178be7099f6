"""Outputs of every kind of task for clips without labels, against their definition."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from blueberry_video.config import compose
from blueberry_video.tasks.clip_format import ClipFormat
from blueberry_video.tasks.prediction import features, predict

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def built(name: str):
    """Data and task of an experiment with random weights, and two clips of random pixels."""
    config = compose(EXPERIMENTS / name / "config.yaml")
    data, model = instantiate(config.data), instantiate(config.model)
    optimization = instantiate(config.task.optimization)(
        optimizer=instantiate(config.optimizer), schedule=instantiate(config.schedule)
    )
    task = instantiate(config.task, _partial_=True)(model=model, optimization=optimization).eval()
    clips = ClipFormat.of(task, data)
    size = (2, 3, clips.num_frames, clips.height, clips.width)
    return task, clips, {"video": torch.rand(size, generator=torch.Generator().manual_seed(0)), "id": ["a", "b"]}


@pytest.mark.parametrize("name", ["probe", "spool_stream"])
def test_classifiers_return_probabilities(name):
    task, _, batch = built(name)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    logits = task.model((batch["video"] - mean) / std)
    outputs = predict(task, batch)
    assert outputs.keys() == task.model.num_classes.keys()
    for label, probabilities in outputs.items():
        torch.testing.assert_close(probabilities, logits[label].softmax(-1))
        assert probabilities.shape[-1] == task.model.num_classes[label]


def test_masked_autoencoder_returns_features_and_the_masked_patches():
    task, _, batch = built("videomae")
    outputs = predict(task, batch)
    torch.testing.assert_close(outputs["features"], task.model.encoder(task.normalize(batch["video"])))
    same = (outputs["reconstruction"] == batch["video"]).float().mean()
    grid = task.model.encoder.grid(batch["video"].shape)
    keep = task.masking(1, grid, torch.Generator()).keep
    assert float(same) == pytest.approx(keep.shape[1] / task.model.encoder.num_tokens, abs=1e-3)  # visible patches
    again = predict(task, {**batch, "video": batch["video"].flip(0), "id": ["b", "a"]})
    torch.testing.assert_close(again["reconstruction"], outputs["reconstruction"].flip(0))  # masks depend on ids


def test_latent_prediction_returns_features_of_the_target_encoder():
    task, _, batch = built("vjepa2")
    for parameter in task.model.target_encoder.parameters():
        parameter.data += 0.1
    expected = task.model.target_encoder(task.normalize(batch["video"]))
    torch.testing.assert_close(predict(task, batch)["features"], expected)
    assert (expected - task.model.encoder(task.normalize(batch["video"]))).abs().max() > 0.1


@pytest.mark.parametrize(("name", "stored"), [("video_vae", "latents"), ("hydra_tokenizer", "tokens")])
def test_autoencoders_return_codes_and_their_reconstruction(name, stored):
    task, _, batch = built(name)
    outputs = predict(task, batch)
    assert outputs.keys() == {stored, "reconstruction"}
    assert outputs["reconstruction"].shape == batch["video"].shape
    assert 0 <= outputs["reconstruction"].min() <= outputs["reconstruction"].max() <= 1
    expected = task.media({"video": batch["video"]})["reconstruction"]
    width = batch["video"].shape[-1] + 1
    made = outputs["reconstruction"][0].transpose(0, 1).mul(255).round().byte()
    assert (expected[:, :, : width - 1, width:-1].int() - made.int()).abs().max() <= 1  # rounding
    with pytest.raises(ValueError, match="no encoder"):
        features(task, batch)


@pytest.mark.parametrize(("name", "stored"), [("cogvideox", "latents"), ("hydra_memory", "tokens")])
def test_generators_return_the_codes_that_they_generate(name, stored):
    task, _, batch = built(name)
    outputs = predict(task, batch)
    assert outputs.keys() == {stored, "reconstruction"}
    assert outputs["reconstruction"].shape == batch["video"].shape


@pytest.mark.parametrize("name", ["depth_anything", "video_depth"])
def test_depth_returns_maps_and_features_of_every_frame(name):
    task, clips, batch = built(name)
    outputs = predict(task, batch)
    assert outputs["disparity"].shape == (2, clips.num_frames, clips.height, clips.width)
    frame = task.model.pretrained(task.normalize(batch["video"][:, :, 1:2]))
    found = features(task, batch).unflatten(1, (clips.num_frames, -1))
    torch.testing.assert_close(found[:, 1], frame)


def test_a_scene_has_no_output_for_a_clip():
    task, _, batch = built("gaussians4d")
    with pytest.raises(ValueError, match=r"Splatting.*render"):
        predict(task, batch)


def test_format_of_generated_clips():
    _, clips, _ = built("hydra_memory")
    assert (clips.num_frames, clips.height, clips.width, clips.fps) == (25, 32, 32, 8.0)
    assert clips.action_names == ("stay", "left", "right")
    assert clips.mean is None  # pixels in [-1, 1]
    assert clips.sampling == {"sampler": "uniform", "num_frames": 25, "pad": True}
    assert clips.resize["image_size"] == [32, 32]
    assert built("probe")[1].mean == [0.485, 0.456, 0.406]
