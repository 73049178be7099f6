"""Training of depth: losses by kind of labels, students and teachers, metrics with their controls, and bad input."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hydra
import lightning
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from blueberry_video.augmentation import ColorJitter, HorizontalFlip
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.mixture import Mixture
from blueberry_video.data.pseudo_labels import PseudoLabelWriter
from blueberry_video.data.single_frames import SingleFrames
from blueberry_video.data.world import World
from blueberry_video.evaluation.depth_metrics import aligned_depth, depth_accuracy, disparity_of
from blueberry_video.evaluation.depth_scores import DepthScores, shuffled_prediction
from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything, losses
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.optim import constant
from blueberry_video.tasks.depth import Depth
from blueberry_video.tasks.depth_losses import RelativeLoss
from blueberry_video.tasks.depth_student import Student, flipped
from blueberry_video.tasks.settings import ClipInput, Optimization

OPTIMIZATION = Optimization(partial(torch.optim.AdamW, lr=1e-3), constant)
SIZE = 28
CONF = Path(__file__).parents[2] / "conf"


def image_model(seed: int = 0, max_depth: float | None = None) -> DepthAnything:
    torch.manual_seed(seed)
    model = DepthAnything(DINOv2(SIZE, 1, 14, 16, 4, 2, table_size=2), (0, 1, 2, 3), 8, (4, 6, 8, 10), max_depth)
    for parameter in model.parameters():  # large, so that maps depend on the image
        nn.init.normal_(parameter, std=0.15)
    nn.init.constant_(model.depth_head.scratch.output_conv2[2].bias, 0.5)  # a ReLU that is not dead
    model.max_depth = max_depth
    return model


class VideoModel(nn.Module):
    """Image model with a running mean of its maps over the frames: depends on their order."""

    streams_exactly = True

    def __init__(self, max_depth: float | None = None):
        super().__init__()
        self.image = image_model(max_depth=max_depth)
        self.pretrained, self.max_depth, self.taps = self.image.pretrained, max_depth, self.image.taps

    def forward(self, video: Tensor) -> Tensor:
        maps = self.image(video.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(video), video.shape[2]))
        return maps.cumsum(1) / torch.arange(1, maps.shape[1] + 1).view(-1, 1, 1)


def task(model: nn.Module | None = None, **settings) -> Depth:
    return Depth(model or image_model(), OPTIMIZATION, **settings)


def clips(count: int = 3, frames: int = 2, kind: str = "depth", seed: int = 0) -> dict:
    """Batch as ``shared_step`` receives it, with some invalid pixels."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(count, 3, frames, SIZE, SIZE, generator=generator)
    depth = torch.rand(count, frames, SIZE, SIZE, generator=generator) * 4 + 1
    depth[torch.rand(depth.shape, generator=generator) < 0.1] = 0
    batch = {"video": video, "id": [f"clip-{seed}-{i}" for i in range(count)]}
    if kind == "depth":
        intrinsics = torch.tensor([[30.0, 0, 14], [0, 30, 14], [0, 0, 1]]).repeat(count, 1, 1)
        poses = torch.eye(4).repeat(count, frames, 1, 1)
        return {**batch, "depth": depth, "intrinsics": intrinsics, "poses": poses}
    return {**batch, "disparity": torch.where(depth > 0, 7 / depth + 3, torch.nan)} if kind == "disparity" else batch


def attach(module: Depth, train, val=None) -> Depth:
    """Gives a task a trainer that has only data."""
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(train=train, val=val))  # type: ignore[assignment]
    return module


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["depth", "disparity"])
@pytest.mark.parametrize("average", [False, True])
def test_relative_loss_is_the_weighted_sum_over_frames(kind: str, average: bool):
    weights = {"affine": 1.0, "gradient": 2.0, "trim": 0.2, "scales": 2, "average": average}
    module, batch = task(loss=RelativeLoss(**weights)), clips(kind=kind)
    found = module.shared_step(batch, "train")
    maps = module.model(module.normalize(batch["video"]).transpose(1, 2).flatten(0, 1))
    target = (disparity_of(batch["depth"]) if kind == "depth" else batch["disparity"].nan_to_num()).flatten(0, 1)
    valid = target > 0
    affine = losses.affine_invariant_loss(maps, target, valid, 0.2)
    normal = [losses.normalized(each, valid) for each in (maps, target)]
    gradient = losses.gradient_matching_loss(*normal, valid, 2)
    torch.testing.assert_close(found["affine"], affine)
    torch.testing.assert_close(found["gradient"], gradient)
    torch.testing.assert_close(found["loss"], (affine + 2 * gradient) / (3 if average else 1))


def test_video_loss_has_a_temporal_term_of_labelled_clips():
    settings = {"loss": RelativeLoss(gradient=0.5, temporal=10.0, threshold=0.5), "student": Student(weight=0.5)}
    module, batch = task(VideoModel(), **settings), clips(frames=4)
    found = module.shared_step(batch, "train")
    target, valid = disparity_of(batch["depth"]), batch["depth"] > 0
    for clip, mask in zip(target, valid):  # from 0 to 1
        clip[mask] = (clip[mask] - clip[mask].min()) / (clip[mask].max() - clip[mask].min())
    maps = module.predict(batch["video"])
    temporal = losses.temporal_gradient_matching_loss(maps, target, valid, 0.5)
    assert temporal > 0
    feet = module.shared_step({**batch, "depth": batch["depth"] * 3.28}, "train")["temporal"]
    torch.testing.assert_close(feet, temporal, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["temporal"], temporal)
    torch.testing.assert_close(found["loss"], found["affine"] + 0.5 * found["gradient"] + 10 * temporal)
    pseudo = module.shared_step(clips(frames=4, kind="disparity"), "train")
    assert "temporal" not in pseudo
    torch.testing.assert_close(pseudo["loss"], 0.5 * (pseudo["affine"] + 0.5 * pseudo["gradient"]))


@pytest.mark.parametrize("model", [image_model, VideoModel])
def test_metric_loss_ignores_depth_above_the_limit(model):
    module, batch = task(model(max_depth=4.0)), clips()
    found = module.shared_step(batch, "train")
    depth = batch["depth"]
    valid = (depth > 0) & (depth <= 4)
    assert (depth > 4).sum() > 0
    torch.testing.assert_close(found["loss"], losses.silog_loss(module.predict(batch["video"]), depth, valid))
    scores = module.shared_step(batch, "val")
    expected = depth_accuracy(module.predict(batch["video"]), torch.where(valid, depth, 0.0))
    torch.testing.assert_close(scores["rmse"], expected.rmse)


@pytest.mark.parametrize("stage", ["train", "val"])
@pytest.mark.parametrize("max_depth", [None, 4.0])
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -2.0])
def test_clips_without_valid_pixels_contribute_nothing(stage: str, max_depth: float | None, bad: float):
    module, batch = task(image_model(max_depth=max_depth)), clips(3)
    kept = {key: value[1:] for key, value in batch.items()}
    batch["depth"][0] = bad
    found, expected = module.shared_step(batch, stage), module.shared_step(kept, stage)
    torch.testing.assert_close(found, expected)
    batch["depth"][:] = bad
    empty = module.shared_step(batch, stage)
    if stage == "val":
        assert {len(value) for value in empty.values()} == {0}
    else:
        assert empty["loss"].item() < 1e-5
        empty["loss"].backward()
        gradients = [each.grad for each in module.parameters() if each.grad is not None]
        assert all((gradient == 0).all() for gradient in gradients)


# ---- students --------------------------------------------------------------------------------------------------------


def test_the_teacher_receives_clean_clips_and_the_student_augmented_ones():
    teacher, module = image_model(1), task()
    module = task(teacher=teacher, student=Student(ColorJitter(probability=1.0), weight=0.5))
    batch = clips(kind="none")
    torch.manual_seed(3)
    found = module.shared_step(batch, "train")
    torch.manual_seed(3)
    strong = module.student.augment(batch["video"])
    assert (strong - batch["video"]).abs().max() > 0.05
    labels = module.predict(batch["video"], teacher).detach()
    stored = {**batch, "disparity": labels, "video": strong}
    module.student = Student(weight=0.5)
    torch.testing.assert_close(module.shared_step(stored, "train")["loss"], found["loss"])
    assert not any("teacher" in name for name, _ in module.named_parameters())
    assert not any("teacher" in name for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_labels_of_a_batch_come_before_the_teacher():
    module, alone = task(teacher=image_model(1)), task()
    for kind in ("depth", "disparity"):
        torch.testing.assert_close(*(each.shared_step(clips(kind=kind), "train")["loss"] for each in (module, alone)))


def test_cutmix_pastes_pixels_and_labels_of_the_next_clip():
    batch = clips(40, 2, "disparity")
    target = batch["disparity"].nan_to_num()
    valid = batch["disparity"].isfinite()
    view = Student(cutmix=0.5).view(batch["video"], target, valid)
    assert view.mask is not None
    assert view.pasted is not None
    torch.testing.assert_close(view.mask[:, 0], view.mask[:, 1])
    mixed = view.mask.flatten(1).any(1)
    assert 10 <= mixed.sum() <= 30
    share = view.mask[mixed].float().mean((1, 2, 3))
    assert 0.01 < share.min() < share.max() < 0.45
    pasted, own = view.mask[:, None].expand_as(view.video), ~view.mask[:, None].expand_as(view.video)
    torch.testing.assert_close(view.video[own], batch["video"][own])
    torch.testing.assert_close(view.video[pasted], batch["video"].roll(1, 0)[pasted])
    torch.testing.assert_close(view.valid[view.mask], valid.roll(1, 0)[view.mask])
    torch.testing.assert_close(view.pasted, target.roll(1, 0))
    assert Student(cutmix=0.0).view(batch["video"], target, valid).mask is None


def test_loss_of_mixed_clips_normalizes_both_regions():
    loss = RelativeLoss(gradient=2.0, trim=0.1, scales=2)
    batch = clips(4, 1, "disparity")
    target, valid = batch["disparity"].nan_to_num(), batch["disparity"].isfinite()
    view = Student(cutmix=1.0).view(batch["video"], target, valid)
    exact = torch.where(view.mask, 3 * view.pasted + 1, 0.2 * view.target - 5)  # another affine map in each region
    terms = loss.pseudo(exact, view)
    assert float(terms["affine"]) == pytest.approx(0, abs=1e-5)
    assert float(terms["gradient"]) == pytest.approx(0, abs=1e-4)
    maps = torch.rand_like(target)
    folded = [each.flatten(0, 1) for each in (maps, view.pasted, view.target, view.valid, view.mask)]
    torch.testing.assert_close(loss.pseudo(maps, view)["affine"], losses.mixed_pseudo_label_loss(*folded, 0.1))
    assert loss.pseudo(maps, view)["gradient"] > 0.1


def test_feature_alignment_to_the_initial_encoder():
    module = task(loss=RelativeLoss(gradient=0.0, features=1.0, average=True))
    module.setup("validate")
    batch = clips(kind="disparity")
    assert module.shared_step(batch, "train")["features"].item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for block in module.model.pretrained.blocks:
            block.ls1.gamma.fill_(1.0) if hasattr(block, "ls1") else None
        for parameter in module.model.pretrained.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    found = module.shared_step(batch, "train")
    images = module.normalize(batch["video"]).transpose(1, 2).flatten(0, 1)[:, :, None]
    pair = [each.tokens_behind(images, (3,))[0][0] for each in (module.model.pretrained, module.frozen)]
    expected = losses.feature_alignment_loss(*pair, 0.85)
    assert expected > 0.1
    torch.testing.assert_close(found["features"], expected)
    torch.testing.assert_close(found["loss"], (found["affine"] + expected) / 2)
    assert "features" not in module.shared_step(clips(), "train")


def test_flips_move_frames_and_maps_together():
    batch = clips(30, 2)
    found = flipped(batch, 0.5)
    is_flipped = torch.tensor([not torch.equal(a, b) for a, b in zip(found["video"], batch["video"])])
    assert 5 < is_flipped.sum() < 25
    for key in ("video", "depth"):
        expected = [each.flip(-1) if flip else each for each, flip in zip(batch[key], is_flipped)]
        torch.testing.assert_close(found[key], torch.stack(expected))
    assert flipped(batch, 0.0) is batch


# ---- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [image_model, VideoModel])
def test_metrics_of_validation_do_not_depend_on_the_batch(model):
    train = [{"depth": clips(1, 3, seed=seed)["depth"][0]} for seed in range(5)]
    module = attach(task(model()), train).eval()
    batch = clips(4, 3)
    found = module.shared_step(batch, "val")
    names = {"loss", "abs_rel", "delta1", "rmse", "flicker", "tae", "tae_floor", "abs_rel_trivial"}
    controls = {"abs_rel_shuffled", "tae_shuffled"}
    assert set(found) == names | (controls if model is VideoModel else set())
    parts = [module.shared_step({key: value[i : i + 1] for key, value in batch.items()}, "val") for i in range(4)]
    for name, values in found.items():
        assert len(values) == 4
        torch.testing.assert_close(values, torch.cat([part[name] for part in parts]), rtol=1e-4, atol=1e-5)
    maps = aligned_depth(module.predict(batch["video"]), batch["depth"])
    torch.testing.assert_close(found["abs_rel"], depth_accuracy(maps, batch["depth"]).abs_rel)


def test_trivial_prediction_is_the_median_map_of_the_middle_frames():
    train = [{"depth": torch.full((3, SIZE, SIZE), 1.0)} for _ in range(3)]
    for depth, clip in zip((2.0, 4.0, 5.0), train):
        clip["depth"][1] = depth
        clip["depth"][1, :14] = 1.0
    train[0]["depth"][1, 20] = 0  # invalid: the lower of 1/4 and 1/5 is the median
    module = attach(task(), train)
    expected = torch.full((SIZE, SIZE), 1 / 4)
    expected[:14], expected[20] = 1.0, 1 / 5
    torch.testing.assert_close(module._median.get(module, SIZE, SIZE), expected)
    assert module._median.get(module, 14, 14).shape == (14, 14)
    batch = clips(2, 1)
    found = module.shared_step(batch, "val")["abs_rel_trivial"]
    aligned = aligned_depth(expected.expand(2, 1, -1, -1), batch["depth"])
    torch.testing.assert_close(found, depth_accuracy(aligned, batch["depth"]).abs_rel)
    metric = attach(task(image_model(max_depth=9.0)), train)
    found = metric.shared_step(batch, "val")["abs_rel_trivial"]
    torch.testing.assert_close(found, depth_accuracy((1 / expected).expand(2, 1, -1, -1), batch["depth"]).abs_rel)


def test_median_map_does_not_mix_depth_and_pseudo_labels():
    labelled = [{"depth": torch.full((1, 2, 2), depth)} for depth in (2.0, 4.0, 5.0)]
    pseudo = [{"disparity": torch.full((1, 2, 2), 1000.0)}] * 9
    for train, expected in ((labelled + pseudo, 0.25), (pseudo, 1000)):
        module = attach(task(), train)
        assert (module._median.get(module, 2, 2) == expected).all()


def test_a_mixture_of_labelled_images_and_pseudo_labelled_clips_trains(tmp_path: Path):
    world = World("train", 8, 3, SIZE, supersample=1)
    pseudo = PseudoLabelWriter()(world, lambda video: video.float().mean(1) / 255, tmp_path / "labels", "mean")
    data = DataModule(Mixture({"image": SingleFrames(world), "clip": pseudo}), World("val", 2, 3, SIZE), batch_size=4)
    module = task(VideoModel(), loss=RelativeLoss(temporal=10.0), student=Student(ColorJitter(), cutmix=0.5))
    seen = []
    step = module.shared_step
    module.shared_step = lambda batch, stage: (seen.append((set(batch), stage)), step(batch, stage))[1]  # type: ignore
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trained = [keys & {"depth", "disparity"} for keys, stage in seen if stage == "train"]
    assert {"depth"} in trained
    assert {"disparity"} in trained
    assert all(float(value) == float(value) for value in trainer.callback_metrics.values())


def test_median_map_reads_at_most_256_clips():
    read = []

    class Clips:
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> dict:
            read.append(index)
            return {"disparity": torch.full((1, 2, 2), float(index))}

    module = attach(task(), Clips())
    assert module._median.get(module, 2, 2)[0, 0] == pytest.approx(500, abs=5)
    module._median.get(module, 2, 2)
    assert (len(read), read[0], read[-1]) == (256, 0, 996)
    assert task()._median.get(task(), 2, 2) is None  # no trainer


def test_shuffled_frames_are_put_back_in_order():
    class PerFrame(VideoModel):
        def forward(self, video: Tensor) -> Tensor:
            return self.image(video.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(video), video.shape[2]))

    batch = clips(3, 6)
    for model, differs in ((VideoModel(), True), (PerFrame(), False)):
        module = task(model).eval()
        maps = module.predict(batch["video"])
        shuffled = shuffled_prediction(module.predict, batch["video"], batch)
        assert torch.allclose(maps, shuffled, rtol=1e-4) != differs
        found, expected = module.shared_step(batch, "val"), module.scores(shuffled, batch, False)
        for name in ("abs_rel", "tae"):
            torch.testing.assert_close(found[f"{name}_shuffled"], expected[name])


def test_a_model_with_a_dead_output_warns():
    module = task().eval()
    nn.init.constant_(module.model.depth_head.scratch.output_conv2[2].bias, -1e3)
    with pytest.warns(UserWarning, match=r"one value, 0,.*init_from"):
        module.shared_step(clips(), "val")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task().eval().shared_step(clips(), "val")


def test_clips_of_pseudo_labels_have_a_loss_and_no_metrics():
    assert set(task().eval().shared_step(clips(kind="disparity"), "val")) == {"loss"}
    module = task(teacher=image_model(1)).eval()
    assert set(module.shared_step(clips(kind="none"), "val")) == {"loss"}


def test_depth_above_the_limit_of_the_scores_is_ignored():
    batch = clips(2, 1)
    module = task(scores=DepthScores(max_depth=3.0)).eval()
    limited = {**batch, "depth": torch.where(batch["depth"] > 3, 0.0, batch["depth"])}
    torch.testing.assert_close(module.shared_step(batch, "val")["rmse"], module.shared_step(limited, "val")["rmse"])
    assert module.scores.depth(torch.rand(2, 1, SIZE, SIZE), batch, False).max() <= 3.0001


@pytest.mark.parametrize(("kind", "max_depth"), [("depth", None), ("disparity", None), ("depth", 9.0)])
def test_media_show_frames_ground_truth_and_prediction(kind: str, max_depth: float | None):
    module = task(image_model(max_depth=max_depth), num_pictures=2)
    picture = module.media(clips(3, 2, kind))["depth"]
    assert (picture.dtype, picture.shape) == (torch.uint8, (2, 3, 2 * (SIZE + 1), 3 * (SIZE + 1)))


# ---- training --------------------------------------------------------------------------------------------------------


def test_parameter_groups_of_head_and_encoder():
    module = task(head_lr_scale=10.0)
    groups = module.parameter_groups()
    encoder = set(module.model.pretrained.parameters())
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scales) == sum(len(group["params"]) for group in groups)
    assert set(scales) == {each for each in module.parameters() if each.requires_grad}
    assert {scales[p] for p in encoder} == {1.0}
    assert {scales[p] for p in scales if p not in encoder} == {10.0}
    assert groups[0]["lr_scale"] == 10.0  # the group of train/lr
    frozen = VideoModel()
    frozen.pretrained.requires_grad_(False)
    trained = {p for group in task(frozen).parameter_groups() for p in group["params"]}
    assert not trained & set(frozen.pretrained.parameters())


def test_learning_rates_of_head_temporal_modules_and_encoder():
    sizes = {"taps": (0, 1, 2, 3), "features": 8, "out_channels": (8, 8, 8, 8), "norm_groups": 4, "temporal_heads": 2}
    model = VideoDepthAnything(image_model().pretrained, **sizes, freeze_encoder=False)
    groups = task(model, head_lr_scale=2.0, temporal_lr_scale=5.0).parameter_groups()
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    expected = {p: 2.0 for p in model.parameters() if p.requires_grad}
    expected |= dict.fromkeys(model.pretrained.parameters(), 1.0) | dict.fromkeys(
        model.head.motion_modules.parameters(), 10.0
    )
    assert scales == expected
    assert sum(len(group["params"]) for group in groups) == len(scales)
    decayed = {p for group in groups if "weight_decay" not in group for p in group["params"]}
    assert all(p.ndim >= 2 for p in decayed)


def test_a_run_on_the_world_learns(tmp_path):
    splits = [World(split, 8, 2, SIZE, camera=["static", "orbit"], supersample=1) for split in ("train", "val")]
    module = task(loss=RelativeLoss(trim=0.0), flip=0.5)
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=DataModule(*splits, batch_size=4))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"val/abs_rel", "val/abs_rel_trivial", "val/tae", "val/tae_floor", "val/loss"} <= set(metrics)
    assert {"train/loss", "train/affine", "train/gradient"} <= set(metrics)
    assert 0 < metrics["val/abs_rel"] < 1
    assert 0 < metrics["val/abs_rel_trivial"] < 0.5
    assert all(value == value for value in metrics.values())
    assert module.tokens_per_clip({"video": torch.zeros(4, 3, 2, SIZE, SIZE)}) == 8


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("depth", {"affine": 1, "gradient": 2, "temporal": 0, "features": 0, "trim": 0.1, "average": False}),
        ("depth_student", {"affine": 1, "gradient": 2, "temporal": 0, "features": 0, "trim": 0.1, "average": False}),
        ("depth_student_v1", {"affine": 1, "gradient": 0, "temporal": 0, "features": 1, "trim": 0, "average": True}),
        ("depth_video", {"affine": 1, "gradient": 0.5, "temporal": 10, "features": 0, "trim": 0, "average": False}),
    ],
)
def test_configs_have_the_published_weights(name: str, expected: dict):
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        config = hydra.compose(overrides=[f"+task={name}"])
    module = instantiate(config.task, _partial_=True)(model=image_model(), optimization=OPTIMIZATION)
    assert expected.items() <= vars(module.loss).items()
    assert module.scores == DepthScores()
    assert (module.student.cutmix, module.student.augment is None) == ((0.5, False) if "student" in name else (0, True))
    assert module.student.weight == (0.5 if name == "depth_video" else 1)
    assert module.head_lr_scale == 10


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: task(nn.Linear(1, 1)), r"model\._target_.*Linear"),
        (lambda: task(head_lr_scale=0), r"task\.head_lr_scale=0\b"),
        (lambda: task(temporal_lr_scale=-1), r"task\.temporal_lr_scale=-1\b"),
        (lambda: task(flip=1.5), r"task\.flip=1\.5"),
        (lambda: task(input=ClipInput(HorizontalFlip())), r"task\.input\.augment=HorizontalFlip.*task\.flip"),
        (lambda: task(student=Student(nn.Sequential(HorizontalFlip()))), r"task\.student\.augment=HorizontalFlip"),
        (lambda: task(image_model(max_depth=8.0), teacher=image_model()), r"model\.max_depth=8\.0.*task\.teacher"),
        (lambda: task(teacher=image_model(max_depth=8.0)), r"task\.teacher\.max_depth=8\.0"),
        (lambda: Student(cutmix=2), r"task\.student\.cutmix=2\b"),
        (lambda: Student(weight=0), r"task\.student\.weight=0\b"),
        (lambda: RelativeLoss(affine=-1), r"task\.loss\.affine=-1\b"),
        (lambda: RelativeLoss(affine=0, gradient=0), r"task\.loss\.affine=0\b"),
        (lambda: DepthScores(max_depth=0), r"task\.scores\.max_depth=0\b"),
        (lambda: task().shared_step(clips(kind="none"), "train"), r"video, id.*task\.teacher=null"),
        (
            lambda: task(image_model(max_depth=8.0)).shared_step(clips(kind="disparity"), "train"),
            r"model\.max_depth=8\.0.*disparity",
        ),
    ],
)
def test_bad_input_raises(call, match: str):
    with pytest.raises(ValueError, match=match):
        call()


def test_features_of_a_frozen_encoder_raise():
    model = image_model()
    model.pretrained.requires_grad_(False)
    with pytest.raises(ValueError, match=r"task\.loss\.features=1\.0.*encoder"):
        task(model, loss=RelativeLoss(features=1.0))


def test_scores_of_the_initial_model_and_their_ratios():
    means = {
        "abs_rel": 0.02,
        "abs_rel_trivial": 0.08,
        "tae": 0.8,
        "tae_floor": 0.3,
        "tae_initial": 1.3,
        "tae_shuffled": 1.1,
        "abs_rel_initial": 0.05,
    }
    found = task(VideoModel()).epoch_metrics({key: torch.tensor(value) for key, value in means.items()})
    expected = {"abs_rel_share": 0.25, "tae_excess": 0.5, "tae_excess_initial": 1.0, "tae_excess_shuffled": 0.8}
    expected |= {"tae_excess_share": 0.5, "abs_rel_gain": 0.03}
    assert {key: pytest.approx(float(value)) for key, value in found.items()} == expected
    assert task(image_model()).epoch_metrics({"loss": torch.tensor(1.0)}) == {}


def test_the_initial_model_is_that_of_init_from_and_stays(monkeypatch: pytest.MonkeyPatch):
    module, batch = task(VideoModel()), clips(frames=4)
    module.setup("fit")
    assert module.initial is None  # without init_from
    settings = replace(module.optimization, init_from="weights.pt")
    module.optimization = settings

    def load(path: str) -> str:
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter.mul_(1.5)
        return "loaded"

    monkeypatch.setattr(module, "load_weights", load)
    module.setup("fit")
    before = module.shared_step(batch, "val")
    assert {"abs_rel_initial", "delta1_initial", "flicker_initial"} <= before.keys()
    torch.testing.assert_close(before["abs_rel_initial"], before["abs_rel"])
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    after = module.shared_step(batch, "val")
    torch.testing.assert_close(after["abs_rel_initial"], before["abs_rel"])
    assert not torch.allclose(after["abs_rel"], before["abs_rel"])
    assert not any(name.startswith("initial") for name in module.state_dict())
