"""Tests of output formats: values, layouts, images, patches, chunks and errors."""

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blueberry_video.video import formats
from blueberry_video.video.formats import (
    FormatOptions,
    PixelValues,
    format_frames,
    to_base64,
    to_huggingface,
    to_numpy,
    to_openai,
    to_patches,
    to_pil,
    to_tensor,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def noise(num_frames: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (num_frames, 3, height, width), dtype=torch.uint8)


def seconds(num_frames: int) -> Tensor:
    return torch.arange(num_frames, dtype=torch.float64) / 2


def decoded(uri: str, image_format: str) -> Tensor:
    """Pixels (3, H, W) of a data URI."""
    header, data = uri.split(",")
    assert header == f"data:image/{image_format};base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == image_format.upper()
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_unchanged_frames_are_not_copied():
    frames = noise(2, 4, 6)
    assert to_tensor(frames) is frames
    assert format_frames(frames, seconds(2), FormatOptions()) is frames


@pytest.mark.parametrize(("layout", "shape"), [("tchw", (2, 3, 4, 6)), ("cthw", (3, 2, 4, 6)), ("thwc", (2, 4, 6, 3))])
def test_layouts(layout: str, shape: tuple[int, ...]):
    frames = noise(2, 4, 6)
    expected = torch.einsum(f"tchw->{layout}", frames.int())
    for dtype in ("uint8", "float32"):
        found = format_frames(frames, seconds(2), FormatOptions(dtype=dtype, layout=layout))
        assert isinstance(found, Tensor)
        assert found.shape == shape
        assert found.is_contiguous()
        assert torch.equal(found.int(), expected)
    array = format_frames(frames, seconds(2), FormatOptions(format="numpy", layout=layout))
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.uint8
    assert np.array_equal(array, expected.numpy())


def test_arrays_are_channels_last_by_default():
    frames = noise(2, 4, 6)
    assert np.array_equal(to_numpy(frames), frames.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_bgr_swaps_red_and_blue(dtype: str):
    frames = noise(2, 4, 6)
    found = to_tensor(frames, PixelValues(dtype, channels="bgr"))
    assert torch.equal(found.to(torch.uint8), frames[:, [2, 1, 0]])


def test_mean_and_std_of_bgr_are_in_bgr_order():
    frames = noise(2, 4, 6)
    rgb = to_tensor(frames, PixelValues("float32", rescale=True, mean=MEAN, std=STD))
    bgr = to_tensor(frames, PixelValues("float32", "bgr", rescale=True, mean=MEAN[::-1], std=STD[::-1]))
    assert torch.equal(bgr, rgb.flip(1))


def test_values():
    frames = noise(3, 5, 7)
    exact = frames.double()
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))

    def found(**arguments: Any) -> Tensor:
        return to_tensor(frames, PixelValues("float32", **arguments)).double()

    torch.testing.assert_close(found(), exact, rtol=0, atol=0)
    torch.testing.assert_close(found(rescale=True), exact / 255, rtol=1e-6, atol=1e-7)
    normalized = (exact / 255 - mean) / std
    torch.testing.assert_close(found(rescale=True, mean=MEAN, std=STD), normalized, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found(mean=MEAN, std=STD), (exact - mean) / std, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(("dtype", "ulp"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_rounds_once(dtype: str, ulp: float):
    frames = noise(2, 4, 6)
    values = {"rescale": True, "mean": MEAN, "std": STD}
    exact = to_tensor(frames, PixelValues("float32", **values))
    found = to_tensor(frames, PixelValues(dtype, **values))
    assert found.dtype == getattr(torch, dtype)
    torch.testing.assert_close(found.float(), exact, rtol=ulp, atol=1e-7)


def test_result_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch):
    frames = noise(7, 8, 8)
    values = PixelValues("float32", rescale=True, mean=MEAN, std=STD)
    whole = to_tensor(frames, values, "cthw"), to_patches(frames, values, patch_size=4)
    for chunk in (1, 2 * frames[0].numel(), 4 * frames[0].numel()):
        monkeypatch.setattr(formats, "_CHUNK", chunk)
        assert torch.equal(to_tensor(frames, values, "cthw"), whole[0])
        assert torch.equal(to_patches(frames, values, patch_size=4), whole[1])


def test_pil_round_trip():
    frames = noise(3, 5, 7)
    images = to_pil(frames)
    assert [(image.mode, image.size) for image in images] == [("RGB", (7, 5))] * 3
    assert torch.equal(torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]), frames)


def test_png_is_lossless_and_jpeg_is_close():
    frames = noise(3, 5, 7)
    exact = torch.stack([decoded(uri, "png") for uri in to_base64(frames, "png")])
    assert torch.equal(exact, frames)
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    smooth = torch.stack((rows * 5, columns * 3, rows + columns)).to(torch.uint8)[None]
    fine, coarse = (decoded(to_base64(smooth, "jpeg", quality)[0], "jpeg") for quality in (95, 5))
    assert (fine.float() - smooth[0].float()).abs().mean() < 1.5
    assert (coarse.float() - smooth[0].float()).abs().mean() > 3


def test_openai_message_parts():
    frames = noise(2, 5, 7)
    parts = to_openai(frames, torch.tensor([0.0, 75.25], dtype=torch.float64), "png", detail="low")
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url"]
    assert [part["text"] for part in parts[::2]] == ["[0.0 s]", "[75.2 s]"]
    assert [part["image_url"]["detail"] for part in parts[1::2]] == ["low", "low"]
    assert torch.equal(torch.stack([decoded(part["image_url"]["url"], "png") for part in parts[1::2]]), frames)
    options = FormatOptions(format="openai", image_format="png", detail="low", time_marks=False)
    assert format_frames(frames, seconds(2), options) == parts[1::2]


def test_images_ignore_tensor_options():
    frames = noise(2, 5, 7)
    profile: dict[str, Any] = {"dtype": "float32", "rescale": True, "mean": list(MEAN), "std": list(STD)}
    images = format_frames(frames, seconds(2), FormatOptions(format="pil", **profile))
    assert isinstance(images, list)
    assert torch.equal(torch.from_numpy(np.array(images[1])).permute(2, 0, 1), frames[1])
    uris = format_frames(frames, seconds(2), FormatOptions(format="base64", image_format="png", **profile))
    assert isinstance(uris, list)
    assert torch.equal(decoded(uris[1], "png"), frames[1])


def test_patches_are_in_merge_order():
    frames = torch.arange(4 * 8 * 8).view(4, 1, 8, 8).expand(-1, 3, -1, -1).to(torch.uint8).contiguous()
    patches = to_patches(frames, PixelValues("float32"), patch_size=2).int().view(2, 2, 2, 2, 2, 3, 2, 2, 2)
    expected = torch.empty_like(patches)
    for t, h, w, mh, mw, c, tp, ph, pw in np.ndindex(*patches.shape):
        row, column = (h * 2 + mh) * 2 + ph, (w * 2 + mw) * 2 + pw
        expected[t, h, w, mh, mw, c, tp, ph, pw] = frames[t * 2 + tp, c, row, column].int()
    assert torch.equal(patches, expected)


def test_last_frame_pads_the_last_patch():
    frames = noise(3, 8, 8)
    filled = torch.cat((frames, frames[-1:]))
    assert torch.equal(to_patches(frames, patch_size=4), to_patches(filled, patch_size=4))


def test_uint8_patches():
    frames = noise(2, 8, 8)
    found = to_patches(frames, PixelValues(), patch_size=4)
    assert found.dtype == torch.uint8
    assert torch.equal(found.float(), to_patches(frames, PixelValues("float32"), patch_size=4))


def test_patch_times():
    frames, timestamps = noise(5, 8, 8), torch.tensor([1.0, 1.5, 2.0, 4.0, 9.0], dtype=torch.float64)
    found = to_huggingface(frames, timestamps, patch_size=4, patch_times="timestamps")
    assert found["timestamps"].tolist() == [1.25, 3.0, 9.0]
    assert found["video_grid_thw"].tolist() == [[3, 2, 2]]
    found = to_huggingface(frames, timestamps, patch_size=4, patch_times="second_per_grid_ts")
    assert found["second_per_grid_ts"].tolist() == [4.0]
    repeated = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64)  # the last frame repeats up to an even number
    found = to_huggingface(frames[:4], repeated, patch_size=4, patch_times="second_per_grid_ts")
    assert found["second_per_grid_ts"].tolist() == [1.0]
    still = to_huggingface(frames[:2], torch.zeros(2), patch_size=4, patch_times="second_per_grid_ts")
    assert still["second_per_grid_ts"].tolist() == [2.0]
    assert to_huggingface(frames, timestamps, patch_size=4).keys() == {"pixel_values_videos", "video_grid_thw"}


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_patches_of_chunks_concatenate_to_those_of_the_video(first: int, rest: int, tp: int, seed: int):
    torch.manual_seed(seed)
    frames = noise(first * tp + rest, 4, 4)
    parts = [to_patches(part, patch_size=2, temporal_patch_size=tp) for part in frames.tensor_split([first * tp])]
    assert torch.equal(torch.cat(parts), to_patches(frames, patch_size=2, temporal_patch_size=tp))


class Allocations(TorchDispatchMode):
    """Records the bytes of every storage returned by an operation, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                memory = tensor.untyped_storage()
                self.sizes[memory.data_ptr()] = max(self.sizes.get(memory.data_ptr(), 0), memory.nbytes())
        return result


@pytest.mark.parametrize("convert", [to_tensor, to_patches])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_intermediate_tensors_are_at_most_one_chunk(convert: Any, dtype: str, monkeypatch: pytest.MonkeyPatch):
    frames = noise(65, 56, 56)
    chunk = 4 * frames[0].numel()
    monkeypatch.setattr(formats, "_CHUNK", chunk)
    with Allocations() as allocations:
        result = convert(frames, PixelValues(dtype, "bgr", rescale=True, mean=MEAN, std=STD))
    for tensor in (frames, result):
        assert allocations.sizes.pop(tensor.untyped_storage().data_ptr()) == tensor.nbytes
    assert max(allocations.sizes.values()) == 4 * chunk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "avi"}, "format='avi'.*tensor, numpy"),
        ({"dtype": "int4"}, "dtype='int4'.*uint8"),
        ({"channels": "grb"}, "channels='grb'.*rgb, bgr"),
        ({"layout": "chwt"}, "layout='chwt'.*tchw"),
        ({"detail": "fine"}, "detail='fine'.*low, high, auto"),
        ({"huggingface_layout": "pixels"}, "huggingface_layout='pixels'.*patches"),
        ({"patch_times": "fps"}, "patch_times='fps'.*none"),
        ({"image_format": "webp"}, "image_format='webp'.*jpeg, png"),
        ({"jpeg_quality": 0}, "jpeg_quality=0.*1 to 100"),
        ({"jpeg_quality": 101}, "jpeg_quality=101.*1 to 100"),
        ({"device": "toaster"}, "device='toaster'.*cpu, cuda"),
        ({"rescale": True}, "dtype=uint8 with rescale=True.*float dtype"),
        ({"mean": MEAN, "std": STD}, "dtype=uint8 with.*mean=.*float dtype"),
        ({"dtype": "float32", "mean": MEAN}, r"mean=\(.*std=None.*both"),
        ({"dtype": "float32", "std": STD}, r"mean=None and std=\(.*both"),
        ({"dtype": "float32", "mean": MEAN[:2], "std": STD}, r"mean=\(0\.5, 0\.4\) .*three finite"),
        (
            {"dtype": "float32", "mean": MEAN, "std": (0.1, 0.2, 0.3, 0.4)},
            r"std=\(0\.1, 0\.2, 0\.3, 0\.4\).*three finite",
        ),
        (
            {"dtype": "float32", "mean": (0.0, float("nan"), 0.0), "std": STD},
            r"mean=\(0\.0, nan, 0\.0\) .*three finite",
        ),
        ({"dtype": "float32", "mean": MEAN, "std": (0.1, 0.0, 0.1)}, r"std=\(0\.1, 0\.0, 0\.1\).*above 0"),
        ({"format": "numpy", "dtype": "bfloat16"}, "dtype=bfloat16.*format=numpy.*float32 or float16"),
        ({"format": "pil", "channels": "bgr"}, "channels=bgr with format=pil.*channels=rgb"),
        ({"format": "openai", "channels": "bgr"}, "channels=bgr with format=openai.*channels=rgb"),
    ],
    ids=str,
)
def test_invalid_options_raise(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FormatOptions(**options)


def test_lists_from_yaml_become_tuples():
    options = FormatOptions(dtype="float32", mean=list(MEAN), std=list(STD))  # type: ignore[arg-type]
    assert (options.mean, options.std) == (MEAN, STD)
    assert hash(options) == hash(FormatOptions(dtype="float32", mean=MEAN, std=STD))


@pytest.mark.parametrize("convert", [to_tensor, to_numpy, to_pil, to_base64, to_openai, to_patches])
def test_invalid_frames_raise(convert: Any):
    with pytest.raises(TypeError, match=r"frames .*torch\.float32.*uint8"):
        convert(torch.zeros(2, 3, 4, 4))
    with pytest.raises(TypeError, match=r"frames .*ndarray.*uint8"):
        convert(np.zeros((2, 3, 4, 4), np.uint8))
    for shape in ((2, 4, 4, 3), (3, 4, 4), (0, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"frames .*shape.*\(T, 3, H, W\)"):
            convert(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("timestamps", [torch.zeros(3), torch.zeros(2, 1)])
def test_invalid_timestamps_raise(timestamps: Tensor):
    frames = noise(2, 8, 8)
    for convert in (
        lambda: to_openai(frames, timestamps),
        lambda: to_huggingface(frames, timestamps, patch_size=4),
        lambda: format_frames(frames, timestamps, FormatOptions()),
    ):
        with pytest.raises(ValueError, match=r"timestamps .*\b2 frames"):
            convert()


def test_invalid_arguments_raise():
    frames = noise(2, 28, 56)
    with pytest.raises(ValueError, match=r"28 x 56.*\b32\b.*32 x 64"):
        to_patches(frames, patch_size=16)
    with pytest.raises(ValueError, match=r"temporal_patch_size=0.*at least 1"):
        to_patches(frames, temporal_patch_size=0)
    with pytest.raises(ValueError, match="layout='chw'"):
        to_tensor(frames, layout="chw")
    with pytest.raises(ValueError, match="dtype=bfloat16"):
        to_numpy(frames, PixelValues("bfloat16"))
    with pytest.raises(ValueError, match="image_format='gif'"):
        to_base64(frames, "gif")
    with pytest.raises(ValueError, match="detail='much'"):
        to_openai(frames, detail="much")
    with pytest.raises(ValueError, match="patch_times='all'"):
        to_huggingface(frames, seconds(2), patch_times="all")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
def test_gpu_equals_cpu():
    frames = noise(3, 8, 8)
    values = {"dtype": "float32", "rescale": True, "mean": MEAN, "std": STD}
    here, there = PixelValues(**values), PixelValues(**values, device="cuda")  # type: ignore[arg-type]
    torch.testing.assert_close(to_tensor(frames, there).cpu(), to_tensor(frames, here), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        to_patches(frames.cuda(), there, patch_size=4).cpu(),
        to_patches(frames, here, patch_size=4),
        rtol=1e-6,
        atol=1e-6,
    )
    assert np.array_equal(to_numpy(frames.cuda(), there, "tchw"), to_tensor(frames, there).cpu().numpy())
