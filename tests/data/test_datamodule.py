"""DataModule: order of the clips, and exact resuming at any batch."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import Dataset

from blueberry_video.data.batches import EvaluationBatches, TrainBatches
from blueberry_video.data.buckets import Buckets
from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.mixture import Mixture
from blueberry_video.data.single_frames import SingleFrames
from blueberry_video.data.sprites import Sprites
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.data.write import FolderWriter


class Numbers(Dataset):
    """Dataset in which clip i contains i and the epoch passed to ``sample``."""

    def __init__(self, size: int):
        self.classes = {"motion": ("left", "right")}
        self.reversal_pairs = {"motion": ((0, 1),)}
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return self.sample(index, epoch=0)

    def sample(self, index: int, epoch: int) -> dict:
        return {"video": torch.full((1, 1, 2, 2), float(index)), "index": index, "epoch": epoch}


class Recorder(LightningModule):
    """Module that records its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int], list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch_idx, batch["epoch"].tolist(), batch["index"].tolist()))
        return (self.weight * batch["video"].mean()).sum()

    def validation_step(self, batch: dict) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class ReadsNumSteps(Recorder):
    """Recorder that reads the number of steps, so that Lightning creates the loader before it loads the checkpoint."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


def fit(folder: Path, module: Recorder, data: DataModule, checkpoint: Path | None = None, **settings) -> Recorder:
    every = settings.pop("every", None)
    callbacks: list[Callback] = [settings.pop("callback")] if "callback" in settings else []
    callbacks += [ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)] if every else []
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        enable_checkpointing=bool(every),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"max_epochs": 3, **settings},
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    return module


def numbers(num_workers: int = 0, size: int = 23, batch_size: int = 4, seed: int = 0) -> DataModule:
    return DataModule(Numbers(size), Numbers(6), batch_size, num_workers, seed)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [3, 7, 10])  # in the middle of epochs 0 and 1, and at the end of epoch 1
def test_resume_continues_the_sequence(tmp_path: Path, num_workers: int, step: int):
    whole = fit(tmp_path / "a", Recorder(), numbers(num_workers), every=1).seen
    assert [batch for batch, _, _ in whole] == [0, 1, 2, 3, 4] * 3
    assert [epochs[0] for _, epochs, _ in whole] == [0] * 5 + [1] * 5 + [2] * 5
    for epoch in range(3):
        shown = [i for _, epochs, indices in whole if epochs[0] == epoch for i in indices]
        assert len(set(shown)) == 20
    resumed = fit(tmp_path / "b", Recorder(), numbers(num_workers), tmp_path / "a" / f"step={step}.ckpt").seen
    assert resumed == whole[step:]


def test_resume_twice_with_a_loader_created_before_the_checkpoint_is_loaded(tmp_path: Path):
    whole = fit(tmp_path / "a", ReadsNumSteps(), numbers(), every=1).seen
    part = fit(tmp_path / "b", ReadsNumSteps(), numbers(), tmp_path / "a" / "step=2.ckpt", every=1, max_steps=4).seen
    rest = fit(tmp_path / "c", ReadsNumSteps(), numbers(), tmp_path / "b" / "step=4.ckpt").seen
    assert part + rest == whole[2:]


class SaveAtEnds(Callback):
    """Saves a checkpoint at the end of every validation and every epoch."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"validation-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.global_step}.ckpt")


@pytest.mark.parametrize("moment", ["validation", "epoch"])
def test_resume_at_the_end_of_an_epoch_and_in_the_next(tmp_path: Path, moment: str):
    whole = fit(tmp_path / "a", Recorder(), numbers(), callback=SaveAtEnds(tmp_path / "a")).seen
    end = tmp_path / "a" / f"{moment}-5.ckpt"
    second = SaveAtEnds(tmp_path / "b")
    assert fit(tmp_path / "b", Recorder(), numbers(), end, every=1, callback=second).seen == whole[5:]
    assert fit(tmp_path / "c", Recorder(), numbers(), tmp_path / "b" / "step=7.ckpt").seen == whole[7:]
    # a run resumed after the validation finishes the epoch without reading a batch, and saves again
    if moment == "validation":
        assert fit(tmp_path / "d", Recorder(), numbers(), tmp_path / "b" / "epoch-5.ckpt").seen == whole[5:]


def test_limited_epochs_resume(tmp_path: Path):
    whole = fit(tmp_path / "a", Recorder(), numbers(), every=1, limit_train_batches=3).seen
    assert [epochs[0] for _, epochs, _ in whole] == [0] * 3 + [1] * 3 + [2] * 3
    resumed = fit(tmp_path / "b", Recorder(), numbers(), tmp_path / "a" / "step=4.ckpt", limit_train_batches=3).seen
    assert resumed == whole[4:]


def test_second_fit_of_a_datamodule_starts_from_the_beginning(tmp_path: Path):
    data = numbers()
    first = fit(tmp_path / "a", Recorder(), data, every=1).seen
    fit(tmp_path / "b", Recorder(), data, tmp_path / "a" / "step=7.ckpt")
    assert fit(tmp_path / "c", Recorder(), data).seen == first


def test_changed_order_raises(tmp_path: Path):
    fit(tmp_path, Recorder(), numbers(), every=1)
    for changed, expected in (
        (numbers(batch_size=5), r"global_batch was 4 and is 5\b"),
        (numbers(seed=1), r"seed was 0 and is 1\b"),
        (numbers(size=24), r"clips was 23 and is 24\b"),
    ):
        with pytest.raises(ValueError, match=rf"\b2 batches of epoch 1\b.*{expected}"):
            fit(tmp_path / "b", Recorder(), changed, tmp_path / "step=7.ckpt")


def test_between_epochs_the_order_may_change(tmp_path: Path):
    fit(tmp_path, Recorder(), numbers(), callback=SaveAtEnds(tmp_path))
    position = torch.load(tmp_path / "epoch-10.ckpt", weights_only=False)["DataModule"]
    assert (position["epoch"], position["batches"]) == (2, 0)
    seen = fit(tmp_path / "b", Recorder(), numbers(batch_size=11), tmp_path / "epoch-10.ckpt").seen
    assert [(epochs[0], len(indices)) for _, epochs, indices in seen] == [(2, 11), (2, 11)]


class PixelRecorder(Recorder):
    """Module that records ids, labels and pixels."""

    def __init__(self):
        super().__init__()
        self.batches: list[dict] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        return (self.weight * batch["video"].float().mean()).sum()

    def validation_step(self, batch: dict) -> None:
        self.validated += batch["id"]


def omni(num_workers: int = 0, images: int = 20, shares: tuple[float, float] = (0.4, 0.6)) -> DataModule:
    """Mixture with seven batches per epoch: three of images, four of clips."""
    train = Mixture(
        {"image": SingleFrames(Sprites("train", images, 4, 8)), "clip": Sprites("train", 10, 4, 8)},
        dict(zip(("image", "clip"), shares)),
    )
    val = Mixture({"image": SingleFrames(Sprites("val", 5, 4, 8)), "clip": Sprites("val", 3, 4, 8)})
    return DataModule(train, val, batch_size=4, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_mixture_resumes_bit_identically_in_mid_epoch(tmp_path: Path, num_workers: int):
    whole = fit(tmp_path / "a", PixelRecorder(), omni(num_workers), every=1)
    assert len(whole.batches) == 21
    assert [len(batch["video"][0]) for batch in whole.batches].count(1) == 9
    assert sorted(whole.validated[-8:]) == sorted(set(whole.validated))
    resumed = fit(tmp_path / "b", PixelRecorder(), omni(num_workers), tmp_path / "a" / "step=10.ckpt").batches
    for batch, expected in zip(resumed, whole.batches[10:], strict=True):
        assert batch["id"] == expected["id"]
        assert torch.equal(batch["video"], expected["video"])
        assert batch["labels"].keys() == expected["labels"].keys()


def test_changed_mixture_raises(tmp_path: Path):
    fit(tmp_path, PixelRecorder(), omni(), every=1, max_epochs=1)
    with pytest.raises(ValueError, match=r"\b3 batches of epoch 0\b.*shares was .*0\.4.* and is .*0\.5"):
        fit(tmp_path / "b", PixelRecorder(), omni(shares=(0.5, 0.5)), tmp_path / "step=3.ckpt")
    with pytest.raises(ValueError, match=r"clips was 30 and is 31 and part_sizes was"):
        fit(tmp_path / "b", PixelRecorder(), omni(images=21), tmp_path / "step=3.ckpt")


def test_validation_shows_every_clip_once(tmp_path: Path):
    module = fit(tmp_path, Recorder(), numbers(), max_epochs=1, num_sanity_val_steps=0)
    assert module.validated == list(range(6))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_does_not_use_the_global_random_state(tmp_path: Path, num_workers: int):
    writer = FolderWriter({"train": Sprites("train", 8, image_size=16)}, num_workers=num_workers)
    clips = CachedClips(VideoFolder(tmp_path / "d", 16, make=writer), tmp_path / "cache", shard_size=4)
    data = DataModule(clips, clips, batch_size=4, num_workers=num_workers)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    writer(tmp_path / "again")
    data.prepare_data()
    assert len(list(data.train_dataloader())) == len(list(data.val_dataloader())) == 2
    assert torch.equal(torch.get_rng_state(), state)


class Described(Numbers):
    """Dataset that records what the DataModule calls."""

    def __init__(self, size: int, name: str):
        super().__init__(size)
        self.name, self.skipped_file, self.prepared = name, None, []
        self.classes = {"motion": ("x", "y", "z")[: size // 3]}

    def prepare(self, num_workers: int) -> None:
        self.prepared.append(num_workers)

    def describe(self) -> str:
        return f"clips of {self.name}"


def test_all_datasets_are_prepared_described_and_list_skipped_files(capsys: pytest.CaptureFixture[str]):
    train, val, test = (Described(size, name) for size, name in ((9, "a"), (5, "b"), (7, "c")))
    data = DataModule(train, val, batch_size=4, val_batch_size=2, test=test)
    data.list_skipped_in("skipped.csv")
    data.prepare_data()
    assert {part.skipped_file for part in (train, val, test)} == {"skipped.csv"}
    assert all(len(part.prepared) == 1 and part.prepared[0] >= 1 for part in (train, val, test))
    data.setup("test")
    assert capsys.readouterr().out == ""
    data.setup("fit")
    assert capsys.readouterr().out.splitlines() == ["training: clips of a", "validation: clips of b"]
    assert data.classes == {"motion": ("x", "y", "z")}  # those of the training set
    assert [len(batch["index"]) for batch in data.train_dataloader()] == [4, 4]
    assert [batch["index"].tolist() for batch in data.val_dataloader()] == [[0, 1], [2, 3], [4]]
    assert [batch["index"].tolist() for batch in data.test_dataloader()] == [[0, 1], [2, 3], [4, 5], [6]]
    plain = DataModule(Numbers(4), Numbers(2), batch_size=2)  # without these methods, and without a test set
    plain.list_skipped_in("skipped.csv")
    plain.prepare_data()
    plain.setup("fit")
    assert capsys.readouterr().out == ""
    assert [batch["index"].tolist() for batch in plain.val_dataloader()] == [[0, 1]]
    with pytest.raises(ValueError, match=r"data\.test\b"):
        plain.test_dataloader()


def epoch_of(batches: TrainBatches, epoch: int) -> list[list[int]]:
    batches.set_epoch(epoch)
    return [[index for _, index in batch] for batch in batches]


def test_order_depends_only_on_seed_and_epoch():
    assert epoch_of(TrainBatches(50, 4, seed=3), 2) == epoch_of(TrainBatches(50, 4, seed=3), 2)
    assert epoch_of(TrainBatches(50, 4, seed=3), 2) != epoch_of(TrainBatches(50, 4, seed=3), 1)
    assert epoch_of(TrainBatches(50, 4, seed=3), 2) != epoch_of(TrainBatches(50, 4, seed=4), 2)


def parts() -> dict[str, range]:
    return {"a": range(40), "b": range(17), "c": range(25)}


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (range(83), "dfc0546c29505b3d"),
        (Mixture(parts(), {"a": 1, "b": 3, "c": 0.2}), "0eb569a721d48393"),
        (Buckets(parts(), dict.fromkeys("abc", (1, 2, 3)), {"a": 10, "b": 4, "c": 7}, 21), "adf46210b5fe1fe0"),
    ],
    ids=["plain", "mixture", "buckets"],
)
def test_batches_match_the_pinned_hashes(dataset, expected: str):
    """A changed hash changes the order of every seeded run."""
    data = DataModule(dataset, dataset, batch_size=4, seed=3)
    train = data.train_dataloader().batch_sampler
    train.set_epoch(2)
    batches = [list(train), list(data.val_dataloader().batch_sampler)]
    assert hashlib.sha256(json.dumps(batches).encode()).hexdigest()[:16] == expected


def test_two_ranks_with_half_the_batch_size_share_global_batches():
    one = epoch_of(TrainBatches(50, 8, seed=0), 1)
    ranks = [TrainBatches(50, 4, seed=0, rank=r, world_size=2) for r in range(2)]
    for batches in ranks:
        batches.resume_at = (1, 2)
    first, second = (epoch_of(batches, 1) for batches in ranks)
    assert [a + b for a, b in zip(first, second, strict=True)] == one[2:]
    assert len(ranks[0]) == len(one) == 6  # the length is that of the whole epoch
    assert len(epoch_of(ranks[0], 2)) == 6  # and the next epoch starts at its first batch


def test_last_batch_is_kept_and_divides_among_ranks():
    ranks = [epoch_of(TrainBatches(21, 4, seed=0, rank=r, world_size=2, drop_last=False), 0) for r in range(2)]
    assert [len(batch) for batch in ranks[0]] == [len(batch) for batch in ranks[1]] == [4, 4, 3]
    assert {i for batches in ranks for batch in batches for i in batch} == set(range(21))


@pytest.mark.parametrize(("size", "world_size"), [(100, 1), (101, 2), (7, 3), (64, 4)])
def test_evaluation_shows_every_clip_once_with_the_same_number_of_batches_per_rank(size: int, world_size: int):
    ranks = [list(EvaluationBatches(size, 8, rank, world_size)) for rank in range(world_size)]
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(size))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(1 <= len(batch) <= 8 for batches in ranks for batch in batches)


def test_invalid_sizes_raise():
    with pytest.raises(ValueError, match=r"\b10 clips.*\b16\b.*data\.batch_size=8 on 2 ranks.*data\.drop_last=false"):
        TrainBatches(10, 8, seed=0, world_size=2)
    with pytest.raises(ValueError, match=r"data\.batch_size=0\b.*\b1\b"):
        numbers(batch_size=0)
    with pytest.raises(ValueError, match=r"evaluation set of 1 clips.*\b2 ranks"):
        EvaluationBatches(1, 8, world_size=2)
    with pytest.raises(ValueError, match=r"data\.test\b"):
        numbers().test_dataloader()


def test_classes_and_reversal_pairs_are_those_of_the_training_set():
    assert numbers().classes == {"motion": ("left", "right")}
    assert numbers().reversal_pairs == {"motion": ((0, 1),)}
