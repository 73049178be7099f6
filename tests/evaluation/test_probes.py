"""Probe and FewLabels callbacks: logged metrics and comparison with the untrained network."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.mixture import Mixture
from blueberry_video.evaluation.probes import FewLabels, Probe
from blueberry_video.masking import RandomMasking
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import constant
from blueberry_video.parallel.strategy import FullyShardedStrategy
from blueberry_video.tasks.masked_pixels import MaskedPixels
from blueberry_video.tasks.settings import Optimization

NAMES = {"motion", "motion_within_pairs"}
CONTROLS = {f"{name}{suffix}" for name in NAMES for suffix in ("_shuffled", "_trivial")} | {"motion_gain"}


def fake_task(encoder):
    return SimpleNamespace(
        model=SimpleNamespace(encoder=encoder), normalize=lambda video: (video - 0.4) / 0.2, device=torch.device("cpu")
    )


def fake_data(ramps):
    return SimpleNamespace(train=ramps, val=ramps, classes=ramps.classes, reversal_pairs=ramps.reversal_pairs)


def test_probe_logs_every_label_with_its_controls(encoder, ramps):
    probe = Probe(["motion", "level"], train_clips=64, val_clips=32, steps=40, lr=1e-2)
    probe.untrained = copy.deepcopy(encoder)
    values = probe.measure(fake_task(encoder), fake_data(ramps))
    assert values.keys() == NAMES | CONTROLS | {f"{name}_random_init" for name in NAMES} | {
        "level",
        "level_random_init",
        "level_gain",
        "level_trivial",
    }
    assert values["level"] > 0.9
    assert values["level_trivial"] == values["motion_within_pairs_trivial"] == 0.5
    assert values["motion_gain"] == 0  # same encoder, clips and random numbers


def test_few_labels_measures_the_gain_over_an_untrained_encoder(encoder, ramps):
    few = FewLabels(["motion"], num_labelled=64, val_clips=32, steps=60, lrs=[3e-3])
    few.untrained = copy.deepcopy(encoder)
    for parameter in few.untrained.parameters():  # an encoder without information
        parameter.data.zero_()
    few.untrained.requires_grad_(False)
    values = few.measure(fake_task(encoder), fake_data(ramps))
    assert values.keys() == NAMES | CONTROLS | {f"{name}_scratch" for name in NAMES}
    assert values["motion"] > 0.9
    assert values["motion_scratch"] <= 0.6
    assert values["motion_gain"] == pytest.approx(values["motion"] - values["motion_scratch"])
    assert values["motion_within_pairs_shuffled"] < 0.8


def test_the_reference_is_untrained_also_with_init_from(encoder, ramps, tmp_path, trainer):
    trained = {name: value + 1 for name, value in encoder.state_dict().items()}
    torch.save(trained, tmp_path / "weights.pt")
    model = MaskedAutoencoder(copy.deepcopy(encoder), 12, 1, 1)
    optimization = Optimization(partial(torch.optim.SGD, lr=0.0), constant, init_from=tmp_path / "weights.pt")
    task = MaskedPixels(model, optimization, RandomMasking(0.5), num_pictures=1)
    probe = Probe(["level"], "linear", name="linear", train_clips=32, val_clips=32, steps=5)
    run = trainer(probe, max_steps=1)
    run.fit(task, datamodule=DataModule(ramps, ramps, batch_size=16))
    for name, value in encoder.state_dict().items():
        assert torch.equal(probe.untrained.state_dict()[name], value), name
        assert torch.equal(task.model.encoder.state_dict()[name], trained[name]), name
    assert {"linear/level", "linear/level_random_init"} <= run.callback_metrics.keys()


def test_a_sharded_model_raises(encoder):
    with pytest.raises(ValueError, match=r"callbacks\.few_labels\b.*FullyShardedStrategy"):
        FewLabels(["motion"]).setup(SimpleNamespace(strategy=FullyShardedStrategy()), None, "fit")


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (
            partial(Probe, ["level"], train_clips=999, val_clips=8),
            r"callbacks\.probe\.train_clips=999\b.*\b96\b.*data\.train",
        ),
        (
            partial(Probe, ["level"], train_clips=8, val_clips=999),
            r"callbacks\.probe\.val_clips=999\b.*\b96\b.*data\.val",
        ),
        (partial(FewLabels, ["level"], num_labelled=999), r"callbacks\.few_labels\.num_labelled=999\b.*\b96\b"),
        (partial(FewLabels, ["level"], num_labelled=0), r"callbacks\.few_labels\.num_labelled=0\b"),
        (partial(Probe, ["colour"], train_clips=8, val_clips=8), r"callbacks\.probe\.labels=\['colour'\].*level"),
        (partial(Probe, ["level"], train_clips=8, val_clips=8, part="clip"), r"callbacks\.probe\.part='clip'"),
    ],
)
def test_impossible_evaluations_raise_before_the_first_step(encoder, ramps, trainer, callback, expected):
    model = MaskedAutoencoder(copy.deepcopy(encoder), 12, 1, 1)
    task = MaskedPixels(model, Optimization(partial(torch.optim.SGD, lr=0.0), constant), RandomMasking(0.5))
    run = trainer(callback(), max_steps=1)
    with pytest.raises(ValueError, match=expected):
        run.fit(task, datamodule=DataModule(ramps, ramps, batch_size=16))
    assert run.global_step == 0


def test_encoders_of_different_sizes_are_probed(ramps):
    wide = VisionTransformer(
        image_size=8, num_frames=4, patch_size=8, tubelet_size=4, embed_dim=10, depth=1, num_heads=5
    )
    probe = Probe(["level"], train_clips=32, val_clips=32, steps=2)
    probe.untrained = copy.deepcopy(wide)
    assert "level" in probe.measure(fake_task(wide), fake_data(ramps))


class Frames(Dataset):
    """Image dataset of the second frame of each ramp, with the labels and reversal pairs of the clips."""

    def __init__(self, clips):
        self.clips, self.classes, self.reversal_pairs = clips, clips.classes, clips.reversal_pairs

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        clip = self.clips[index]
        return {**clip, "video": clip["video"][1:2]}


@pytest.fixture
def mixed(ramps):
    both = Mixture({"images": Frames(ramps), "clips": ramps})
    return SimpleNamespace(train=both, val=both, classes=both.classes, reversal_pairs=both.reversal_pairs)


@pytest.fixture
def omni():
    torch.manual_seed(0)
    return VisionTransformer(8, 4, 4, 2, embed_dim=24, depth=1, num_heads=2, images=True)


@pytest.mark.parametrize("evaluation", ["probe", "few_labels"])
def test_images_and_clips_of_a_mixture_are_evaluated_separately(omni, mixed, evaluation):
    def measure(part: str) -> dict[str, float]:
        sizes = {"val_clips": 32, "steps": 40, "part": part}
        if evaluation == "probe":
            callback = Probe(["motion", "level"], train_clips=64, lr=1e-2, **sizes)
        else:
            callback = FewLabels(["motion", "level"], num_labelled=64, lrs=[3e-3], **sizes)
        callback.untrained = copy.deepcopy(omni)
        return callback.measure(fake_task(omni), mixed)

    reference = "random_init" if evaluation == "probe" else "scratch"
    plain = {"", f"_{reference}", "_gain", "_trivial"}
    images, clips = measure("images"), measure("clips")
    assert images.keys() == {f"{label}{suffix}" for label in ("motion", "level") for suffix in plain}
    assert images["level"] > 0.9
    assert clips.keys() == images.keys() | CONTROLS | {f"motion_within_pairs{s}" for s in ("", f"_{reference}")}


@pytest.mark.parametrize(("train", "val"), [("mixed", "mixed"), ("mixed", "ramps"), ("ramps", "ramps")])
def test_an_unknown_part_of_the_data_raises(omni, mixed, ramps, train, val):
    sets = {"mixed": mixed.train, "ramps": ramps}
    data = SimpleNamespace(train=sets[train], val=sets[val], classes=ramps.classes, reversal_pairs={})
    part = "sounds" if train == val == "mixed" else "images"
    probe = Probe(["level"], train_clips=8, val_clips=8, steps=1, part=part)
    probe.untrained = copy.deepcopy(omni)
    split = "train" if train == val else "val"
    with pytest.raises(ValueError, match=rf"callbacks\.probe\.part='{part}'.*data\.{split}\b"):
        probe.measure(fake_task(omni), data)
