"""Classification task: metrics and controls against all clips in one batch."""

import re
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from blueberry_video.augmentation import Mixing
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.evaluation.metrics import shuffle_frames
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import warmup_cosine
from blueberry_video.tasks.classification import Classification
from blueberry_video.tasks.settings import Optimization


class BrightestFrame(VideoClassifier):
    """Motion logits that depend on frame order, shape logits that do not; one trainable weight."""

    def __init__(self):
        encoder = VisionTransformer(16, 4, 8, 2, embed_dim=4, depth=0, num_heads=1)
        super().__init__(encoder, {"motion": 8, "shape": 3})
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        frames = video.mean(dim=(1, 3, 4))  # (B, T)
        order = torch.cat([frames, -frames.flip(1)], dim=1)  # (B, 8)
        return {"motion": order * self.weight, "shape": frames.sort(dim=1).values[:, :3]}


def task(model: nn.Module | None = None, init_from: Path | None = None, **changes) -> Classification:
    torch.manual_seed(0)
    if model is None:
        encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2, final_norm=False)
        model = VideoClassifier(encoder, {"motion": 8, "shape": 3})
    optimization = Optimization(partial(torch.optim.AdamW, lr=1e-3), warmup_cosine, init_from=init_from)
    return Classification(model, optimization, **changes)


def data(val: int = 11) -> DataModule:
    options = {"num_frames": 4, "image_size": 16}
    return DataModule(Sprites("train", 8, **options), Sprites("val", val, **options), batch_size=4)


def test_training_logs_documented_metrics(trainer):
    fit = trainer()
    fit.fit(task(), datamodule=data())
    motion = ("motion", "motion_trivial", "motion_shuffled")
    motion += ("motion_within_pairs", "motion_within_pairs_shuffled", "motion_within_pairs_trivial")
    expected = {f"val/{name}" for name in ("loss", "shape", "shape_trivial", *motion)}
    expected |= {f"val/{name}_{kind}" for name in ("motion", "shape") for kind in ("mean_class", "calibration_error")}
    expected |= {"val/motion_top5", "train/loss", "train/lr", "train/motion", "train/shape"}
    logged = fit.logged_metrics.keys() | fit.callback_metrics.keys()
    assert logged == expected  # no shuffled shape, which has no reversal pairs


def test_validation_metrics_equal_those_of_all_clips_in_one_batch(trainer):
    """Batches of 4, 4 and 3 clips with different numbers of clips in a pair do not bias the means."""
    module, clips = task(BrightestFrame()), data()
    fit = trainer()
    fit.validate(module, clips, verbose=False)
    logged = {name.removeprefix("val/"): value.item() for name, value in fit.callback_metrics.items()}

    samples = [clips.val[i] for i in range(11)]
    video = torch.stack([clip["video"] for clip in samples]).transpose(1, 2).float() / 255
    labels = {name: torch.tensor([clip["labels"][name] for clip in samples]) for name in ("motion", "shape")}
    with torch.no_grad():
        logits = module.model(module.normalize(video))
    losses = [nn.functional.cross_entropy(logits[name], labels[name]) for name in ("motion", "shape")]
    assert logged["loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-4)
    for name, classes in (("motion", 8), ("shape", 3)):
        right = sum(int(logits[name][i].argmax()) == labels[name][i] for i in range(11))
        assert logged[name] == pytest.approx(right.item() / 11)
        most = max((labels[name] == c).sum().item() for c in range(classes))
        assert logged[f"{name}_trivial"] == pytest.approx(most / 11)
    within = [logits["motion"][i, label] > logits["motion"][i, label ^ 1] for i, label in enumerate(labels["motion"])]
    assert logged["motion_within_pairs"] == pytest.approx(sum(within).item() / 11)
    with torch.no_grad():
        mixed = module.model(module.normalize(shuffle_frames(video, [zlib.crc32(s["id"].encode()) for s in samples])))
    right = sum(int(mixed["motion"][i].argmax()) == labels["motion"][i] for i in range(11))
    assert logged["motion_shuffled"] == pytest.approx(right.item() / 11)
    mixed_within = [
        mixed["motion"][i, label] > mixed["motion"][i, label ^ 1] for i, label in enumerate(labels["motion"])
    ]
    assert mixed_within != within
    assert logged["motion_within_pairs_shuffled"] == pytest.approx(sum(mixed_within).item() / 11)


def test_counts_are_reset_for_every_validation(trainer):
    module, fit = task(), trainer()
    fit.validate(module, data(val=11), verbose=False)
    share = fit.validate(module, data(val=5), verbose=False)[0]["val/motion_trivial"]
    labels = [data(val=5).val[i]["labels"]["motion"] for i in range(5)]
    assert share == pytest.approx(max(labels.count(motion) for motion in labels) / 5)


def test_shuffling_does_not_change_the_global_generator(trainer):
    module = task()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trainer().validate(module, data(4), verbose=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_label_smoothing_is_applied_in_training_only(trainer):
    losses = {}
    for smoothing in (0.0, 0.5):
        module = task(BrightestFrame(), label_smoothing=smoothing)
        module.trainer = fit = trainer()
        fit.datamodule = data()
        clip = {"video": torch.rand(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
        clip["labels"] = {"motion": torch.arange(4), "shape": torch.tensor([0, 1, 2, 0])}
        losses[smoothing] = module.shared_step(clip, "train")["loss"].item()
        logits = module.model(module.normalize(clip["video"]))
        expected = []
        for name, label in clip["labels"].items():
            log_probability = logits[name].log_softmax(dim=1)
            own = log_probability[torch.arange(4), label]
            expected.append(-((1 - smoothing) * own + smoothing * log_probability.mean(dim=1)).mean())
        assert losses[smoothing] == pytest.approx((sum(expected) / 2).item(), rel=1e-5)
    assert losses[0.0] != losses[0.5]
    fit = trainer()
    values = [
        fit.validate(task(BrightestFrame(), label_smoothing=s), data(4), verbose=False)[0]["val/loss"]
        for s in (0.0, 0.5)
    ]
    assert values[0] == values[1]


def test_mixed_clips_have_mixed_labels_and_no_accuracy(monkeypatch):
    """Half of each clip and half of the loss belong to the paired clip."""
    halves = Mixing()
    monkeypatch.setattr(halves, "forward", lambda video: (torch.lerp(video.flip(0), video, 0.5), 0.5))
    module = task(BrightestFrame(), mixing=halves)
    clip = {"video": torch.rand(2, 3, 4, 16, 16)}
    clip["labels"] = {"motion": torch.tensor([1, 6]), "shape": torch.tensor([0, 2])}
    values = module.shared_step(clip, "train")
    assert values.keys() == {"loss"}
    logits = module.model(module.normalize((clip["video"] + clip["video"].flip(0)) / 2))
    losses = [nn.functional.cross_entropy(logits[n], t) for n in logits for t in (clip["labels"][n],)]
    losses += [nn.functional.cross_entropy(logits[n], t.flip(0)) for n in logits for t in (clip["labels"][n],)]
    assert values["loss"].item() == pytest.approx(sum(losses).item() / 4, rel=1e-5)


def test_unmixed_batches_have_an_accuracy_and_validation_is_not_mixed(trainer):
    fit = trainer()
    fit.fit(task(mixing=Mixing(prob=0.0)), datamodule=data())
    assert {"train/motion", "train/shape"} <= fit.logged_metrics.keys()
    fit = trainer()
    fit.fit(task(mixing=Mixing()), datamodule=data())
    assert not {"train/motion", "train/shape"} & fit.logged_metrics.keys()
    plain, mixing = (
        trainer().validate(task(BrightestFrame(), mixing=m), data(), verbose=False) for m in (None, Mixing())
    )
    assert plain == mixing


class Views(Dataset):
    """Two views of each of three videos; single views and their mean disagree on the motion."""

    classes = {"motion": tuple("abcdefgh"), "shape": ("x", "y", "z")}  # noqa: RUF012

    def __len__(self):
        return 6

    def __getitem__(self, index):
        video, view = divmod(index, 2)
        brightness = torch.tensor(
            [[150, 250, 150, 150], [150, 150, 190, 150]][view] if video < 2 else [150, 150, 150, 250]
        )
        frames = brightness.byte().view(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
        return {"video": frames, "id": f"clip{video}.mp4#{view}.0", "labels": {"motion": 1, "shape": 0}}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_views_of_a_video_are_averaged(stage, trainer):
    views = Views()
    clips = DataModule(views, views, batch_size=4, test=views)
    fit = trainer()
    values = (fit.validate if stage == "val" else fit.test)(task(BrightestFrame()), clips, verbose=False)[0]
    assert values[f"{stage}/motion"] == pytest.approx(2 / 6)  # the second frame is the brightest in two of six clips
    assert values[f"{stage}/motion_views"] == pytest.approx(2 / 3)  # the brighter view dominates the mean
    assert not [name for name in trainer().validate(task(), data(), verbose=False)[0] if "views" in name]


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range_raises(smoothing):
    with pytest.raises(ValueError, match=rf"task\.label_smoothing={smoothing}"):
        task(label_smoothing=smoothing)


def test_init_from_loads_heads_that_fit(tmp_path, capsys):
    source, module = task(), task(init_from=tmp_path / "own.ckpt")
    source.model.head.linear["motion"].bias.data += 1
    torch.save({"state_dict": source.state_dict()}, tmp_path / "own.ckpt")
    module.setup("fit")
    assert torch.equal(module.model.head.linear["motion"].bias, source.model.head.linear["motion"].bias)
    assert re.search(r"'motion'.*\b8\b.*'shape'.*\b3\b", capsys.readouterr().out)


def test_media_shows_the_clips():
    video = torch.rand(3, 3, 4, 16, 16)
    picture = task(num_pictures=2).media({"video": video})["clips"]
    assert picture.shape == (4, 3, 2 * 17, 17)  # with a white line at the bottom and right of each
    assert torch.equal(picture[:, :, 17:33, :16], (video[1] * 255).round().byte().transpose(0, 1))


def test_a_second_probe_is_trained_on_the_untrained_encoder(tmp_path, trainer):
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2)
    model = VideoClassifier(encoder, {"motion": 8}, pooling="attentive", freeze_encoder=True)
    module = task(model, init_from=tmp_path / "weights.pt")
    untrained = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.save({name: value + 0.1 for name, value in untrained.items()}, tmp_path / "weights.pt")
    heads = [next(iter(part.head.linear["motion"].parameters())) for part in (module.model, module.untrained)]
    before = [head.clone() for head in heads]
    fit = trainer()
    fit.fit(module, datamodule=data())
    for name, value in untrained.items():
        assert torch.equal(module.untrained.encoder.state_dict()[name], value), name
        assert torch.equal(module.model.encoder.state_dict()[name], value + 0.1), name
    assert all(not torch.equal(head, start) for head, start in zip(heads, before, strict=True))
    assert {"val/motion", "val/motion_random_init", "val/motion_shuffled"} <= fit.callback_metrics.keys()


def test_the_untrained_probe_does_not_change_the_loss():
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2)
    module = task(VideoClassifier(encoder, {"motion": 8}, freeze_encoder=True, head_init_scale=1.0))
    module.model.head.linear["motion"].bias.data += torch.arange(8)
    batch = {"video": torch.rand(2, 3, 4, 16, 16), "labels": {"motion": torch.tensor([1, 5])}}
    loss = module.shared_step(batch, "train")["loss"]
    logits = module.model(module.normalize(batch["video"]))["motion"]
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"]["motion"])
    torch.testing.assert_close(loss, expected)


def test_a_model_of_the_wrong_class_raises():
    with pytest.raises(ValueError, match=r"(?s)(?=.*\bClassification\b)(?=.*\bVideoClassifier\b)(?=.*\bLinear\b)"):
        task(nn.Linear(2, 2))
