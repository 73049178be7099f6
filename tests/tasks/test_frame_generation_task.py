"""Task of token generators: logged metrics, corruption, conditioning of batches, samples, learning and errors."""

import math
import zlib
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from blueberry_video.config import check_classes
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.inference.frame_generation import FrameDecoding
from blueberry_video.masking import corrupt_frames
from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.optim import constant
from blueberry_video.tasks.frame_conditions import conditioning_of
from blueberry_video.tasks.frame_generation import FrameGeneration
from blueberry_video.tasks.settings import Optimization

V, GRID, T = 8, (4, 4), 8


class Brightness(nn.Module):
    """Tokenizer stand-in: the quantized mean of patches of 4 x 4 pixels, with a weight that must not be trained."""

    vocabulary = V

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def check(self, num_frames: int, height: int, width: int) -> None:
        if height % 4:
            raise ValueError(f"height={height} must be a multiple of 4: use {height // 4 * 4}.")

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return num_frames, height // 4, width // 4

    def encode_ids(self, video: Tensor) -> Tensor:
        means = nn.functional.avg_pool3d(video.mean(1, keepdim=True), (1, 4, 4))[:, 0]
        return ((means + 1) / 2 * V).long().clamp(0, V - 1)

    def decode_ids(self, ids: Tensor) -> Tensor:
        pixels = ((ids + 0.5) / V * 2 - 1) * self.scale
        return pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, None].expand(-1, 3, -1, -1, -1)


def generator(**changes) -> HydraVideoGenerator:
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depth": 2, "head_dim": 8, "state_dim": 4, "mlp_ratio": 1.0, "memory_frames": 8}
    return HydraVideoGenerator(V, GRID, **{**options, **changes})


def task(model: HydraVideoGenerator | None = None, lr: float = 3e-3, **changes) -> FrameGeneration:
    options = {"tokenizer": Brightness(), "decoding": FrameDecoding(1, "frame"), "num_pictures": 2, **changes}
    optimization = Optimization(partial(torch.optim.AdamW, lr=lr), constant)
    return FrameGeneration(model or generator(), optimization, **options)


def data(val: int = 6) -> DataModule:
    return DataModule(MovingShapes("train", 1, 8), MovingShapes("val", 1, val), batch_size=4)


def batch(size: int = 3) -> dict:
    clips = [MovingShapes("train", 1)[index] for index in range(size)]
    video = torch.stack([clip["video"] for clip in clips]).transpose(1, 2).contiguous().float() / 255
    return {"video": video, "id": [clip["id"] for clip in clips], "caption": [clip["caption"] for clip in clips]}


def test_training_logs_documented_metrics_and_leaves_the_tokenizer(trainer):
    module, fit = task(generator(text=WordText(6, pooled_dim=5)), condition_dropout=0.5), trainer(max_steps=3)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    fit.fit(module, datamodule=data())
    names = ["loss", "accuracy", "accuracy_later", "accuracy_copy", "accuracy_frequent", "loss_unconditional"]
    logged = fit.logged_metrics.keys() | fit.callback_metrics.keys()
    assert {"train/loss", *(f"val/{name}" for name in names)} <= logged
    unchanged = {name for name, value in module.named_parameters() if torch.equal(value, before[name])}
    assert unchanged == set()
    assert not any("tokenizer" in name for name in module.state_dict())
    assert module.tokenizer.scale == 1
    assert not module.tokenizer.scale.requires_grad
    assert module.model.text.vocabulary  # learned from the captions


def test_validation_metrics_equal_the_formulas(trainer):
    module, clips, fit = task(visible_weight=0.25).eval(), data(), trainer()
    for parameter in module.model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    fit.validate(module, clips, verbose=False)
    logged = {name.removeprefix("val/"): value.item() for name, value in fit.callback_metrics.items()}
    fit.validate(module, DataModule(clips.train, clips.val, 1), verbose=False)
    again = {name.removeprefix("val/"): value.item() for name, value in fit.callback_metrics.items()}
    correct, copied, codes = [], [], []
    for raw in clips.val_dataloader():
        ids = module.tokenizer.encode_ids(raw["video"].transpose(1, 2) / 127.5 - 1)
        seeds = [zlib.crc32(name.encode()) for name in raw["id"]]
        corrupted, masked = corrupt_frames(ids, V, 0.1, [torch.Generator().manual_seed(seed) for seed in seeds])
        with torch.no_grad():
            guess = module.model.teacher_forced(ids, corrupted).argmax(-1)
        correct.append((guess == ids)[masked])
        copied.append((ids[:, :-1] == ids[:, 1:])[masked[:, 1:]])
        codes.append(ids.flatten())
    assert logged["accuracy"] == pytest.approx(torch.cat(correct).float().mean().item())
    assert logged["accuracy_copy"] == pytest.approx(torch.cat(copied).float().mean().item())
    share = torch.cat(codes).bincount().max().item() / len(torch.cat(codes))
    assert logged["accuracy_frequent"] == pytest.approx(share)
    for name in ("accuracy", "accuracy_later", "accuracy_copy", "accuracy_frequent"):
        assert again[name] == pytest.approx(logged[name])  # does not depend on the batch size
    assert "loss_unconditional" not in logged


def test_the_loss_weighs_visible_tokens():
    module = task(visible_weight=0.5)
    logits, ids = torch.randn(1, 1, *GRID, V), torch.randint(V, (1, 1, *GRID))
    masked = torch.rand(ids.shape) < 0.5
    losses = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    weight = masked + 0.5 * ~masked
    torch.testing.assert_close(module._loss(logits, ids, masked), (losses * weight).sum() / weight.sum())


def test_a_repeated_video_is_learned_and_continued():
    torch.manual_seed(0)
    model = generator(num_classes={"kind": 2})
    module = task(model, substitute=0.0, condition_dropout=0.0, decoding=FrameDecoding(2, "row", temperature=0))
    patterns = torch.randint(V, (2, 1, *GRID)).expand(-1, 4, -1, -1)
    clips = {"tokens": patterns, "labels": {"kind": torch.arange(2)}, "id": ["a", "b"]}
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(80):
        loss = module.shared_step(clips, "train")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    given = Conditioning({"kind": torch.arange(2)})
    assert torch.equal(module.generate_ids(given, 4), patterns)
    assert torch.equal(module.generate_ids(given, 6, prompt=patterns[:, :2])[:, :4], patterns)


def test_corruption_of_frames():
    torch.manual_seed(0)
    ids = torch.randint(V, (500, 4, *GRID))
    corrupted, masked = corrupt_frames(ids, V, 0.25)
    assert torch.equal(corrupted == V, masked)
    share = masked.flatten(2).float().mean(2)
    assert share.min() == 1 / 16
    assert share.max() == 1
    assert share.mean().item() == pytest.approx(2 / math.pi + 0.5 / 16, abs=0.02)  # mean cosine, rounded up
    assert share.std(1).mean() > 0.2  # independent per frame
    changed = (corrupted != ids)[~masked].float().mean().item()
    assert changed == pytest.approx(0.25 * (1 - 1 / V), abs=0.01)
    plain, masked = corrupt_frames(ids, V, 0.0)
    assert torch.equal(plain[~masked], ids[~masked])


def test_corruption_with_generators_does_not_depend_on_the_batch():
    ids = torch.randint(V, (3, 2, *GRID))
    seeded = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = corrupt_frames(ids, V, 0.2, seeded)
    alone = corrupt_frames(ids[1:2], V, 0.2, [torch.Generator().manual_seed(1)])
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone))
    with pytest.raises(ValueError, match=r"2 generators for 3 clips"):
        corrupt_frames(ids, V, 0.2, seeded[:2])


def test_media_has_clips_reconstructions_generated_and_continued_clips():
    module = task(prompt_frames=3)
    videos = module.media(batch())
    assert {name: video.shape for name, video in videos.items()} == {
        "generated": (T, 3, 2 * 17, 3 * 17),
        "continued": (T, 3, 2 * 17, 2 * 17),
    }
    given = batch()
    ids = module.tokens_of(given)[:2]
    expected = module.panels([given["video"][:2], (module.tokenizer.decode_ids(ids) + 1) / 2])
    assert torch.equal(videos["generated"][..., : 2 * 17], expected)
    assert torch.equal(videos["continued"][:3], expected[:3])  # the prompt
    assert set(task(prompt_frames=T).media(batch())) == {"generated"}
    assert task(tokenizer=None).media(batch()) == {}


def test_media_follows_the_actions_and_classes_of_the_clips():
    module = task(generator(num_classes={"motion": 4}, num_actions=3, actions_per_frame=1))
    given = {**batch(), "labels": {"motion": torch.tensor([0, 1, 2])}, "actions": torch.randint(3, (3, T - 1))}
    assert set(module.media(given)) == {"generated", "continued"}


def test_stored_tokens_need_no_tokenizer_and_count_once():
    module = task(tokenizer=None)
    stored = module.on_after_batch_transfer({"tokens": torch.randint(V, (2, 5, *GRID)), "id": ["a", "b"]}, 0)
    assert stored["video"].shape == (2, 1, 5, *GRID)
    assert module.shared_step(stored, "train")["loss"].isfinite()
    assert module.tokens_per_clip(stored) == 5 * 16
    assert task().tokens_per_clip(batch()) == T * 16
    with pytest.raises(ValueError, match=r"task.tokenizer=null"):
        module.tokens_of(batch())


def test_conditioning_of_a_batch():
    model = generator(num_classes={"motion": 4, "unused": None}, text_dim=5, num_actions=3, actions_per_frame=2)
    given = {
        "labels": {"motion": torch.tensor([1, 3]), "shape": torch.tensor([0, 1])},
        "text_pooled": torch.randn(2, 5),
        "actions": torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]),
    }
    conditioning = conditioning_of(model, given, 3)
    assert set(conditioning.labels) == {"motion"}
    assert torch.equal(conditioning.text, given["text_pooled"])
    assert conditioning.actions.tolist() == [[[0, 1], [2, 0]], [[2, 2], [1, 0]]]
    assert conditioning_of(generator(), given, 3) == Conditioning()
    first = conditioning.first(1)
    assert (first.labels["motion"].tolist(), first.actions.tolist()) == ([1], [[[0, 1], [2, 0]]])
    with pytest.raises(ValueError, match=r"4 actions, but 4 frames.*actions_per_frame=2 require 6\b"):
        conditioning_of(model, given, 4)
    with pytest.raises(ValueError, match=r"no motion, caption, actions\b"):
        conditioning_of(model, {}, 3)


def test_a_tokenizer_can_be_built_when_the_run_begins(trainer):
    built = []

    def build() -> Brightness:
        built.append(Brightness())
        return built[-1]

    module = task(tokenizer=build)
    assert built == []
    trainer(max_steps=1).fit(module, datamodule=data())
    assert built == [module.tokenizer]


def test_weights_of_a_run_are_loaded(trainer, tmp_path):
    module, other = task(), task()
    fit = trainer(max_steps=2)
    fit.fit(module, datamodule=data())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    other.load_weights(tmp_path / "run.ckpt")
    for a, b in zip(module.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"HydraVideoGenerator.*blocks.1"):
        task(generator(depth=1)).load_weights(tmp_path / "run.ckpt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"substitute": 1.5}, r"task.substitute=1.5"),
        ({"condition_dropout": -0.1}, r"task.condition_dropout=-0.1"),
        ({"visible_weight": -1}, r"task.visible_weight=-1"),
        ({"prompt_frames": 0}, r"task.prompt_frames=0"),
    ],
)
def test_bad_settings_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        task(**changes)


def test_a_tokenizer_of_a_different_vocabulary_or_grid_raises(trainer):
    for model in (HydraVideoGenerator(9, GRID, 16, 1, head_dim=8), HydraVideoGenerator(V, (2, 4), 16, 1, head_dim=8)):
        with pytest.raises(ValueError, match=r"set model.vocabulary=8 model.grid=\[4, 4\]"):
            trainer(max_steps=1).fit(task(model), datamodule=data())


def test_labels_without_classes_need_no_data():
    check_classes({"motion": None}, {})
    with pytest.raises(ValueError, match=r"num_classes.shape"):
        check_classes({"motion": None, "shape": 3}, {"motion": ["left"]})
