"""Anticipation task: observed frames, logged metrics, and values against the formulas."""

from functools import partial

import pytest
import torch
from torch import Tensor

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.models.jepa.anticipator import Anticipator
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import constant
from blueberry_video.tasks.anticipation import Anticipation, focal_loss
from blueberry_video.tasks.settings import Optimization

CLASSES = {"motion": 8, "shape": 3}
PREDICTOR = {"predictor_dim": 12, "predictor_depth": 1, "predictor_num_heads": 2, "num_mask_tokens": 2}


def encoder(positions: str = "rope_3d") -> VisionTransformer:
    sizes = {"image_size": 16, "num_frames": 8, "patch_size": 8, "tubelet_size": 2}
    return VisionTransformer(**sizes, embed_dim=24, depth=1, num_heads=2, positions=positions, qkv_bias="qkv")


def task(freeze: bool = True, positions: str = "rope_3d", **changes) -> Anticipation:
    torch.manual_seed(0)
    model = Anticipator(encoder(positions), CLASSES, **PREDICTOR, num_heads=2, pool_depth=1, freeze=freeze)
    options = {"optimization": Optimization(partial(torch.optim.AdamW, lr=1e-2), constant), "recall_at": 2}
    return Anticipation(model, **{**options, "seen": 4, "gap": (1, 4), "val_gap": 2, **changes})


def data(val: int = 11) -> DataModule:
    options = {"num_frames": 8, "image_size": 16}
    return DataModule(Sprites("train", 8, **options), Sprites("val", val, **options), batch_size=4)


def test_focal_loss_equals_its_formula():
    logits, labels = torch.randn(3, 4, dtype=torch.float64), torch.tensor([2, 0, 3])
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        for c, logit in enumerate(row):
            p = 1 / (1 + (-logit).exp())
            right, weight = (p, 0.25) if c == label else (1 - p, 0.75)
            total -= weight * (1 - right) ** 2 * right.log()
    torch.testing.assert_close(focal_loss(logits, labels).item(), total.item() / 3, atol=1e-6, rtol=1e-6)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(4)[labels].double(), reduction="sum")
    assert focal_loss(logits, labels, alpha=0.5, gamma=0).item() == pytest.approx(plain.item() / 2 / 3, rel=1e-5)
    assert focal_loss(1000 * logits, labels).isfinite()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_of_confident_logits_has_finite_gradients(gamma):
    for logit in (1000.0, -1000.0, 40.0):
        logits = torch.tensor([[logit, -logit]], requires_grad=True)
        focal_loss(logits, torch.tensor([0]), gamma=gamma).backward()
        assert logits.grad.isfinite().all()


def test_the_model_receives_the_frames_before_the_gap_and_the_gap_in_tubelets():
    module, inputs_of = task(), []
    module.model.register_forward_hook(lambda model, given, out: inputs_of.append(given))
    video = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(3, 3, 8, 16, 16)
    seen = module.before(video, torch.tensor([0, 1, 4]))
    assert [row[0, :, 0, 0].tolist() for row in seen] == [[4, 5, 6, 7], [3, 4, 5, 6], [0, 1, 2, 3]]
    module._gaps = lambda *of: torch.tensor([0, 3, 4])
    labels = {name: torch.zeros(3, dtype=torch.long) for name in CLASSES}
    module.shared_step({"video": video, "labels": labels}, "train")
    inputs, skip = inputs_of[0]
    assert skip.tolist() == [0, 1, 2]
    torch.testing.assert_close(inputs, module.normalize(module.before(video, torch.tensor([0, 3, 4]))))


def test_gaps_are_random_per_clip_in_training_and_fixed_in_validation():
    module = task()
    drawn = module._gaps(1000, "train")
    assert sorted(drawn.unique().tolist()) == [1, 2, 3, 4]
    assert module._gaps(5, "val").tolist() == module._gaps(5, "test").tolist() == [2] * 5


@pytest.mark.parametrize("freeze", [True, False])
def test_training_logs_documented_metrics_and_updates_trainable_weights(freeze, trainer):
    module, fit = task(freeze), trainer()
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    fit.fit(module, datamodule=data())
    names = {"loss", "motion_shuffled"}
    for label in CLASSES:
        names |= {label, f"{label}_trivial", f"{label}_recall", f"{label}_recall_trivial"}
        names |= {f"{label}_random_init", f"{label}_recall_random_init"} if freeze else set()
    train = {"loss", "lr", *CLASSES, *({f"{label}_random_init" for label in CLASSES} if freeze else ())}
    logged = fit.logged_metrics.keys() | fit.callback_metrics.keys()
    assert logged == {f"val/{name}" for name in names} | {f"train/{name}" for name in train}
    for name, parameter in module.model.named_parameters():
        used = name != "predictor.mask_tokens"  # only one of them is used
        assert torch.equal(parameter, before[name]) == (freeze and not name.startswith("head.")) or not used, name


class LastFrameLogits(Anticipator):
    """Logits read from the pixels of the last observed frame, independent of the weights."""

    def __init__(self):
        super().__init__(encoder(), CLASSES, **PREDICTOR, num_heads=2, pool_depth=1, freeze=False)

    def forward(self, video: Tensor, skip: Tensor) -> dict[str, Tensor]:
        colours = video[:, :, -1].flatten(1)
        return {name: colours[:, :: 768 // count][:, :count] for name, count in CLASSES.items()}


def test_validation_metrics_equal_those_of_all_clips_in_one_batch(trainer):
    module, clips = task(), data()
    module.model, module.untrained = LastFrameLogits(), None
    fit = trainer()
    fit.validate(module, clips, verbose=False)
    samples = [clips.val[i] for i in range(11)]
    video = torch.stack([clip["video"] for clip in samples]).transpose(1, 2).float() / 255
    logits = module.model(module.normalize(video[:, :, 2:6]), 1)
    for name, classes in CLASSES.items():
        labels = torch.tensor([clip["labels"][name] for clip in samples])
        ranked, recalls = logits[name].argsort(dim=1, descending=True), []
        for c in range(classes):
            rows = ranked[labels == c][:, :2]
            if len(rows):
                recalls.append((rows == c).any(1).float().mean().item())
        logged = {key: value.item() for key, value in fit.callback_metrics.items()}
        assert logged[f"val/{name}"] == pytest.approx((ranked[:, 0] == labels).float().mean().item())
        assert logged[f"val/{name}_recall"] == pytest.approx(sum(recalls) / len(recalls))
        assert logged[f"val/{name}_recall_trivial"] == pytest.approx(2 / len(recalls))
        assert logged[f"val/{name}_trivial"] == pytest.approx(labels.bincount().max().item() / 11)
    losses = [focal_loss(logits[name], torch.tensor([clip["labels"][name] for clip in samples])) for name in CLASSES]
    assert logged["val/loss"] == pytest.approx(sum(losses).item(), rel=1e-5)


def test_weights_load_from_the_target_encoder_or_the_encoder_of_a_run(tmp_path):
    trained = JEPA(encoder(), **PREDICTOR)
    trained.encoder.norm.weight.data.fill_(2.0)
    torch.save({"state_dict": {f"model.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "run.ckpt")
    for which, scale in (("target_encoder", 1.0), ("encoder", 2.0)):
        module = task(weights_of=which)
        assert repr(which) in module.load_weights(tmp_path / "run.ckpt")
        assert module.model.encoder.norm.weight.unique().tolist() == [scale]
        assert module.untrained.encoder.norm.weight.unique().tolist() == [1.0]


def test_media_shows_the_clip_and_the_observed_frames():
    batch = {"video": torch.rand(3, 3, 8, 16, 16)}
    assert task().media(batch)["clips"].shape == (8, 3, 3 * 17, 2 * 17)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"seen": 3}, r"task\.seen=3\b"),
        ({"gap": (4, 1)}, r"task\.gap=\[4, 1\]"),
        ({"val_gap": -1}, r"task\.val_gap=-1\b"),
        ({"gap": (1, 2.5)}, r"task\.gap=\[1, 2\.5\]"),
        ({"val_gap": 2.0}, r"task\.val_gap=2\.0\b"),
        ({"recall_at": 0}, r"task\.recall_at=0\b"),
        ({"gap": (0, 5)}, r"(?s)(?=.*task\.seen=4\b)(?=.*\b5\b)(?=.*model\.encoder\.num_frames=10\b)"),
    ],
)
def test_arguments_out_of_range_raise(changes, pattern):
    with pytest.raises(ValueError, match=pattern):
        task(**changes)


@pytest.mark.parametrize("positions", ["sinusoid", "sincos_3d"])
def test_absolute_positions_raise(positions):
    with pytest.raises(ValueError, match=rf"(?s)model\.encoder\.positions={positions}\b.*positions=rope_3d"):
        task(positions=positions)
