"""Distillation: loss against its formula, and a frozen teacher."""

from functools import partial

import pytest
import torch

from blueberry_video.augmentation import Mixing, RandomErasing
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import warmup_cosine
from blueberry_video.tasks.distillation import Distillation, distillation_loss
from blueberry_video.tasks.settings import ClipInput, Optimization


def classifier(width: int, seed: int, **changes) -> VideoClassifier:
    torch.manual_seed(seed)
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=width, depth=1, num_heads=2, final_norm=False)
    options = {"num_classes": {"motion": 8, "shape": 3}, "head_init_scale": 50.0}
    return VideoClassifier(encoder, **{**options, **changes})


@pytest.fixture
def weights(tmp_path):
    """File of a trained teacher, with weights that differ from the teacher's initial ones."""
    torch.save({"model": {f"model.{n}": v for n, v in classifier(24, 7).state_dict().items()}}, tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def task(teacher_from, **changes) -> Distillation:
    options = {"optimization": Optimization(partial(torch.optim.AdamW, lr=1e-2), warmup_cosine)}
    options |= {"model": classifier(16, 0), "teacher": classifier(24, 1), "teacher_from": teacher_from}
    return Distillation(**{**options, **changes})


def data() -> DataModule:
    options = {"num_frames": 4, "image_size": 16}
    return DataModule(Sprites("train", 8, **options), Sprites("val", 8, **options), batch_size=4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_equals_loops(temperature):
    student = {"a": torch.randn(3, 4), "b": torch.randn(3, 2)}
    teacher = {"a": 3 * torch.randn(3, 4), "b": torch.randn(3, 2)}
    total = 0.0
    for name in student:
        for row in range(3):
            p, q = ((logits[name][row] / temperature).double().softmax(0) for logits in (teacher, student))
            total += temperature**2 * sum(p[c] * (p[c].log() - q[c].log()) for c in range(len(p))).item() / 3 / 2
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(total, rel=1e-5)
    assert distillation_loss(student, student, temperature).item() == pytest.approx(0, abs=1e-6)


def test_gradient_norm_is_independent_of_the_temperature():
    """This is the purpose of the factor temperature²."""
    teacher, norms = {"a": torch.randn(8, 6)}, []
    for temperature in (10.0, 100.0):
        logits = torch.zeros(8, 6, requires_grad=True)
        distillation_loss({"a": logits}, teacher, temperature).backward()
        norms.append(logits.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_training_logs_both_losses_and_the_accuracy_of_the_teacher(weights, capsys, trainer):
    fit, module = trainer(), task(weights, hard_weight=0.5, temperature=2.0)
    fit.fit(module, datamodule=data())
    logged = fit.logged_metrics | fit.callback_metrics
    names = {"loss", "loss_soft", "loss_hard", "motion", "shape"}
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in names} <= logged.keys()
    assert {"val/motion_teacher", "val/shape_teacher"} <= logged.keys()
    assert not {"train/motion_teacher", "train/shape_teacher"} & logged.keys()
    for stage in ("train", "val"):
        soft, hard = logged[f"{stage}/loss_soft"], logged[f"{stage}/loss_hard"]
        assert logged[f"{stage}/loss"].item() == pytest.approx((soft + 0.5 * hard).item(), rel=1e-5)
    assert capsys.readouterr().out.count(str(weights)) == 1


def test_the_teacher_is_loaded_from_its_file_and_frozen(weights, trainer):
    fit, module = trainer(max_steps=4), task(weights)
    student = {name: value.clone() for name, value in module.model.state_dict().items()}
    fit.fit(module, datamodule=data())
    expected = classifier(24, 7).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.teacher.state_dict().items())
    assert not module.teacher.training
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    assert all(parameter.grad is None for parameter in module.teacher.parameters())
    changed = [name for name, value in module.model.state_dict().items() if not torch.equal(value, student[name])]
    assert len(changed) == len(student)
    fit.validate(module, data(), verbose=False)
    clips = [data().val[i] for i in range(8)]
    video = torch.stack([clip["video"] for clip in clips]).transpose(1, 2).float() / 255
    answers = classifier(24, 7).eval()(module.normalize(video))["motion"].argmax(dim=1)
    right = [int(answer) == clip["labels"]["motion"] for answer, clip in zip(answers, clips, strict=True)]
    assert fit.callback_metrics["val/motion_teacher"].item() == pytest.approx(sum(right) / 8)


def test_the_teacher_is_in_no_checkpoint_and_no_optimizer(tmp_path, weights, trainer):
    fit, module = trainer(), task(weights)
    fit.fit(module, datamodule=data())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=False)["state_dict"]
    assert all(name.startswith("model.") for name in state)
    assert len(state) == len(module.model.state_dict())
    optimized = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(parameter) for parameter in module.model.parameters()}


def test_student_and_teacher_receive_the_same_augmented_and_mixed_clips(weights, trainer):
    module, seen = (
        task(weights, input=ClipInput(RandomErasing(1.0), repeats=2), mixing=Mixing()),
        {"model": [], "teacher": []},
    )
    for name, videos in seen.items():
        part = getattr(module, name)
        part.register_forward_pre_hook(lambda _, inputs, videos=videos: videos.append(inputs[0]))
    trainer(limit_val_batches=0).fit(module, datamodule=data())
    assert [len(video) for video in seen["model"]] == [8, 8]
    assert all(torch.equal(a, b) for a, b in zip(seen["model"], seen["teacher"], strict=True))


def test_a_student_converges_to_its_teacher():
    """Overfits the soft loss on two clips."""
    module = task(None, temperature=2.0)
    batch = {
        "video": torch.rand(2, 3, 4, 16, 16),
        "labels": {"motion": torch.zeros(2).long(), "shape": torch.ones(2).long()},
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(module.shared_step(batch, "train")["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.02 * losses[0]
    inputs = module.normalize(batch["video"])
    torch.testing.assert_close(
        module.model(inputs)["motion"].softmax(1), module.teacher(inputs)["motion"].softmax(1), atol=0.05, rtol=0
    )


def test_a_missing_or_incompatible_file_raises_before_training(tmp_path, weights, trainer):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        trainer().fit(task(tmp_path / "nowhere.pt"), datamodule=data())
    encoder = {f"encoder.{name}": value for name, value in classifier(24, 7).encoder.state_dict().items()}
    torch.save(encoder, tmp_path / "pretrained.pt")
    with pytest.raises(ValueError, match=r"(?s)pretrained\.pt.*\b6\b.*head\.fc_norm"):
        trainer().fit(task(tmp_path / "pretrained.pt"), datamodule=data())
    with pytest.raises(ValueError, match=r"(?s)teacher\.pt.*\bnum_classes\b"):
        trainer().fit(task(weights, teacher=classifier(16, 1)), datamodule=data())


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"temperature": 0.0}, r"task\.temperature=0\.0\b"),
        ({"hard_weight": -1.0}, r"task\.hard_weight=-1\.0\b"),
        ({"teacher": classifier(24, 1, num_classes={"motion": 7})}, r"(?s)task\.teacher\.num_classes=\{'motion': 7\}"),
    ],
)
def test_arguments_out_of_range_raise(changes, pattern):
    with pytest.raises(ValueError, match=pattern):
        task("weights.pt", **changes)
