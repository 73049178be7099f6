import json
import random
import re
import time
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blueberry_video import callbacks
from blueberry_video.callbacks import EMA, Media, NaNGuard, StepSeed, Throughput, contact_sheet, enlarge

BATCHES = 6
pytestmark = pytest.mark.filterwarnings("ignore")


class Clips(Dataset):
    """Clips of 16 values; clip 3 of batch 4 is NaN if ``broken``."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> dict:
        video = torch.linspace(0, 1, 16) + index / 10
        return {"video": video * torch.nan if self.broken and index == 19 else video, "id": f"clip {index}"}


class Tiny(lightning.LightningModule):
    def __init__(self, seen: list | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 2)
        self.seen = [] if seen is None else seen

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        self.seen.append((torch.rand(1).item(), random.random(), np.random.rand()))
        return self.layer(batch["video"]).square().mean()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        torch.rand(3), random.random(), np.random.rand()
        self.log("val/first_weight", self.layer.weight[0, 0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def tokens_per_clip(self, batch: dict) -> int:
        return 8

    def media(self, batch: dict) -> dict[str, Tensor]:
        assert not self.training
        noise = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
        return {"two/noise": noise}


def fit(folder: Path, *callbacks: Callback, task: Tiny | None = None, broken: bool = False, **options) -> Tiny:
    torch.manual_seed(0)
    task = task or Tiny()
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "logger": False, **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    loader = DataLoader(Clips(broken), 4)
    trainer.fit(task, loader, DataLoader(Clips(), 4))
    return task


def test_step_seed_makes_steps_independent_of_earlier_random_numbers(tmp_path: Path) -> None:
    plain, validated, other_seed = Tiny(), Tiny(), Tiny()
    fit(tmp_path, StepSeed(5), task=plain, limit_val_batches=0)
    fit(tmp_path, StepSeed(5), task=validated, val_check_interval=2, num_sanity_val_steps=1)
    fit(tmp_path, StepSeed(6), task=other_seed, limit_val_batches=0)
    assert plain.seen == validated.seen
    numbers = [number for draws in plain.seen + other_seed.seen for number in draws]
    assert len(set(numbers)) == len(numbers) == 3 * 2 * 2 * BATCHES


def test_negative_seed_raises() -> None:
    with pytest.raises(ValueError, match="seed=-1"):
        StepSeed(-1)


class Weights(Callback):
    """Records the trained weight after every step and the weight used in validation."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.trained.append(pl_module.layer.weight.detach().clone())

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.validated.append(pl_module.layer.weight.detach().clone())


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_the_average_and_is_used_in_validation(tmp_path: Path, warmup: bool) -> None:
    weights = Weights()
    task = fit(tmp_path, EMA(0.8, warmup), weights, max_epochs=1)
    average = weights.trained[0]
    for n, trained in enumerate(weights.trained[1:], start=1):
        decay = min(0.8, (1 + n) / (10 + n)) if warmup else 0.8
        average = decay * average + (1 - decay) * trained
    torch.testing.assert_close(weights.validated[0], average)
    torch.testing.assert_close(task.layer.weight.detach(), average)
    assert not torch.allclose(average, weights.trained[-1])


def test_ema_of_16_bit_weights_has_32_bits() -> None:
    averaged, weights = [torch.zeros(3)], [torch.ones(3, dtype=torch.bfloat16)]
    ema = EMA(0.999, warmup=False)
    for step in range(100):
        ema._average(averaged, weights, step)
    torch.testing.assert_close(averaged[0], torch.full((3,), 1 - 0.999**100))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_ema_decay_outside_its_range_raises(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"ema\.decay={decay}"):
        EMA(decay)


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    return [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]


class SlowValidation(Callback):
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        time.sleep(0.05)


def test_throughput_excludes_warmup_and_validation(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, Throughput(warmup_steps=2), SlowValidation(), val_check_interval=1, logger=logger, max_epochs=1)
    rows = [row for row in metrics(tmp_path) if row["throughput/clips_per_s"]]
    # Every step is followed by a validation of 0.3 s, after which the clock restarts: a step takes much less.
    assert [int(row["step"]) for row in rows] == [2, 3, 4, 5]
    for row in rows:
        clips_per_s, tokens_per_s = float(row["throughput/clips_per_s"]), float(row["throughput/tokens_per_s"])
        assert clips_per_s > 50
        assert tokens_per_s == pytest.approx(8 * clips_per_s)
        assert "throughput/mfu" not in row


def test_mfu_is_the_fraction_of_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "peak_flops", lambda device, precision: 1e6)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, Throughput(), logger=logger)
    row = next(row for row in metrics(tmp_path) if row["throughput/mfu"])
    # A 16 x 2 matrix, forward and weight gradient: 2 * 2 * 16 * 2 FLOPs per clip.
    assert float(row["throughput/mfu"]) == pytest.approx(float(row["throughput/clips_per_s"]) * 128 / 1e6)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", 989e12),
        ("NVIDIA H100 PCIe", "16-mixed", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-true", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", None),
        ("Some GPU", "bf16-mixed", None),
    ],
)
def test_peak_of_known_devices(monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert callbacks.peak_flops(torch.device("cuda"), precision) == peak
    assert callbacks.peak_flops(torch.device("cpu"), precision) is None


def test_nan_guard_stops_before_the_update_and_names_the_clips(tmp_path: Path) -> None:
    task = Tiny()
    with pytest.raises(FloatingPointError, match=r"step 4: .*loss.* nan .*clip 16, .*clip 19\b"):
        fit(tmp_path, NaNGuard(), task=task, broken=True)
    assert torch.isfinite(task.layer.weight).all()
    record = json.loads((tmp_path / "nan_batch.json").read_text())
    assert record["clip_ids"] == ["clip 16", "clip 17", "clip 18", "clip 19"]
    assert (record["step"], record["epoch"], record["batch"]) == (4, 0, 4)


class BadGradient(Tiny):
    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            self.layer.bias.register_hook(lambda gradient: gradient * torch.inf)
        return loss


def test_nan_guard_checks_the_gradients(tmp_path: Path) -> None:
    task = BadGradient()
    message = r"step 2: .*gradient.* (inf|nan) .*clip 8\b.* trainer\.gradient_clip_val.* optimizer\.lr"
    with pytest.raises(FloatingPointError, match=message):
        fit(tmp_path, NaNGuard(), task=task)
    assert torch.isfinite(task.layer.bias).all()
    assert json.loads((tmp_path / "nan_batch.json").read_text())["parameters"] == ["layer.bias"]


def test_nan_guard_logs_the_norm_before_clipping(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, NaNGuard(), logger=logger, max_epochs=1, gradient_clip_val=1e-3)
    assert all(float(row["train/grad_norm"]) > 0.01 for row in metrics(tmp_path) if row["train/grad_norm"])


def test_norm_is_logged_only_at_the_steps_that_are_checked(tmp_path: Path) -> None:
    fit(tmp_path, NaNGuard(every_n_steps=4), logger=CSVLogger(tmp_path, name="", version=""), max_epochs=1)
    rows = [row for row in metrics(tmp_path) if row["train/grad_norm"]]
    assert [int(row["step"]) for row in rows] == [0, 4]


def test_media_are_saved_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    task = fit(tmp_path, Media(every_n_steps=4, min_side=24), val_check_interval=3, max_epochs=2)
    assert sorted(path.name for path in (tmp_path / "media").glob("*.gif")) == [
        "two_noise_00000003.gif",
        "two_noise_00000009.gif",
        "two_noise_00000012.gif",
    ]
    first, *others = [path.read_bytes() for path in sorted((tmp_path / "media").glob("*.png"))]
    assert others == [first, first], "masks differ between media"
    assert task.training


class ImagesAndClips(Dataset):
    """Alternating batches of 4 single frames and 4 clips, (C, T, H, W) each."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> dict:
        return {"video": torch.full((3, 2 if index // 4 % 2 else 1, 8, 8), float(index))}


class ShowsClips(Tiny):
    def validation_step(self, batch: dict, batch_idx: int) -> None:
        pass

    def media(self, batch: dict) -> dict[str, Tensor]:
        return {"clips": batch["video"][0].transpose(0, 1).byte()}


def test_media_of_the_first_single_frames_and_the_first_clips(tmp_path: Path) -> None:
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[Media(every_n_steps=2 * BATCHES, min_side=8)],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(ShowsClips(), DataLoader(Clips(), 4), DataLoader(ImagesAndClips(), 4))
    saved = {path.stem: Image.open(path) for path in (tmp_path / "media").glob("*.gif")}
    assert sorted(saved) == [f"clips{kind}_{step:08d}" for kind in ("", "_image") for step in (BATCHES, 3 * BATCHES)]
    assert {name: getattr(picture, "n_frames", 1) for name, picture in saved.items() if "_image" in name} == {
        f"clips_image_{step:08d}": 1 for step in (BATCHES, 3 * BATCHES)
    }
    first_of = {name: picture.convert("RGB").getpixel((0, 0))[0] for name, picture in saved.items()}
    assert set(first_of.values()) == {0, 4}
    assert all(value == (0 if "_image" in name else 4) for name, value in first_of.items())


def test_enlarge_repeats_pixels() -> None:
    video = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4)
    large = enlarge(video, 7)
    assert large.shape == (1, 1, 9, 12)
    assert torch.equal(large[:, :, ::3, ::3], video)
    assert torch.equal(large[:, :, 2::3, 2::3], video)
    assert enlarge(video, 3).shape == video.shape


@pytest.mark.parametrize(
    "video", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(2, 8, 8, 3).byte()]
)
def test_invalid_media_raise(video: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"task\.media .*{re.escape(str(tuple(video.shape)))}.*uint8"):
        enlarge(video, 8)


def test_contact_sheet_has_first_and_last_frame() -> None:
    video = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(-1, -1, 10, 10)
    sheet = contact_sheet(video, max_frames=4, max_width=30)
    assert sheet.size == (24, 24)
    assert sheet.getpixel((0, 0)) == (0, 0, 0)
    assert sheet.getpixel((23, 23)) == (19, 19, 19)
