"""Parity of patches, grids and times with the video processors of transformers.

These import torchvision, which is optional: they run in a separate process with a stub torchvision that implements only
the four functions they call, so that other tests are unaffected.
"""

import enum
import importlib
import importlib.machinery
import importlib.util
import multiprocessing
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blueberry_video.video.formats import FormatOptions, PixelValues, format_frames, to_huggingface, to_patches

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is missing")

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
QWEN2 = ("qwen2_vl.video_processing_qwen2_vl", "Qwen2VLVideoProcessor")
QWEN3 = ("qwen3_vl.video_processing_qwen3_vl", "Qwen3VLVideoProcessor")

Reference = Callable[..., dict[str, np.ndarray]]


class InterpolationMode(enum.Enum):
    """Names used in the table of resampling filters of transformers."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BOX = "box"
    BILINEAR = "bilinear"
    HAMMING = "hamming"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    mean, std = (torch.as_tensor(numbers, dtype=image.dtype)[:, None, None] for numbers in (mean, std))
    return (image.sub_(mean) if inplace else image.sub(mean)).div_(std)


def resize(image: Tensor, size: tuple[int, int], interpolation: Any, antialias: bool) -> Tensor:
    assert tuple(image.shape[-2:]) == tuple(size), "the frames in these tests already have their final size"
    return image


def crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    return image[..., top : top + height, left : left + width]


def install_torchvision() -> None:
    """Initializes the reference process with a stub torchvision."""
    torch.set_num_threads(1)
    folders = ["torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.v2"]
    for name in (*folders, "torchvision.transforms.functional", "torchvision.transforms.v2.functional"):
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__, module.__version__ = [], "0.28.0"
        module.InterpolationMode, module.pil_to_tensor = InterpolationMode, None
        module.normalize, module.resize, module.crop, module.grayscale_to_rgb = normalize, resize, crop, lambda x: x
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def processed(module: str, name: str, video: np.ndarray, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """Output of a processor for a video (T, 3, H, W), with its defaults and these arguments."""
    processor = getattr(importlib.import_module(f"transformers.models.{module}"), name)()
    batch = processor(torch.from_numpy(video), return_tensors="pt", **arguments)
    return {key: value.numpy() for key, value in batch.items()}


def qwen3_timestamps(indices: list[int], fps: float, temporal_patch_size: int) -> list[float]:
    processor = importlib.import_module("transformers.models.qwen3_vl.processing_qwen3_vl").Qwen3VLProcessor
    return processor._calculate_timestamps(None, list(indices), fps, temporal_patch_size)


def sampled_fps(total: int, fps: float, indices: list[int]) -> float:
    metadata = importlib.import_module("transformers.video_utils").VideoMetadata
    return metadata(total_num_frames=total, fps=fps, frames_indices=indices).sampled_fps


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    """Calls one of the functions above in the reference process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=install_torchvision) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


def noise(num_frames: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (num_frames, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("processor", "patch_size", "numbers"), [(QWEN2, 14, CLIP), (QWEN3, 16, HALF)], ids=["qwen2-vl", "qwen3-vl"]
)
@pytest.mark.parametrize(
    ("num_frames", "rows", "columns"), [(1, 1, 1), (2, 3, 1), (5, 2, 3), (8, 1, 5), (7, 4, 2)], ids=str
)
def test_patches_equal_transformers(
    reference: Reference,
    processor: tuple[str, str],
    patch_size: int,
    numbers: dict,
    num_frames: int,
    rows: int,
    columns: int,
):
    frames = noise(num_frames, rows * 2 * patch_size, columns * 2 * patch_size)
    expected = reference(processed, *processor, frames.numpy(), {"do_resize": False, "do_sample_frames": False})
    values = PixelValues("float32", rescale=True, **numbers)
    found = to_huggingface(frames, torch.arange(num_frames).double(), values, patch_size)
    assert found["video_grid_thw"].dtype == torch.int64
    assert np.array_equal(found["video_grid_thw"].numpy(), expected["video_grid_thw"])
    assert found["pixel_values_videos"].shape == expected["pixel_values_videos"].shape
    assert np.abs(found["pixel_values_videos"].numpy() - expected["pixel_values_videos"]).max() <= 1e-5


@pytest.mark.parametrize("temporal_patch_size", [1, 3])
@pytest.mark.parametrize("merge_size", [1, 3])
def test_other_patch_sizes(reference: Reference, temporal_patch_size: int, merge_size: int):
    frames = noise(4, 12 * merge_size, 6 * merge_size)
    sizes = {"patch_size": 6, "merge_size": merge_size, "temporal_patch_size": temporal_patch_size}
    expected = reference(processed, *QWEN2, frames.numpy(), {"do_resize": False, **sizes})["pixel_values_videos"]
    found = to_patches(frames, PixelValues("float32", rescale=True, **CLIP), **sizes)
    assert found.shape == expected.shape
    assert np.abs(found.numpy() - expected).max() <= 1e-5


def test_rescaling_only(reference: Reference):
    frames = noise(3, 28, 56)
    arguments = {"do_resize": False, "do_normalize": False}
    expected = reference(processed, *QWEN2, frames.numpy(), arguments)["pixel_values_videos"]
    assert np.abs(to_patches(frames).numpy() - expected).max() <= 1e-6


@pytest.mark.parametrize(("processor", "patch_size"), [(QWEN2, 14), (QWEN3, 16)], ids=["qwen2-vl", "qwen3-vl"])
def test_frames_of_a_default_size_equal_transformers(reference: Reference, processor: tuple[str, str], patch_size: int):
    frames = noise(4, 12 * 2 * patch_size, 11 * 2 * patch_size)
    expected = reference(processed, *processor, frames.numpy(), {"do_sample_frames": False})
    numbers = CLIP if processor is QWEN2 else HALF
    options = FormatOptions(format="huggingface", dtype="float32", rescale=True, **numbers)
    found = format_frames(frames, torch.arange(4).double(), options, patch_size=patch_size)
    assert isinstance(found, dict)
    assert found["video_grid_thw"].tolist() == expected["video_grid_thw"].tolist() == [[2, 24, 22]]
    assert np.abs(found["pixel_values_videos"].numpy() - expected["pixel_values_videos"]).max() <= 1e-5


@pytest.mark.parametrize(
    ("module", "name", "size"),
    [
        ("llava_next_video.video_processing_llava_next_video", "LlavaNextVideoVideoProcessor", (224, 224)),
        ("llava_onevision.video_processing_llava_onevision", "LlavaOnevisionVideoProcessor", (384, 384)),
        ("internvl.video_processing_internvl", "InternVLVideoProcessor", (384, 384)),
    ],
    ids=["llava-next-video", "llava-onevision", "internvl"],
)
def test_frames_equal_transformers(reference: Reference, module: str, name: str, size: tuple[int, int]):
    frames = noise(3, *size)
    expected = reference(processed, module, name, frames.numpy(), {})
    options = FormatOptions(format="huggingface", huggingface_layout="frames", dtype="float32", rescale=True, **CLIP)
    found = format_frames(frames, torch.arange(3).double(), options)
    assert isinstance(found, dict)
    assert found.keys() == expected.keys() == {"pixel_values_videos"}
    assert found["pixel_values_videos"].shape == expected["pixel_values_videos"].shape == (1, 3, 3, *size)
    assert np.abs(found["pixel_values_videos"].numpy() - expected["pixel_values_videos"]).max() <= 1e-5


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8])
@pytest.mark.parametrize("temporal_patch_size", [2, 3])
def test_patch_times_equal_qwen3(reference: Reference, num_frames: int, temporal_patch_size: int):
    indices = [(7 * i * i) % 101 + 101 * i for i in range(num_frames)]  # unevenly spaced
    expected = reference(qwen3_timestamps, indices, 29.97, temporal_patch_size)
    timestamps = torch.tensor(indices, dtype=torch.float64) / 29.97
    found = to_huggingface(
        noise(num_frames, 28, 28), timestamps, temporal_patch_size=temporal_patch_size, patch_times="timestamps"
    )
    assert found["timestamps"].tolist() == pytest.approx(expected, abs=1e-9)


def test_seconds_per_patch_equal_qwen2_5(reference: Reference):
    indices = list(range(0, 120, 10))
    fps = reference(sampled_fps, 120, 30.0, indices)
    timestamps = torch.tensor(indices, dtype=torch.float64) / 30
    found = to_huggingface(noise(12, 28, 28), timestamps, patch_times="second_per_grid_ts")
    assert found["second_per_grid_ts"].tolist() == pytest.approx([2 / fps])
