"""RandAugment against Pillow, called as the published recipes call it."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageEnhance, ImageOps

from blueberry_video.rand_augment import OPERATIONS, STRENGTHS, Operation, RandAugment, apply_operations

ROOT = Path(__file__).resolve().parents[1]


def affine(a: float, b: float, c: float, d: float, e: float, f: float):
    how = {"resample": Image.Resampling.BICUBIC, "fillcolor": (128, 128, 128)}
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), **how)


# Rule of `rand-m7-n4-mstd0.5-inc1`: the operation of Pillow at a magnitude from 0 to 10, and a sign, of a size (w, h).
RULES = {
    "auto_contrast": lambda m, sign, size: ImageOps.autocontrast,
    "equalize": lambda m, sign, size: ImageOps.equalize,
    "invert": lambda m, sign, size: ImageOps.invert,
    "rotate": lambda m, sign, size: (
        lambda image: image.rotate(sign * m / 10 * 30.0, resample=Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))
    ),
    "posterize": lambda m, sign, size: lambda image: ImageOps.posterize(image, 4 - int(m / 10 * 4)),
    "solarize": lambda m, sign, size: lambda image: ImageOps.solarize(image, 256 - int(m / 10 * 256)),
    "solarize_add": lambda m, sign, size: (
        lambda image: image.point(
            [min(255, level + int(m / 10 * 110)) if level < 128 else level for level in range(256)] * 3
        )
    ),
    "color": lambda m, sign, size: lambda image: ImageEnhance.Color(image).enhance(1 + sign * (m / 10 * 0.9)),
    "contrast": lambda m, sign, size: lambda image: ImageEnhance.Contrast(image).enhance(1 + sign * (m / 10 * 0.9)),
    "brightness": lambda m, sign, size: lambda image: ImageEnhance.Brightness(image).enhance(1 + sign * (m / 10 * 0.9)),
    "sharpness": lambda m, sign, size: lambda image: ImageEnhance.Sharpness(image).enhance(1 + sign * (m / 10 * 0.9)),
    "shear_x": lambda m, sign, size: affine(1, sign * (m / 10 * 0.3), 0, 0, 1, 0),
    "shear_y": lambda m, sign, size: affine(1, 0, 0, sign * (m / 10 * 0.3), 1, 0),
    "translate_x": lambda m, sign, size: affine(1, 0, sign * (m / 10 * 0.45) * size[0], 0, 1, 0),
    "translate_y": lambda m, sign, size: affine(1, 0, 0, 0, 1, sign * (m / 10 * 0.45) * size[1]),
}


def clips() -> dict[str, np.ndarray]:
    """Clips uint8 (T, H, W, 3): noise, gradients whose levels differ between frames, one color, and tiny frames."""
    rng = np.random.default_rng(0)
    across, down = np.meshgrid(np.linspace(20, 180, 41), np.linspace(0, 90, 30))
    smooth = np.stack([across, down, across / 2], axis=-1)
    return {
        "noise": rng.integers(0, 256, (3, 30, 41, 3)).astype(np.uint8),
        "smooth": np.stack([smooth + 20 * frame for frame in range(3)]).astype(np.uint8),
        "constant": np.full((2, 17, 23, 3), 77, np.uint8),
        "tiny": rng.integers(0, 256, (2, 2, 5, 3)).astype(np.uint8),
        "narrow": rng.integers(90, 139, (2, 6, 7, 3)).astype(np.uint8),
    }


def by_pillow(frames: np.ndarray, name: str, magnitude: float, sign: int) -> np.ndarray:
    operation = RULES[name](magnitude, sign, (frames.shape[2], frames.shape[1]))
    return np.stack([np.asarray(operation(Image.fromarray(frame))) for frame in frames])


def channels_first(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames.copy()).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", RULES)
def test_pixels_are_those_of_pillow(name):
    """Every operation at every strength, with both signs, is bit-identical."""
    assert RULES.keys() == OPERATIONS.keys() == STRENGTHS.keys()
    changed = False
    for frames in clips().values():
        for magnitude in (0.0, 0.3, 3.7, 5.0, 7.0, 7.6, 8.123, 9.9):
            for sign in (1, -1):
                expected = by_pillow(frames, name, magnitude, sign)
                strength = STRENGTHS[name](magnitude / 10, float(sign))
                got = apply_operations(channels_first(frames), [Operation(name, strength)])
                assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), expected), (magnitude, sign)
                changed |= not np.array_equal(expected, frames)
    assert changed


def test_at_the_greatest_magnitude_posterization_is_black():
    """All bits are dropped, which recent versions of Pillow refuse."""
    frames = channels_first(clips()["noise"])
    assert not apply_operations(frames, [Operation("posterize", STRENGTHS["posterize"](1.0, 1.0))]).any()


def test_clips_are_those_of_the_rule_for_the_same_random_numbers():
    """Order, magnitudes and signs of a whole clip, from the drawn numbers, with rounding to levels in between."""
    frames = clips()["noise"]
    video = channels_first(frames).transpose(0, 1)[None].float() / 255
    names = tuple(RULES)
    for seed in range(30):
        torch.manual_seed(seed)
        got = RandAugment()(video)
        torch.manual_seed(seed)
        expected, number = frames, 0
        for _ in range(4):
            name = names[int(torch.randint(15, ()))]
            chance, sign = torch.rand(2).tolist()
            magnitude = min(max(7 + 0.5 * torch.randn(()).item(), 0.0), 10.0)
            if chance < 0.5:
                expected, number = by_pillow(expected, name, magnitude, -1 if sign < 0.5 else 1), number + 1
        assert torch.equal((got[0] * 255).round().to(torch.uint8), channels_first(expected).transpose(0, 1)), seed


def test_operations_are_drawn_evenly_half_of_the_time_at_a_normal_magnitude():
    torch.manual_seed(0)
    drawn = [operation for _ in range(3000) for operation in RandAugment().draw()]
    assert len(drawn) == pytest.approx(6000, abs=200)
    counts = Counter(operation.name for operation in drawn)
    assert counts.keys() == RULES.keys()
    assert max(counts.values()) < 500
    assert min(counts.values()) > 300
    degrees = torch.tensor([operation.strength for operation in drawn if operation.name == "rotate"])
    assert degrees.abs().mean().item() == pytest.approx(21, abs=0.5)
    assert degrees.abs().std().item() == pytest.approx(1.5, abs=0.3)
    assert (degrees > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    strong = RandAugment(10.0, magnitude_std=5.0, probability=1.0)
    factors = [op.strength for _ in range(500) for op in strong.draw() if op.name == "brightness"]
    assert {round(min(factors), 6), round(max(factors), 6)} == {0.1, 1.9}  # clipped at magnitude 10


def test_frames_of_a_clip_are_changed_alike_and_clips_differ():
    torch.manual_seed(0)
    video = torch.rand(1, 3, 1, 24, 24).expand(8, 3, 4, 24, 24)
    out = RandAugment(probability=1.0)(video)
    assert out.shape == video.shape
    for frame in range(1, 4):
        assert torch.equal(out[:, :, frame], out[:, :, 0])
    assert len(torch.unique(out.flatten(1), dim=0)) == 8
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.equal(RandAugment(probability=0.0)(video), (video * 255).round() / 255)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_kept(dtype):
    levels = torch.randint(256, (1, 3, 2, 8, 8))
    out = RandAugment(probability=0.0)((levels / 255).to(dtype))
    assert out.dtype == dtype


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"magnitude": 10.5}, r"augment\.magnitude=10\.5"),
        ({"magnitude": -1.0}, r"augment\.magnitude=-1\.0"),
        ({"magnitude_std": -0.1}, r"augment\.magnitude_std=-0\.1"),
        ({"num_ops": 0}, r"augment\.num_ops=0"),
        ({"probability": 1.5}, r"augment\.probability=1\.5"),
    ],
)
def test_bad_arguments_raise(options, text):
    with pytest.raises(ValueError, match=text):
        RandAugment(**options)


def test_videos_without_three_channels_raise():
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 8, 8\)"):
        RandAugment()(torch.rand(2, 1, 4, 8, 8))


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("conf/task/finetuning.yaml", ("input", "augment", "_args_")),
        ("experiments/vjepa2_anticipation/config.yaml", ("task", "input", "augment", "_args_")),
    ],
)
def test_published_recipes_augment_whole_frames_first(file, path):
    steps = yaml.safe_load((ROOT / file).read_text())
    for key in path:
        steps = steps[key]
    first = {**steps[0]}
    assert first.pop("_target_") == "blueberry_video.rand_augment.RandAugment"
    published = RandAugment(**first)
    assert (published.magnitude, published.num_ops, published.magnitude_std, published.probability) == (7, 4, 0.5, 0.5)
    assert steps[1]["_target_"].endswith("RandomResizedCrop")
