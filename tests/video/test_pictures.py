"""Transparency, pixel aspect ratio and interlacing of video files, against the ffmpeg program."""

import io
import os
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from blueberry_video.data.buckets import VideoBuckets
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.video import backends, load_settings, process_video, stream_video
from blueberry_video.video.clip import load_clip
from blueberry_video.video.container import open_video, probe
from blueberry_video.video.decode import DecodeOptions, decode
from blueberry_video.video.deinterlace import deinterlaced
from blueberry_video.video.errors import LimitError
from blueberry_video.video.picture import ToRGB, over_white
from blueberry_video.video.process import VideoProcessor
from blueberry_video.video.resize import ResizeOptions, display_size, video_size
from blueberry_video.video.sampling import SamplingOptions

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="the files are written by ffmpeg, which is not installed"
)
STRICT = DecodeOptions(salvage=False)
REAL = os.environ.get("BLUEBERRY_TEST_VIDEOS")
SIZE = "128x96"


def write(path: Path, source: str, *arguments: str) -> Path:
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", source, *arguments, str(path)], check=True)
    return path


def program(path: Path, graph: str, size: tuple[int, int], *before: str) -> torch.Tensor:
    """Frames of the ffmpeg program after a filter graph, uint8 (T, 3, H, W)."""
    command = ["ffmpeg", "-v", "error", *before, "-i", str(path), "-filter_complex", f"{graph},format=rgb24"]
    command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-"]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    return torch.from_numpy(np.frombuffer(output, np.uint8).reshape(-1, *size, 3).copy()).permute(0, 3, 1, 2)


# ---- transparency ----------------------------------------------------------------------------------------------------

YUVA = f"testsrc2=size={SIZE}:rate=10:duration=3,format=yuva420p,geq=lum='lum(X,Y)':cb='cb(X,Y)':cr='cr(X,Y)'"
RGBA = f"testsrc2=size={SIZE}:rate=10:duration=3,format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)'"
RAMP = ":a='mod(X*2+N*8,256)'"
VPX = ("-auto-alt-ref", "0", "-g", "10", "-b:v", "500k", "-deadline", "realtime")
TRANSPARENT = {  # file: source, encoder, decoder of the program
    "vp8.webm": (YUVA, ("-c:v", "libvpx", *VPX), ("-c:v", "libvpx")),
    "vp9.webm": (YUVA, ("-c:v", "libvpx-vp9", *VPX), ("-c:v", "libvpx-vp9")),
    "vp9.mkv": (YUVA, ("-c:v", "libvpx-vp9", *VPX), ("-c:v", "libvpx-vp9")),
    "qtrle.mov": (RGBA, ("-c:v", "qtrle"), ()),
    "png.mov": (RGBA, ("-c:v", "png"), ()),
    "ffv1.mkv": (RGBA, ("-c:v", "ffv1", "-pix_fmt", "bgra"), ()),
    "ffv1_ten_bit.mkv": (RGBA, ("-c:v", "ffv1", "-pix_fmt", "yuva420p10le"), ()),
    "utvideo.avi": (RGBA, ("-c:v", "utvideo", "-pix_fmt", "gbrap"), ()),
    "prores.mov": (RGBA, ("-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"), ()),
}
# colors as in every other file: with alpha, FFmpeg converts 10 bits to RGB differently, by up to 4 levels
OVERLAY = (
    "[0:v]split[a][b];[a]format=rgb24[colors];[b]format=rgba,alphaextract[alpha];[colors][alpha]alphamerge[front];"
    f"color=white:size={SIZE}:rate=10,format=rgba[white];[white][front]overlay=format=rgb:shortest=1"
)


@pytest.mark.parametrize("name", TRANSPARENT)
def test_every_transparent_frame_equals_overlay_on_white(tmp_path: Path, name: str):
    source, encoder, decoder = TRANSPARENT[name]
    path = write(tmp_path / name, source + RAMP, *encoder)
    assert probe(path).picture.has_alpha
    expected = program(path, OVERLAY, (96, 128), *decoder)
    found = decode(path, range(30), STRICT)
    assert (found.pixels.short() - expected.short()).abs().max() <= 1
    assert found.backend == "pyav"
    for options in (STRICT, DecodeOptions(("torchcodec", "decord"), salvage=False)):
        some = decode(path, [25, 3, 17], options)
        assert some.backend == "pyav"
        assert torch.equal(some.pixels, found.pixels[[25, 3, 17]])
    assert list(some.failures) == ["torchcodec", "decord"]
    assert process_video(path, num_frames=4).metadata.has_alpha


@pytest.mark.parametrize("name", ["prores.mov", "ffv1_ten_bit.mkv", "vp9.webm", "png.mov"])
def test_opaque_frames_are_those_without_alpha(tmp_path: Path, name: str):
    source, encoder, _ = TRANSPARENT[name]
    path = write(tmp_path / name, f"{source}:a=255", *encoder)
    colors = program(path, "[0:v]null", (96, 128))
    assert torch.equal(decode(path, range(30), STRICT).pixels, colors)


def test_a_transparent_animation_is_on_white(tmp_path: Path):
    first = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    first.paste((10, 20, 200, 255), (8, 8, 24, 24))
    second = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    second.paste((10, 20, 200, 255), (30, 8, 46, 24))
    path = tmp_path / "a.gif"
    first.save(path, save_all=True, append_images=[second], duration=100, disposal=2)
    found = decode(path, [0, 1], STRICT).pixels
    assert found[:, :, 40, 60].eq(255).all()
    assert found[0, :, 16, 16].tolist() == found[1, :, 16, 38].tolist() == [10, 20, 200]


def test_salvage_and_decoding_from_the_start_blend_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("vp8.webm", "vp9.webm", "qtrle.mov"):
        source, encoder, _ = TRANSPARENT[name]
        path = write(tmp_path / name, source + RAMP, *encoder)
        intact = decode(path, range(30), STRICT).pixels
        with open_video(path) as video:
            salvaged = [pixels for pixels, _, _ in backends.salvage(video, [4, 12, 29])]
        assert torch.equal(torch.stack(salvaged).permute(0, 3, 1, 2), intact[[4, 12, 29]])
        with monkeypatch.context() as patch:
            patch.setattr(backends, "selected_frames", lambda video, wanted: iter(()))
            assert torch.equal(decode(path, [4, 12, 29], STRICT).pixels, intact[[4, 12, 29]])


def test_rounding_of_blending_is_that_of_pillow():
    colors = torch.arange(256, dtype=torch.uint8).repeat(256, 1)[..., None].expand(-1, -1, 3).numpy()
    alpha = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 256).numpy()
    image = Image.new("RGB", (256, 256), (255, 255, 255))
    image.paste(Image.fromarray(colors.copy()), mask=Image.fromarray(alpha.copy()))
    assert np.array_equal(over_white(colors, alpha), np.asarray(image))


# ---- pixel aspect ratio ----------------------------------------------------------------------------------------------


def anamorphic(folder: Path, aspect: str = "16/9", *arguments: str) -> Path:
    """A smooth video of 72x48 pixels."""
    source = f"gradients=size=72x48:rate=10:duration=2:seed=3,setsar={aspect}"
    return write(folder / "wide.mp4", source, "-pix_fmt", "yuv420p", "-c:v", "libx264", *arguments)


def test_the_container_precedes_the_codec(tmp_path: Path):
    path = anamorphic(tmp_path)
    assert probe(path).picture.pixel_aspect == (16, 9)
    changed = tmp_path / "changed.mp4"
    subprocess.run(["ffmpeg", "-v", "error", "-i", path, "-c", "copy", "-aspect", "2:1", changed], check=True)
    assert probe(changed).picture.pixel_aspect == (4, 3)  # 2:1 / (72 / 48), whatever the bitstream states
    raw = tmp_path / "raw.h264"
    subprocess.run(["ffmpeg", "-v", "error", "-i", path, "-c", "copy", raw], check=True)
    assert probe(raw).picture.pixel_aspect == (16, 9)
    assert process_video(changed, num_frames=4).metadata.pixel_aspect == (4, 3)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("aspect", ["16/9", "8/9", "16/11", "64/51"])
def test_the_display_size_is_that_of_ffmpeg(tmp_path: Path, aspect: str, rotation: int):
    path = tmp_path / "a.mp4"
    still = anamorphic(tmp_path, aspect)
    command = ["ffmpeg", "-v", "error", "-i", still, "-c", "copy", "-metadata:s:v", f"rotate={rotation}", path]
    subprocess.run(command, check=True)
    options = ResizeOptions("none", square_pixels=True)
    found = load_clip(path, SamplingOptions("all", max_frames=99), options, STRICT).pixels
    command = ["ffmpeg", "-v", "error", "-i", path, "-vf", "scale=w=iw*sar:h=ih", "-frames:v", "1"]
    picture = subprocess.run([*command, "-f", "image2pipe", "-c:v", "png", "-"], check=True, capture_output=True).stdout
    assert Image.open(io.BytesIO(picture)).size == (found.shape[3], found.shape[2])
    plain = load_clip(path, SamplingOptions("all", max_frames=99), ResizeOptions("none"), STRICT).pixels
    assert plain.shape[2:] == ((72, 48) if rotation % 180 else (48, 72))
    scaled = F.interpolate(plain.float(), found.shape[2:], mode="bicubic", antialias=True).clamp(0, 255)
    assert (found.float() - scaled).abs().max() < 0.51  # resized once, from the stored pixels


def test_a_circle_is_round_under_every_rule(tmp_path: Path):
    # circles in the display size of 192x144 pixels, stored with 144x144 pixels of 4:3
    circle = "if(lt(hypot(X*4/3-96,Y-72),48),255,0)"
    source = f"color=black:size=144x144:rate=10:duration=1,format=gray,geq=lum='{circle}',setsar=4/3"
    path = write(tmp_path / "a.mkv", source, "-pix_fmt", "yuv444p", "-c:v", "ffv1")
    rules = {
        "none": {},
        "crop": {"image_size": 96},
        "cover": {"image_size": 96},
        "fit": {"max_long_side": 128},
        "smart": {"size_factor": 2, "max_pixels": 24_576, "min_pixels": 16},
        "fill": {"size_factor": 2, "max_pixels": 24_576},
    }
    for rule, values in rules.items():
        for square, ratio in ((True, 1.0), (False, 0.75)):
            options = ResizeOptions(rule, square_pixels=square, **values)
            found = load_clip(path, SamplingOptions("uniform", num_frames=2), options, STRICT).pixels[0, 0] > 127
            height, width = found.any(dim=1).sum().item(), found.any(dim=0).sum().item()
            assert width / height == pytest.approx(ratio, abs=0.05), (rule, square)


def test_sizes_and_tokens_are_those_of_the_display_size(tmp_path: Path):
    path = anamorphic(tmp_path, "8/3")  # 192x48
    settings = load_settings("qwen2.5-vl", {"num_frames": 4, "square_pixels": True})
    plan, video = VideoProcessor(settings).plan(path), VideoProcessor(settings)(path)
    assert (
        (plan.height, plan.width) == video_size(48, 192, 4, settings.resize) != video_size(48, 72, 4, settings.resize)
    )
    assert plan.tokens.total == video.metadata.total_tokens
    assert video.pixels.shape[2:] == (plan.height, plan.width) == video.metadata.resolution
    plain = VideoProcessor(load_settings("qwen2.5-vl", {"num_frames": 4})).plan(path)
    assert (plain.height, plain.width) == video_size(48, 72, 4, settings.resize)  # as qwen-vl-utils
    [chunk] = stream_video(path, num_frames=4, square_pixels=True)
    assert chunk.pixels.shape[2:] == video_size(48, 192, 4, settings.resize)


def test_a_pixel_aspect_ratio_that_exhausts_memory_raises():
    assert display_size(576, 720, (64, 45)) == (576, 1024)
    assert display_size(480, 704, (12, 11)) == (480, 768)
    assert display_size(480, 720, (32, 27)) == (480, 853)
    assert display_size(2, 1, (1, 3)) == (2, 1)
    for aspect in ((101, 1), (1, 101)):
        with pytest.raises(LimitError, match="square_pixels"):
            display_size(48, 72, aspect)


@pytest.mark.skipif(REAL is None, reason="BLUEBERRY_TEST_VIDEOS is not set to a folder of real clips")
def test_a_real_clip_of_wide_pixels():
    path = Path(str(REAL), "arm_wrestling.mp4")
    info = probe(path)
    assert info.picture.pixel_aspect == (64, 51)
    size = display_size(info.height, info.width, (64, 51))
    found = load_clip(path, SamplingOptions("uniform", num_frames=4), ResizeOptions("none", square_pixels=True))
    assert found.pixels.shape[2:] == size == (info.height, info.width * 64 // 51)


def test_folders_and_buckets_of_videos_take_the_options(tmp_path: Path):
    (tmp_path / "videos").mkdir()
    shutil.move(anamorphic(tmp_path, "8/3"), tmp_path / "videos" / "a.mp4")

    def folder(**values) -> VideoFolder:
        return VideoFolder(tmp_path, num_frames=2, metadata="none", **values)

    assert folder()[0]["video"].shape == (2, 3, 48, 72)
    assert folder(square_pixels=True)[0]["video"].shape == (2, 3, 48, 192)
    for square, name in ((False, "2x48x72"), (True, "2x24x96")):
        videos = folder(square_pixels=square)
        parts = VideoBuckets(videos, [[2, 48, 72], [2, 24, 96]], [1, 8, 8], 10_000, captions=False)
        assert list(parts.parts) == [name]
    changed = [{"square_pixels": True}, {"tone_map": "bt2390"}, {"deinterlace": "yadif"}, {"deinterlace": "bwdif"}]
    assert len({folder(**values).cache_key for values in ({}, *changed)}) == 5


def test_the_cache_distinguishes_the_options(tmp_path: Path):
    path = anamorphic(tmp_path)
    cached = {"num_frames": 4, "cache_folder": str(tmp_path / "cache")}
    for options in ({}, {"square_pixels": True}, {"deinterlace": "bwdif"}, {"tone_map": "hable"}):
        assert not process_video(path, **cached, **options).cached
        again = process_video(path, **cached, **options)
        assert again.cached
        assert again.metadata.pixel_aspect == (16, 9)


# ---- interlacing -----------------------------------------------------------------------------------------------------

FIELDS = f"testsrc2=size={SIZE}:rate=20:duration=3,noise=alls=8:allf=t,tinterlace=interleave_"
FLAGS = ("-flags", "+ilme+ildct")
INTERLACED = {  # file: (first field, arguments)
    "mpeg2.ts": ("top", ("-c:v", "mpeg2video", *FLAGS, "-top", "1", "-q:v", "3", "-bf", "2")),
    "mpeg2.mpg": ("bottom", ("-c:v", "mpeg2video", *FLAGS, "-top", "0", "-q:v", "3", "-bf", "2")),
    "mbaff.mp4": ("top", ("-c:v", "libx264", *FLAGS, "-x264-params", "tff=1:keyint=5")),
    "mbaff.mkv": ("bottom", ("-c:v", "libx264", *FLAGS, "-x264-params", "bff=1:keyint=12")),
    "mpeg4.avi": ("bottom", ("-c:v", "mpeg4", *FLAGS, "-q:v", "3")),
}


def interlaced(folder: Path, name: str) -> Path:
    return write(folder / name, FIELDS + INTERLACED[name][0], "-pix_fmt", "yuv420p", *INTERLACED[name][1])


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_frames_equal_the_ffmpeg_program(tmp_path: Path, name: str):
    path = interlaced(tmp_path, name)
    info = probe(path)
    assert info.picture.interlaced == INTERLACED[name][0]
    count = info.num_frames
    plain = decode(path, range(count), STRICT).pixels
    for filter_name in ("yadif", "bwdif"):
        options = replace(STRICT, deinterlace=filter_name)
        found = decode(path, range(count), options)
        expected = program(path, f"[0:v]{filter_name}=mode=send_frame:deint=interlaced", (96, 128))
        assert found.backend == "pyav"
        assert found.pixels.shape == expected.shape
        first = 1 if filter_name == "bwdif" else 0  # FFmpeg 5 and 8 filter the edges of bwdif's first frame differently
        assert torch.equal(found.pixels[first:], expected[first:])
        assert (found.pixels != plain).flatten(1).any(dim=1).all()
        for index in (0, 1, 7, count // 2, count - 2, count - 1):
            assert torch.equal(decode(path, [index], options).pixels[0], found.pixels[index])
        some = [count - 1, 3, 4, 9, 5, 20]
        assert torch.equal(decode(path, some, options).pixels, found.pixels[some])


def test_the_first_frame_of_bwdif_is_that_of_the_whole_file(tmp_path: Path):
    path = interlaced(tmp_path, "mbaff.mp4")
    with av.open(str(path)) as container:
        frames = [(number, frame) for number, frame in enumerate(container.decode(video=0))]
    to_rgb = ToRGB()
    whole = {number: to_rgb(frame) for number, frame in deinterlaced(frames, "bwdif")}
    assert list(whole) == list(range(len(frames)))
    found = decode(path, [0], replace(STRICT, deinterlace="bwdif")).pixels[0]
    assert torch.equal(found.permute(1, 2, 0), whole[0])


def test_progressive_frames_and_files_are_unchanged(tmp_path: Path):
    source = f"testsrc2=size={SIZE}:rate=20:duration=1"
    for name, arguments in (("a.mp4", ("-c:v", "libx264")), ("a.webm", ("-c:v", "libvpx-vp9", "-speed", "8"))):
        path = write(tmp_path / name, source, "-pix_fmt", "yuv420p", *arguments)
        assert probe(path).picture.interlaced is None
        plain = decode(path, range(20), STRICT).pixels
        assert torch.equal(decode(path, range(20), replace(STRICT, deinterlace="bwdif")).pixels, plain)


def test_of_mixed_frames_only_the_interlaced_ones_change(tmp_path: Path):
    progressive = write(tmp_path / "a.mp4", f"testsrc2=size={SIZE}:rate=20:duration=2", "-pix_fmt", "yuv420p")
    lists = []
    for path in (interlaced(tmp_path, "mbaff.mp4"), progressive):
        with av.open(str(path)) as container:
            lists.append(list(container.decode(video=0)))
    frames = [lists[kind][number] for number, kind in enumerate((1, 1, 0, 1, 0, 0, 1, 1, 0, 0))]
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base = number, Fraction(1, 20)
    to_rgb = ToRGB()
    before = [to_rgb(frame) for frame in frames]
    for filter_name in ("bwdif", "yadif"):
        found = list(deinterlaced(enumerate(frames), filter_name))
        assert [number for number, _ in found] == list(range(10))
        for number, frame in found:
            assert frame.pts == 2 * number  # in half the time base
            assert torch.equal(to_rgb(frame), before[number]) != frames[number].interlaced_frame


def test_frames_after_damage_are_deinterlaced_too(tmp_path: Path):
    path = interlaced(tmp_path, "mpeg2.ts")
    options = DecodeOptions(deinterlace="yadif", max_missing_share=1.0)
    intact = decode(path, range(30), options).pixels
    content = path.read_bytes()
    damaged = tmp_path / "damaged.ts"
    at = len(content) // 2 // 188 * 188
    damaged.write_bytes(content[:at] + bytes(188 * 30) + content[at + 188 * 30 :])
    count = probe(damaged).num_frames
    found = decode(damaged, range(count), options)
    assert found.missing.any() or found.suspect.any()
    assert torch.equal(found.pixels[:8], intact[:8])


def test_unknown_filters_raise():
    with pytest.raises(ValueError, match="deinterlace='idet'"):
        DecodeOptions(deinterlace="idet")


def test_an_interlaced_video_is_processed_with_one_option(tmp_path: Path):
    path = interlaced(tmp_path, "mbaff.mp4")
    plain, smooth = process_video(path, num_frames=4), process_video(path, num_frames=4, deinterlace="bwdif")
    assert plain.metadata.interlaced == smooth.metadata.interlaced == "top"
    assert not torch.equal(plain.pixels, smooth.pixels)
