"""Frames, frame counts and timestamps of video files, from every backend that works on this machine."""

import os
import re
import struct
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from blueberry_video.video import backends, seeking
from blueberry_video.video.backends import READERS, backend_failure
from blueberry_video.video.container import open_video, probe
from blueberry_video.video.decode import DecodeOptions, decode, decode_in_chunks
from blueberry_video.video.errors import BrokenVideoError, RefusedSourceError

WORKING = [name for name in READERS if backend_failure(name) is None]
STRICT = DecodeOptions(salvage=False)
REAL = os.environ.get("BLUEBERRY_TEST_VIDEOS")


def picture(level: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Gray frame at ``level`` with a white top left corner, which identifies the frame and its orientation."""
    frame = np.full((height, width, 3), level, np.uint8)
    frame[: height // 4, : width // 4] = 255
    return frame


def write(
    path: Path,
    levels: list[int],
    pts: list[int] | None = None,
    codec: str = "libx264",
    container: str | None = None,
    keyint: int = 12,
    **options: str,
) -> Path:
    """Writes a video with one frame per level, at 30 fps or at ``pts`` thirtieths of a second."""
    with av.open(str(path), "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size = keyint
        stream.codec_context.time_base = Fraction(1, 30)
        for i, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(picture(level), format="rgb24")
            frame.pts = pts[i] if pts else i
            frame.time_base = Fraction(1, 30)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Sets the display matrix of an mp4 file: pixel (x, y) is displayed at (ax + cy, bx + dy)."""
    content = path.read_bytes()
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    start = content.index(b"tkhd") + 4 + 40  # the matrix follows version, times, id, duration, layer and volume
    path.write_bytes(content[:start] + matrix + content[start + 36 :])


LEVELS = [20 + 4 * i for i in range(40)]


def levels(pixels: torch.Tensor) -> list[int]:
    """Gray level of the lower right quarter of each frame."""
    return [round(frame[:, 24:, 32:].float().mean().item()) for frame in pixels]


def close(found: list[int], expected: list[int], within: int = 2) -> bool:
    return len(found) == len(expected) and all(abs(a - b) <= within for a, b in zip(found, expected))


def test_pyav_works_and_a_failing_backend_has_a_reason():
    assert "pyav" in WORKING
    for name in set(READERS) - set(WORKING):
        reason = backend_failure(name)
        assert reason
        assert len(reason) < 210
    with pytest.raises(ValueError, match=r"backends.*'opencv'.*pyav, torchcodec"):
        backend_failure("opencv")
    with pytest.raises(ValueError, match=r"backends.*'opencv'.*pyav, torchcodec"):
        DecodeOptions(backends=("pyav", "opencv"))


def test_probe_returns_frame_count_and_timestamps(tmp_path: Path):
    info = probe(write(tmp_path / "a.mp4", LEVELS))
    assert (info.num_frames, info.height, info.width) == (40, 48, 64)
    assert info.fps == pytest.approx(30)
    assert info.timestamps.tolist() == pytest.approx([i / 30 for i in range(40)])


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("indices", [list(range(40)), [39, 0, 7, 7, 20], [25], [11, 12, 13], [5, 38]])
def test_requested_frames_are_returned(tmp_path: Path, backend: str, indices: list[int]):
    frames = decode(write(tmp_path / "a.mp4", LEVELS), indices, DecodeOptions(backends=(backend,), salvage=False))
    assert frames.backend == backend
    assert frames.pixels.dtype == torch.uint8
    assert frames.pixels.shape == (len(indices), 3, 48, 64)
    assert close(levels(frames.pixels), [LEVELS[i] for i in indices])
    assert frames.timestamps.tolist() == pytest.approx([i / 30 for i in indices])


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9")])
def test_other_containers(tmp_path: Path, backend: str, name: str, codec: str):
    path = write(tmp_path / name, [20 + 10 * i for i in range(20)], codec=codec)
    frames = decode(path, [19, 3, 10], DecodeOptions(backends=(backend,), salvage=False))
    assert close(levels(frames.pixels), [210, 50, 120], within=4)


def test_a_backend_with_wrong_frames_is_skipped(tmp_path: Path):
    path = write(tmp_path / "a.ts", [20 + 10 * i for i in range(20)])  # torchcodec 0.13 starts twelve frames late
    assert close(levels(decode(path, [19, 3, 10]).pixels), [210, 50, 120], within=4)


@pytest.mark.parametrize("backend", WORKING)
def test_timestamps_with_variable_frame_rate(tmp_path: Path, backend: str):
    pts = [0, 1, 2, 3, 10, 20, 40, 70]
    path = write(tmp_path / "a.mp4", LEVELS[:8], pts)
    frames = decode(path, [7, 4, 1], DecodeOptions(backends=(backend,), salvage=False))
    assert frames.timestamps.tolist() == pytest.approx([70 / 30, 10 / 30, 1 / 30])
    assert close(levels(frames.pixels), [LEVELS[7], LEVELS[4], LEVELS[1]])
    assert probe(path).fps == pytest.approx(7 / (70 / 30))


def test_raw_stream_without_timestamps(tmp_path: Path):
    path = write(tmp_path / "a.h264", LEVELS[:10], container="h264")
    assert probe(path).num_frames == 10
    assert close(levels(decode(path, [9, 2]).pixels), [LEVELS[9], LEVELS[2]])


@pytest.mark.parametrize("backend", [name for name in WORKING if name != "decord"])  # which raises
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, backend: str, degrees: int):
    path = write(tmp_path / "a.mp4", LEVELS[:3])
    plain = decode(path, [1], DecodeOptions(backends=(backend,), salvage=False)).pixels
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]  # clockwise on display
    set_display_matrix(path, cosine, sine, -sine, cosine)
    rotated = decode(path, [1], DecodeOptions(backends=(backend,), salvage=False)).pixels
    assert torch.equal(rotated, torch.rot90(plain, k=-degrees // 90, dims=(2, 3)))
    assert (probe(path).height, probe(path).width) == rotated.shape[2:]


def test_the_choose_function_receives_the_video_info(tmp_path: Path):
    frames = decode(write(tmp_path / "a.mp4", LEVELS), lambda info: [info.num_frames - 1])
    assert close(levels(frames.pixels), [LEVELS[-1]])


def test_an_index_outside_the_file_raises(tmp_path: Path):
    path = write(tmp_path / "a.mp4", LEVELS[:5])
    for indices in ([5], [-1], []):
        with pytest.raises(IndexError, match=re.escape(str(indices)) + r".*a\.mp4.*0 to 4"):
            decode(path, indices)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\x00" * 4096])
def test_a_broken_file_raises_with_its_name(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(BrokenVideoError, match=r"broken\.mp4"):
        decode(path, [0])


def test_a_truncated_file_raises_or_is_salvaged(tmp_path: Path):
    path = write(tmp_path / "a.mp4", LEVELS, movflags="faststart")
    whole = path.read_bytes()
    start = whole.index(b"mdat")
    path.write_bytes(whole[: start + (len(whole) - start) // 2])
    with pytest.raises(BrokenVideoError, match=r"a\.mp4 .*\b40 frames.* \d.*salvage=true"):
        decode(path, [0], STRICT)
    frames = decode(path, range(40), DecodeOptions(max_missing_share=1.0))
    good = ~(frames.missing | frames.suspect)
    assert 0 < int(good.sum()) < 40
    assert close(levels(frames.pixels[good]), [LEVELS[round(time * 30)] for time in frames.timestamps[good].tolist()])


def test_damage_raises_or_is_salvaged_with_a_mask(tmp_path: Path):
    path = write(tmp_path / "a.mp4", LEVELS, movflags="faststart")
    whole = path.read_bytes()
    start = whole.index(b"mdat")
    middle = start + (len(whole) - start) // 2
    path.write_bytes(whole[:middle] + bytes(len(whole) - middle))
    with pytest.raises(BrokenVideoError, match=r"a\.mp4 .*pyav: .+salvage=true"):
        decode(path, range(40), STRICT)
    frames = decode(path, [39, 0, 20], DecodeOptions(max_missing_share=1.0))
    assert frames.missing.tolist() == [True, False, frames.missing[2].item()]
    assert close(levels(frames.pixels[1:2]), LEVELS[:1])
    assert frames.failures.keys() == {"pyav"}  # other backends return concealed frames without an error


def test_decoding_falls_back_to_the_next_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.mp4", LEVELS)

    def fails_at_frame_ten(video, wanted, device):
        for number, picture in enumerate(backends.read_pyav(video, wanted)):
            if number == 10:
                raise RuntimeError("test failure")
            yield picture

    monkeypatch.setitem(READERS, "torchcodec", fails_at_frame_ten)
    monkeypatch.setattr("blueberry_video.video.decode.backend_failure", lambda name: None)
    frames = decode(path, range(40), DecodeOptions(backends=("torchcodec", "pyav")))
    assert (frames.backend, frames.failures) == ("pyav", {"torchcodec": "test failure"})
    assert close(levels(frames.pixels), LEVELS)
    with pytest.raises(BrokenVideoError, match="torchcodec: test failure"):
        decode(path, range(40), DecodeOptions(backends=("torchcodec",), salvage=False))


def test_old_torchvision_is_used_if_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read_video(name: str, pts_unit: str, output_format: str):
        with av.open(name) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return torch.from_numpy(np.stack(pictures)), torch.empty(0), {}

    monkeypatch.setitem(sys.modules, "torchvision.io", SimpleNamespace(read_video=read_video))
    backend_failure.cache_clear()
    try:
        path = write(tmp_path / "a.mp4", LEVELS)
        frames = decode(path, [30, 2], DecodeOptions(backends=("torchvision",)))
    finally:
        backend_failure.cache_clear()
    assert frames.backend == "torchvision"
    assert close(levels(frames.pixels), [LEVELS[30], LEVELS[2]])


@pytest.mark.parametrize("chunk_frames", [1, 7, 40, 100])
def test_chunks_equal_decoding_at_once(tmp_path: Path, chunk_frames: int):
    path = write(tmp_path / "a.mp4", LEVELS)
    whole = decode(path, range(1, 40, 2))
    with open_video(path) as video:
        chunks = list(decode_in_chunks(video, range(1, 40, 2), DecodeOptions(chunk_frames=chunk_frames)))
    assert torch.equal(torch.cat([chunk.pixels for chunk in chunks]), whole.pixels)
    assert torch.equal(torch.cat([chunk.timestamps for chunk in chunks]), whole.timestamps)
    assert [index for chunk in chunks for index in chunk.indices] == list(range(1, 40, 2))
    assert max(len(chunk.indices) for chunk in chunks) <= chunk_frames


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "mpeg4"), ("a.mpg", "mpeg2video")])
def test_skipping_non_reference_frames_changes_no_requested_frame(
    tmp_path: Path, name: str, codec: str, monkeypatch: pytest.MonkeyPatch
):
    """Uses noise, so that a wrong reference changes pixels, and mostly B-frames."""
    rng = np.random.default_rng(0)
    path = tmp_path / name
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 40
        stream.codec_context.max_b_frames = 2
        canvas = rng.integers(0, 255, (48, 200, 3), dtype=np.uint8)
        for i in range(60):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(canvas[:, 2 * i : 2 * i + 64], format="rgb24")))
        output.mux(stream.encode())
    wanted = [3, 17, 18, 44, 59]
    fast = decode(path, wanted, DecodeOptions(backends=("pyav",)))
    monkeypatch.setattr(seeking, "_SKIPPABLE", set())
    everything = decode(path, wanted, DecodeOptions(backends=("pyav",)))
    assert torch.equal(fast.pixels, everything.pixels)


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)])
def test_mirroring_is_applied(tmp_path: Path, matrix: tuple[int, int, int, int]):
    a, b, c, d = matrix
    path = write(tmp_path / "a.mp4", LEVELS[:3])
    plain = decode(path, [1]).pixels
    set_display_matrix(path, a, b, c, d)
    height, width = plain.shape[2:]
    expected = torch.empty(1, 3, *((height, width) if a else (width, height)), dtype=torch.uint8)
    for y in range(height):
        for x in range(width):  # x' = ax + cy, y' = bx + dy, modulo the size
            to_x, to_y = a * x + c * y, b * x + d * y
            expected[..., to_y % expected.shape[2], to_x % expected.shape[3]] = plain[..., y, x]
    found = decode(path, [1], DecodeOptions(backends=("pyav",))).pixels
    shifted = torch.roll(found, (0 if b + d > 0 else 1, 0 if a + c > 0 else 1), (2, 3))
    assert torch.equal(shifted, expected)


def test_a_file_is_reopened_with_the_same_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.h264", LEVELS[:10], container="h264")  # not seekable: reopened
    seen = []

    def opened(*arguments, options, **rest):
        seen.append(options)
        return av.open(*arguments, options=options, **rest)

    with open_video(path, max_frame_pixels=10**8) as video:
        monkeypatch.setattr(seeking, "av", SimpleNamespace(open=opened, error=av.error))
        list(decode_in_chunks(video, [9], STRICT))
    assert [options["max_pixels"] for options in seen] == ["100000000"]
    assert seen[0]["protocol_whitelist"] == "file"


def test_a_missing_file_raises():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        decode("nowhere.mp4", [0])


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n{0}\n", "\ufeff  #extm3u\n{0}\n", "ffconcat version 1.0\nfile {0}\n", "<?xml version='1.0'?><MPD/>"],
)
def test_playlists_are_refused_under_any_name(tmp_path: Path, text: str):
    write(tmp_path / "secret.mp4", LEVELS[:5])
    path = tmp_path / "list.mp4"
    path.write_text(text.format("secret.mp4"), encoding="utf-8")
    with pytest.raises(RefusedSourceError, match=r"list\.mp4 .*playlist"):
        decode(path, [0])


@pytest.mark.parametrize("prefix", ["concat:", "file:", "cache:", "subfile,,start,0,end,0,,:"])
def test_protocol_strings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str):
    path = write(tmp_path / "a.mp4", LEVELS[:5])
    with pytest.raises(
        RefusedSourceError, match=f"'{prefix[: prefix.index(',') + 1] if ',' in prefix else prefix}'.*protocol"
    ):
        probe(f"{prefix}{path}")
    path.rename(tmp_path / f"{prefix}a.mp4")
    monkeypatch.chdir(tmp_path)
    assert probe(f"./{prefix}a.mp4").num_frames == 5  # a file with this name


@pytest.mark.skipif(REAL is None, reason="BLUEBERRY_TEST_VIDEOS is not set to a folder of real clips")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nasa_13013.mp4", (390, 29.97, 270, 480)),
        ("h264_10bits.mp4", (30, 30.0, 200, 200)),
        ("h265_10bits.mp4", (30, 30.0, 200, 200)),
        ("h265_video.mp4", (10, 10.0, 128, 128)),
        ("av1_video.mkv", (125, 25.0, 360, 640)),
        ("arm_wrestling.mp4", (280, 28.0, 256, 340)),
        ("action.avi", (164, 25.0, 240, 320)),
    ],
)
def test_real_files_equal_sequential_decoding(name: str, expected: tuple):
    path = Path(REAL or "", name)
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (expected[0], *expected[2:])
    assert info.fps == pytest.approx(expected[1], abs=0.01)
    wanted = [info.num_frames - 1, 0, info.num_frames // 2, 3, 3]
    reference = {}
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(container.streams.best("video"))):
            if i in wanted:
                reference[i] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    frames = decode(path, wanted, DecodeOptions(backends=("pyav",)))
    if "10bits" not in name:  # a direct swscale call rounds 10-bit colors differently
        assert torch.equal(frames.pixels, torch.stack([reference[i] for i in wanted]))
    if "torchcodec" in WORKING and name != "action.avi":  # its packets have no true timestamps
        assert torch.equal(frames.pixels, decode(path, wanted, DecodeOptions(backends=("torchcodec",))).pixels)
