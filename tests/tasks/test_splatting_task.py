"""Reconstruction of scenes: stages, learning rates, losses, density control, resuming, controls, and bad input."""

import functools
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch import Tensor, nn

from blueberry_video.callbacks import EMA, Media, NaNGuard, StepSeed
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.data.world_scene import WorldScene
from blueberry_video.evaluation.static_control import StaticControl
from blueberry_video.experiment.checkpoint import AtomicCheckpointIO, Checkpoints, checkpoint_files
from blueberry_video.models.gaussian_splatting import Deformation, GaussianSplatting4D, HexPlane, Native, Static
from blueberry_video.models.gaussian_splatting import densify as density
from blueberry_video.optim import exponential
from blueberry_video.tasks import splatting_stages
from blueberry_video.tasks.settings import ClipInput, Optimization
from blueberry_video.tasks.splatting import Splatting
from blueberry_video.tasks.splatting_settings import DECAYED, LearningRates, SceneLosses, check_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
BOX = [[-2.0, -2, 0], [2, 2, 0.9]]
ADAM = functools.partial(torch.optim.Adam, lr=1.0, eps=1e-15)
OPTIMIZATION = Optimization(ADAM, exponential)
CONTROL = density.Densification(
    start=2, stop=12, interval=3, gradient_threshold=1e-6, max_gaussians=200, reset_interval=5, max_scale=10.0
)
STEPS, COARSE = 12, 4
views = functools.partial(WorldScene, num_times=6, num_held_out=3, image_size=16, supersample=1)


def model(kind: str = "deformation") -> GaussianSplatting4D:
    torch.manual_seed(0)
    field = HexPlane(2, (3, 3, 3, 3), (1,), BOX)
    dynamics = {"native": Native, "static": Static, "deformation": lambda: Deformation(field, 4)}[kind]()
    return GaussianSplatting4D(dynamics, 40, bounds=BOX, sh_degree=1)


def task(kind: str = "deformation", **settings) -> Splatting:
    settings = {"densification": CONTROL, "coarse_steps": COARSE, "sh_interval": 3, "turntable_frames": 2} | settings
    return Splatting(model(kind), settings.pop("optimization", OPTIMIZATION), **settings)


def prepared(kind: str = "deformation", **settings) -> Splatting:
    found = task(kind, **settings)
    found.prepare(views("train"))
    return found


def batch(split: str = "train", count: int = 2) -> dict:
    clips = [views(split)[i] for i in range(count)]
    found = torch.utils.data.default_collate(clips)
    return {**found, "video": found["video"].transpose(1, 2).float() / 255}


def trainer_of(folder: Path, *callbacks, **options) -> lightning.Trainer:
    lightning.seed_everything(3, verbose=False)
    settings = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "callbacks": [StepSeed(1), NaNGuard(), *callbacks, Checkpoints(1, 1000)],
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": folder,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(**settings | options)


def data(**options) -> DataModule:
    return DataModule(views("train"), views("val"), 2, seed=1, **options)


def train(
    folder: Path,
    *callbacks,
    kind: str = "deformation",
    resume: Path | None = None,
    settings: dict | None = None,
    **options,
) -> Splatting:
    trainer = trainer_of(folder, *callbacks, **options)
    found = task(kind, **settings or {})
    trainer.fit(found, datamodule=data(), ckpt_path=resume)
    return found


def content(folder: Path, position: int = 0) -> dict:
    return torch.load(checkpoint_files(folder / "checkpoints")[position], weights_only=True)


def same(first: object, second: object) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# ---- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deformation", "native", "static"])
def test_training_lowers_the_error(kind: str, tmp_path: Path):
    settings = {
        "densification": replace(CONTROL, start=STEPS, reset_interval=1000),
        "learning_rates": LearningRates(means=1e-3, sh_dc=0.05, opacity=0.1, scale=0.02),
        "coarse_steps": 0 if kind == "native" else COARSE,
    }
    before, trained = prepared(kind, **settings), train(tmp_path, kind=kind, settings=settings)
    assert int(trained.steps) == STEPS
    assert trained.shared_step(batch(), "val")["l1"] < 0.95 * before.shared_step(batch(), "val")["l1"]


def test_density_control_keeps_the_optimizer_and_the_statistics_in_step(tmp_path: Path):
    trained = train(tmp_path)
    number = trained.model.number
    assert number != model().number
    assert trained.statistics.number == number
    state = content(tmp_path)["optimizer_states"][0]["state"]
    assert [len(state[position]["exp_avg"]) for position in range(6)] == [number] * 6


def test_first_stage_trains_canonical_gaussians_only(tmp_path: Path):
    reference = {name: value.clone() for name, value in prepared().model.dynamics.state_dict().items()}
    train(tmp_path)
    files = {int(file.stem[5:]): file for file in checkpoint_files(tmp_path / "checkpoints")}
    for step, changes in ((COARSE, False), (COARSE + 1, True)):
        state = torch.load(files[step], weights_only=True)["state_dict"]
        changed = [name for name, value in reference.items() if not torch.equal(value, state[f"model.dynamics.{name}"])]
        assert bool(changed) == changes, (step, changed)


def test_loss_is_l1_with_the_weighted_terms_of_the_second_stage():
    found, images = prepared(losses=SceneLosses(0.5, 2.0, 3.0, 4.0)), batch()
    first = found.shared_step(images, "train")
    assert set(first) == {"loss", "l1", "dssim", "num_gaussians"}
    torch.testing.assert_close(first["loss"], first["l1"] + 0.5 * first["dssim"])
    torch.testing.assert_close(first["l1"], (found.render(images).color - images["video"][:, :, 0]).abs().mean())
    found.steps.fill_(COARSE)
    second = found.shared_step(images, "train")
    terms = {"dssim": 0.5, "spatial_smoothness": 2.0, "time_smoothness": 3.0, "time_planes": 4.0}
    expected = second["l1"] + sum(weight * second[name] for name, weight in terms.items())
    torch.testing.assert_close(second["loss"], expected)


def test_density_control_counts_the_steps_of_each_stage(monkeypatch: pytest.MonkeyPatch):
    found, calls = prepared(), []
    monkeypatch.setattr(
        splatting_stages, "densify", lambda *_, prune_large: calls.append((int(found.steps), prune_large))
    )
    monkeypatch.setattr(splatting_stages, "reset_opacities", lambda *_: calls.append(int(found.steps)))
    optimizer, _ = found.build_optimizer(30)
    for _ in range(20):
        found.after_step(optimizer)
    # stop=12: stage 1 has steps 1 to 4, stage 2 begins after step 4
    assert calls == [(3, False), (COARSE + 3, False), COARSE + 5, (COARSE + 6, True), (COARSE + 9, True), COARSE + 10]


def test_loss_of_native_dynamics_has_the_weighted_speed():
    found, images = prepared("native", losses=SceneLosses(speed=5.0)), batch()
    with torch.no_grad():
        found.model.dynamics.velocities.fill_(0.1)
    found.steps.fill_(COARSE)
    values = found.shared_step(images, "train")
    torch.testing.assert_close(values["speed"], torch.tensor(0.3))
    torch.testing.assert_close(values["loss"], values["l1"] + 1.5)


def test_long_native_gaussians_become_static_after_a_densification_of_the_second_stage():
    found = prepared("native")
    optimizer, _ = found.build_optimizer(30)
    with torch.no_grad():
        found.model.dynamics.log_durations[:5] = 2.0  # 7.4 time spans
    marked = []
    for _ in range(COARSE + 3):
        found.after_step(optimizer)
        marked.append(int(found.model.dynamics.is_static.sum()))
    assert marked[:-1] == [0] * (COARSE + 2)  # the densification of the first stage is after step 3
    assert marked[-1] == 5


@pytest.mark.parametrize("final", [1.0, 0.25])
def test_learning_rates_have_the_scale_of_the_scene_and_decay_by_role(final: float):
    found = prepared(
        learning_rates=LearningRates(means=1.0, grid=2.0, deformation=3.0, opacity=0.5, others_final=final)
    )
    optimizer, scheduler = found.build_optimizer(COARSE + 11)
    start = {group["name"]: group["lr"] for group in optimizer.param_groups}
    extent = found.extent
    assert extent > 1
    assert (start["means"], start["grid"], start["deformation"]) == pytest.approx((extent, 2 * extent, 3 * extent))
    assert (start["opacity"], start["sh_dc"], start["sh_rest"]) == (0.5, 2.5e-3, 1.25e-4)
    rates = []
    for _ in range(COARSE + 11):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        scheduler.step()
    for name, first in start.items():
        decays = name in DECAYED
        assert rates[COARSE][name] == pytest.approx(first), "the second stage begins with the full rate"
        assert rates[-1][name] == pytest.approx(first * (0.01 if decays else final))
        assert (rates[2][name] < first) == decays


def test_rates_of_native_dynamics(tmp_path: Path):
    names = [group["name"] for group in prepared("native").build_optimizer(20)[0].param_groups]
    assert names[-2:] == ["time", "velocity"]


def test_starts_from_the_point_cloud_of_the_data_and_its_background():
    points = views("train")
    points.points, points.colors = torch.rand(7, 3), torch.rand(7, 3)
    found = task()
    found.prepare(points)
    torch.testing.assert_close(found.model.gaussians.means.detach(), points.points)
    assert (found.model.number, found.statistics.number) == (7, 7)
    assert found.background.tolist() == [1, 1, 1]
    other = task(use_points=False, background=[0.25, 0.5, 0.75], extent=3.0)
    other.prepare(points)
    assert (other.model.number, other.background.tolist(), other.extent) == (40, [0.25, 0.5, 0.75], 3.0)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def killed_in_densification(folder: Path, number: int) -> None:
    """Trains until the call ``number`` of ``densify`` has replaced some parameters, then kills the process."""
    calls = []
    original = density.replace_rows

    def replace_some_rows(modules: nn.Module, *arguments) -> None:
        calls.append(1)
        if len(calls) == number:
            original(modules[0].gaussians, *arguments)  # the statistics are still those of before
            os.kill(os.getpid(), signal.SIGKILL)
        original(modules, *arguments)

    density.replace_rows = replace_some_rows
    train(folder)


@pytest.mark.parametrize("number", [1, 3])
def test_run_killed_in_a_densification_resumes_bit_for_bit(number: int, tmp_path: Path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(unbroken)
    process = multiprocessing.get_context("fork").Process(target=killed_in_densification, args=(broken, number))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    files = checkpoint_files(broken / "checkpoints")
    killed_at = int(files[0].stem[5:])
    assert (killed_at + 1) in {3, COARSE + 3, COARSE + 6}
    train(broken, resume=files[0])
    for position in range(STEPS - killed_at):  # every step after the resume
        wanted, got = content(unbroken, position), content(broken, position)
        assert wanted["global_step"] == got["global_step"] == STEPS - position
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert same(wanted[key], got[key]), (key, wanted["global_step"])
    assert {"statistics.gradient_sum", "statistics.views", "steps", "background"} <= wanted["state_dict"].keys()
    assert (
        wanted["state_dict"]["model.gaussians.means"].shape
        != content(unbroken, -1)["state_dict"]["model.gaussians.means"].shape
    )


def test_checkpoint_of_another_number_of_gaussians_loads_into_a_new_task(tmp_path: Path):
    trained = train(tmp_path)
    fresh = task()
    assert fresh.model.number != trained.model.number
    message = fresh.load_weights(checkpoint_files(tmp_path / "checkpoints")[0])
    assert str(trained.model.number) in message
    assert same(dict(trained.model.state_dict()), dict(fresh.model.state_dict()))
    assert (int(fresh.steps), fresh.background.tolist()) == (STEPS, [1, 1, 1])
    torch.testing.assert_close(fresh.render(batch()).color, trained.render(batch()).color)


def test_checkpoint_of_another_model_raises(tmp_path: Path):
    train(tmp_path, kind="static")
    with pytest.raises(ValueError, match=r"(?s)step_.*do not fit.*missing"):
        task("deformation").load_weights(checkpoint_files(tmp_path / "checkpoints")[0])


def test_run_starts_from_the_weights_of_another(tmp_path: Path):
    trained = train(tmp_path / "first")
    file = checkpoint_files(tmp_path / "first" / "checkpoints")[0]
    found = task(optimization=replace(OPTIMIZATION, init_from=file))
    trainer_of(tmp_path / "second", max_steps=COARSE + 1).fit(found, datamodule=data())
    assert int(found.steps) == COARSE + 1
    assert found.statistics.number == found.model.number >= trained.model.number - 5


# ---- metrics -----------------------------------------------------------------------------------------------------


def test_validation_measures_held_out_views(tmp_path: Path):
    trainer = trainer_of(tmp_path, max_steps=2)
    found = task(coarse_steps=0)
    trainer.fit(found, datamodule=data())
    [measured] = trainer.validate(found, datamodule=data(), verbose=False)
    assert {"val/psnr", "val/ssim", "val/psnr_nearest", "val/num_gaussians", "val/loss", "val/l1"} <= measured.keys()
    assert "val/lpips" not in measured
    values = found.shared_step(batch("val", 3), "val")
    assert measured["val/psnr"] == pytest.approx(float(values["psnr"].mean()), abs=1e-4)
    assert measured["val/psnr_nearest_gain"] == pytest.approx(
        measured["val/psnr"] - measured["val/psnr_nearest"], abs=1e-4
    )


def test_perfect_renders_have_ssim_1_and_lpips_of_the_given_distance():
    class Distance(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return (first - second).abs().mean((1, 2, 3), keepdim=True)

    found, images = prepared(perceptual=Distance()), batch("val", 3)
    values = found.quality(images["video"], images)
    torch.testing.assert_close(values["ssim"], torch.ones(3))
    torch.testing.assert_close(values["lpips"], torch.zeros(3))
    assert not any("perceptual" in name for name in found.state_dict())


def test_media_are_views_next_to_renders_and_a_turntable(tmp_path: Path):
    found = prepared()
    media = found.media(batch("val", 3))
    assert media["views"].shape == (1, 3, 3 * 17, 2 * 17)
    assert media["turntable"].shape == (2, 3, 16, 16)
    assert media["turntable"].dtype == torch.uint8
    train(tmp_path, Media(1000))
    assert {file.name.rpartition("_")[0] for file in (tmp_path / "media").glob("*.gif")} == {
        "views_image",
        "turntable_image",
    }


def test_static_control_is_trained_equally(tmp_path: Path):
    control = StaticControl(seed=1)
    trainer = trainer_of(tmp_path, control)
    found = task()
    trainer.fit(found, datamodule=data())
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("control/")}
    gain = values["control/psnr"] - values["control/psnr_static"]
    assert values["control/psnr_static_gain"] == pytest.approx(gain, abs=1e-5)
    [measured] = trainer.validate(found, datamodule=data(), verbose=False)
    assert values["control/psnr"] == pytest.approx(measured["val/psnr"], abs=1e-4)
    static = control.train(found, views("train"), 2, STEPS)
    assert isinstance(static.model.dynamics, Static)
    assert int(static.steps) == STEPS
    assert static.model.number == values["control/num_gaussians_static"] != 40
    again = control.train(found, views("train"), 2, STEPS)
    assert same(dict(static.model.state_dict()), dict(again.model.state_dict()))


def test_static_model_and_control_without_dynamics_agree():
    """The first stage of any model renders what a static model renders."""
    moving, static = prepared(), prepared("static")
    torch.testing.assert_close(moving.render(batch()).color, static.render(batch()).color)


def test_static_control_requires_splatting():
    with pytest.raises(ValueError, match=r"callbacks\.control.*task=splatting.*Module"):
        StaticControl().setup(SimpleNamespace(), nn.Module(), "fit")


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coarse_steps": -1}, r"task\.coarse_steps=-1"),
        ({"sh_interval": 0}, r"task\.sh_interval=0"),
        ({"extent": 0.0}, r"task\.extent=0\.0"),
        ({"background": [0.0, 2.0, 0.0]}, r"task\.background=\[0\.0, 2\.0, 0\.0\]"),
        ({"background": [0.0]}, r"task\.background=\[0\.0\]"),
        ({"input": ClipInput(augment=nn.Dropout())}, r"task\.input\.augment=Dropout"),
        ({"input": ClipInput(repeats=2)}, r"repeats=2"),
        ({"optimization": replace(OPTIMIZATION, lr_batch_size=4)}, r"lr_batch_size=4"),
    ],
)
def test_settings_out_of_range_raise(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        task(**settings)


@pytest.mark.parametrize("settings", [{"means": 0.0}, {"time": -1.0}])
def test_learning_rates_must_be_positive(settings: dict):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=rf"task\.learning_rates\.{name}={value}"):
        LearningRates(**settings)


def test_weights_of_losses_must_not_be_negative():
    with pytest.raises(ValueError, match=r"task\.losses\.dssim=-1"):
        SceneLosses(dssim=-1)


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([], {"accumulate_grad_batches": 2}, r"trainer\.accumulate_grad_batches=2.*batch_size"),
        ([], {"precision": "bf16-mixed"}, r"trainer\.precision=bf16-mixed.*32-true"),
        ([EMA()], {}, r"callbacks\.ema.*null"),
        ([], {"max_steps": COARSE}, rf"trainer\.max_steps={COARSE}.*task\.coarse_steps={COARSE}"),
    ],
)
def test_unsuitable_trainers_raise(callbacks: list, options: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, *callbacks, **options)


def test_several_processes_raise():
    trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match=r"trainer\.devices=2.*1"):
        check_trainer(trainer)  # type: ignore[arg-type]


def test_weight_decay_raises_with_the_optimizer_to_choose():
    adamw = Optimization(functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05), exponential)
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay=0\.05.*optimizer=splatting"):
        prepared(optimization=adamw).build_optimizer(20)


def test_data_without_views_of_a_scene_raise(tmp_path: Path):
    clips = functools.partial(Sprites, size=4, num_frames=4, image_size=16)
    with pytest.raises(ValueError, match=r"data\.train=Sprites.*data=scene_folder"):
        trainer_of(tmp_path).fit(task(), datamodule=DataModule(clips("train"), clips("val"), 2))


@pytest.mark.parametrize("key", ["time", "poses", "intrinsics"])
def test_views_without_camera_or_time_raise(key: str):
    images = batch()
    del images[key]
    with pytest.raises(ValueError, match=rf"requires also {key}\b.*data=scene_folder"):
        prepared().shared_step(images, "train")


def test_clips_of_several_frames_raise():
    images = batch()
    images["poses"] = images["poses"].repeat(1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"poses has shape \(2, 2, 4, 4\)"):
        prepared().shared_step(images, "train")


class Moved(WorldScene):
    """Views that look away from the scene."""

    def __init__(self):
        super().__init__("train", num_times=3, num_held_out=1, image_size=16, supersample=1)
        self.poses[:, :3, 3] += 100 * self.poses[:, :3, 2]


def test_points_that_no_view_sees_raise():
    with pytest.raises(ValueError, match=r"none of the 3 training views.*40 initial points.*model\.bounds"):
        task().prepare(Moved())


class Empty(WorldScene):
    def __len__(self) -> int:
        return 0


def test_scene_without_views_raises():
    with pytest.raises(ValueError, match=r"data\.train=Empty has no views"):
        task().prepare(Empty("train", num_times=3, num_held_out=1, image_size=16))


def test_views_that_are_not_finite_stop_the_run(tmp_path: Path):
    class Broken(Splatting):
        def shared_step(self, images: dict, stage: str) -> dict[str, Tensor]:
            values = super().shared_step(images, stage)
            return {**values, "loss": values["loss"] * torch.nan} if int(self.steps) == 2 else values

    found = Broken(model(), OPTIMIZATION, densification=CONTROL, coarse_steps=0)
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is nan for the clips scene-0-train-"):
        trainer_of(tmp_path).fit(found, datamodule=data())
    assert all(value.isfinite().all() for value in found.model.state_dict().values())
