"""Unusual video files written by ffmpeg, decoded by every backend and by the fallback chain.

The reference is the output of the ffmpeg program, a different build of FFmpeg. Each backend returns exactly those
frames or raises. The fallback chain returns them wherever PyAV does.
"""

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from blueberry_video.video.backends import READERS, backend_failure
from blueberry_video.video.container import probe
from blueberry_video.video.decode import DecodeOptions, decode
from blueberry_video.video.errors import BrokenVideoError, LimitError

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="the files are written by ffmpeg, which is not installed"
)

SOURCE = "-f lavfi -i testsrc2=size=160x120:rate=30:duration=2"
H264 = "-pix_fmt yuv420p -c:v libx264"
ODD = {  # file name: arguments of ffmpeg; an input file is listed in NEEDS
    "cfr.mp4": f"{SOURCE} {H264}",
    "vfr.mp4": f"{SOURCE} -vf select='if(lt(t\\,1)\\,1\\,not(mod(n\\,6)))' -fps_mode vfr {H264}",
    "vfr.mkv": f"{SOURCE} -vf select='if(lt(t\\,1)\\,1\\,not(mod(n\\,6)))' -fps_mode vfr {H264}",
    "wrong_rate.mp4": f"{SOURCE} -vf setpts=3*PTS -r 30 -fps_mode passthrough {H264}",
    "rotated_90.mp4": "-i cfr.mp4 -c copy -metadata:s:v rotate=90",
    "rotated_180.mp4": "-i cfr.mp4 -c copy -metadata:s:v rotate=180",
    "rotated_270.mp4": "-i cfr.mp4 -c copy -metadata:s:v rotate=270",
    "no_duration.mkv": f"{SOURCE} {H264} -live 1",
    "edit_list.mp4": "-ss 0.7 -i cfr.mp4 -c copy -avoid_negative_ts disabled",
    "late.ts": f"{SOURCE} {H264} -output_ts_offset 3600",
    "negative.mkv": "-itsoffset -1 -i cfr.mp4 -c copy -avoid_negative_ts disabled",
    "fragmented.mp4": f"{SOURCE} {H264} -movflags frag_keyframe+empty_moov",
    "raw.h264": f"{SOURCE} {H264}",
    "open_gop.mp4": f"{SOURCE} {H264} -x264-params open-gop=1:keyint=12:bframes=3",
    "intra_refresh.mp4": f"{SOURCE} {H264} -x264-params intra-refresh=1:keyint=12",
    "interlaced.mp4": f"{SOURCE} {H264} -x264-params interlaced=1 -flags +ildct+ilme",
    "hevc.mp4": f"{SOURCE} -pix_fmt yuv420p -c:v libx265 -x265-params log-level=none:open-gop=1:keyint=12",
    "vp8.webm": f"{SOURCE} -c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -b:v 200k -deadline realtime -cpu-used 8",
    "vp9.webm": f"{SOURCE} -c:v libvpx-vp9 -speed 8",
    "av1.mkv": f"{SOURCE} -c:v libsvtav1 -preset 12",
    "mjpeg.avi": f"{SOURCE} -c:v mjpeg",
    "mpeg4.avi": f"{SOURCE} -c:v mpeg4 -bf 2",
    "h264.avi": f"{SOURCE} {H264} -bf 3",
    "h264.asf": f"{SOURCE} {H264} -bf 3",
    "xvid.avi": f"{SOURCE} -c:v libxvid -bf 2",
    "h264.nut": f"{SOURCE} {H264} -bf 3",
    "real.rm": f"{SOURCE} -c:v rv20",
    "mpeg2.mpg": f"{SOURCE} -c:v mpeg2video -bf 2",
    "wmv.wmv": f"{SOURCE} -c:v wmv2",
    "flash.flv": f"{SOURCE} -c:v flv1",
    "theora.ogv": f"{SOURCE} -c:v libtheora",
    "prores.mov": f"{SOURCE} -c:v prores",
    "alpha.mov": f"{SOURCE} -c:v qtrle -pix_fmt argb",
    "animation.gif": f"{SOURCE} -t 1",
    "yuv444.mp4": f"{SOURCE} -vf scale=161:121 -pix_fmt yuv444p -c:v libx264",
    "odd_size.webm": f"{SOURCE} -vf scale=161:121 -pix_fmt yuv420p -c:v libvpx-vp9 -speed 8",
    "ten_bit.mp4": f"{SOURCE} -pix_fmt yuv420p10le -c:v libx264",
    "full_range.mp4": f"{SOURCE} -vf scale=out_range=pc -color_range pc {H264}",
    "bt709.mp4": f"{SOURCE} -vf scale=out_color_matrix=bt709 -colorspace bt709 {H264}",
    "hdr.mp4": f"{SOURCE} -pix_fmt yuv420p10le -c:v libx265 -x265-params log-level=none -color_trc smpte2084 "
    "-color_primaries bt2020 -colorspace bt2020nc",
    "gray.mp4": f"{SOURCE} -pix_fmt gray -c:v libx264",
    "one_frame.mp4": f"{SOURCE} -frames:v 1 {H264}",
    "video_and_cover.mp4": "-i cfr.mp4 -i cover.jpg -map 0 -map 1 -c copy -disposition:v:1 attached_pic",
    "only_cover.m4a": "-f lavfi -i sine=d=1 -i cover.jpg -map 0 -map 1 -c:v copy -disposition:v attached_pic",
    "only_cover.mp3": "-f lavfi -i sine=d=1 -i cover.jpg -map 0 -map 1 -c:v copy -disposition:v attached_pic",
}
NEEDS = {"cfr.mp4": f"{SOURCE} {H264}", "cover.jpg": f"{SOURCE} -frames:v 1"}
BACKENDS = [name for name in READERS if backend_failure(name) is None]
STRICT = DecodeOptions(salvage=False)


def run(folder: Path, arguments: str, name: str) -> Path:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *arguments.replace("'", "").split(), name], cwd=folder, check=True)
    return folder / name


def make(folder: Path, name: str) -> Path:
    for needed, arguments in NEEDS.items():
        if needed in ODD[name]:
            run(folder, arguments, needed)
    return run(folder, ODD[name], name)


def truth(path: Path, height: int, width: int) -> torch.Tensor:
    """Frames decoded by the ffmpeg program, uint8 (T, 3, H, W)."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    output = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True)
    pixels = np.frombuffer(output.stdout, np.uint8).reshape(-1, height, width, 3)
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    # inverse transforms of MPEG-4 and WMV differ by up to two levels between versions of FFmpeg
    assert int((found.short() - expected.short()).abs().max()) <= 2


@pytest.mark.parametrize("name", ODD)
def test_every_backend_returns_the_reference_frames_or_raises(tmp_path: Path, name: str):
    path = make(tmp_path, name)
    info = probe(path)
    expected = truth(path, info.height, info.width)
    assert info.num_frames == len(expected)
    assert info.damage == ""  # a whole file is not taken for a cut one
    some = sorted({0, 1, len(expected) // 3, len(expected) // 2, len(expected) - 1} & set(range(len(expected))))
    for backend in BACKENDS:
        try:
            frames = decode(path, some, DecodeOptions(backends=(backend,), salvage=False))
        except BrokenVideoError as error:
            assert backend != "pyav"
            assert f"({backend}: " in str(error)  # noqa: PT017 (backends differ between machines)
            continue
        assert_same(frames.pixels, expected[some])
        assert frames.timestamps.tolist() == pytest.approx(info.timestamps[some].tolist())
    everything = decode(path, range(len(expected)), STRICT)
    assert_same(everything.pixels, expected)
    assert not everything.missing.any()


@pytest.mark.parametrize(
    ("name", "fps", "frames"),
    [
        ("vfr.mp4", 34 / (54 / 30), 35),
        ("wrong_rate.mp4", 10, 60),
        ("edit_list.mp4", 30, 39),
        ("raw.h264", 30, 60),
        ("no_duration.mkv", 30, 60),
        ("negative.mkv", 30, 60),  # packets without timestamps
        ("only_cover.m4a", 0, 1),
        ("one_frame.mp4", 30, 1),
    ],
)
def test_fps_is_computed_from_the_frames(tmp_path: Path, name: str, fps: float, frames: int):
    info = probe(make(tmp_path, name))
    assert info.num_frames == frames
    assert info.fps == pytest.approx(fps, rel=2e-3)


def test_a_start_time_other_than_zero_is_kept(tmp_path: Path):
    assert probe(make(tmp_path, "late.ts")).timestamps[0] == pytest.approx(3600, abs=2)


def damaged(folder: Path) -> Path:
    path = run(folder, f"{SOURCE} {H264} -movflags +faststart", "whole.mp4")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = random.Random(1).randbytes(2000)
    (folder / "damaged.mp4").write_bytes(content)
    return folder / "damaged.mp4"


def test_a_damaged_file_is_salvaged_with_a_mask(tmp_path: Path):
    path = damaged(tmp_path)
    with pytest.raises(BrokenVideoError, match=r"damaged\.mp4 .*pyav: .*salvage=true"):
        decode(path, range(60), STRICT)
    frames = decode(path, range(60))
    assert frames.backend == "pyav (salvage)"
    assert "pyav" in frames.failures
    assert 1 <= int(frames.missing.sum()) <= 10
    whole = truth(tmp_path / "whole.mp4", 120, 160)
    good = ~(frames.missing | frames.suspect)
    assert int(good.sum()) > 20
    assert_same(frames.pixels[good], whole[good])
    wrong = (frames.pixels.float() - whole.float()).abs().mean(dim=(1, 2, 3)) > 1
    assert wrong[frames.suspect].float().mean() > 0.5  # this file has no keyframe after the damage
    gap = int(frames.missing.nonzero()[-1])
    assert any(torch.equal(frames.pixels[gap], frames.pixels[near]) for near in (gap - 1, gap - 2, gap + 1))


def test_frames_after_a_keyframe_are_not_suspect(tmp_path: Path):
    path = run(tmp_path, f"{SOURCE} {H264} -g 15 -movflags +faststart", "whole.mp4")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = random.Random(1).randbytes(600)
    (tmp_path / "damaged.mp4").write_bytes(content)
    frames = decode(tmp_path / "damaged.mp4", range(60))
    good = ~(frames.missing | frames.suspect)
    assert not good.all()
    assert good[:15].all()
    assert good[-15:].all()
    assert_same(frames.pixels[good], truth(path, 120, 160)[good])


def test_a_truncated_file_is_salvaged_with_a_mask(tmp_path: Path):
    path = run(tmp_path, f"{SOURCE} {H264} -movflags +faststart", "whole.mp4")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 8 // 10])
    with pytest.raises(BrokenVideoError, match=r"cut\.mp4 .*\b60 frames.*salvage=true"):
        decode(cut, [0], STRICT)
    frames = decode(cut, range(60))
    good = ~(frames.missing | frames.suspect)
    assert 30 < int(good.sum()) < 60
    assert frames.missing[-5:].all()
    whole = dict(zip(probe(path).timestamps.round(3).tolist(), truth(path, 120, 160)))
    times = frames.timestamps[good].numpy().round(3).tolist()  # frame indices differ from those of the whole file
    assert_same(frames.pixels[good], torch.stack([whole[time] for time in times]))
    with pytest.raises(BrokenVideoError, match=r"max_missing_share=0\.01"):
        decode(cut, range(60), DecodeOptions(max_missing_share=0.01))


def test_frames_with_exif_data_are_decoded(tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    for i in range(5):
        Image.new("RGB", (64, 48), (40 * i, 0, 0)).save(tmp_path / f"{i}.jpg", exif=exif)
    path = run(tmp_path, "-framerate 5 -i %d.jpg -c copy", "exif.mov")
    assert [round(level) for level in decode(path, range(5)).pixels[:, 0].float().mean(dim=(1, 2)).tolist()] == [
        pytest.approx(40 * i, abs=3) for i in range(5)
    ]


def test_a_long_mjpeg_file_is_a_video(tmp_path: Path):
    path = run(tmp_path, f"{SOURCE} -vf noise=alls=40 -q:v 2 -c:v mjpeg -f mjpeg", "long.mjpeg")
    assert path.stat().st_size > 300_000
    assert decode(path, [0, 59]).indices == (0, 59)


def test_a_header_with_more_frames_than_bytes_raises(tmp_path: Path):
    path = run(tmp_path, f"{SOURCE} {H264}", "claims.mp4")
    content = bytearray(path.read_bytes())
    sizes = content.index(b"stsz") + 8
    content[sizes : sizes + 8] = (1).to_bytes(4, "big") + (2_000_000).to_bytes(4, "big")  # one byte each
    times = content.index(b"stts") + 12
    content[times : times + 4] = (2_000_000).to_bytes(4, "big")
    chunks = content.index(b"stsc") + 16
    content[chunks : chunks + 4] = (2_000_000).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(LimitError, match=rf"claims\.mp4 .*2000000 frames.*\b{len(content)} bytes"):
        probe(path)


def test_frames_of_a_different_size_are_scaled_to_the_first(tmp_path: Path):
    large = run(tmp_path, f"-f lavfi -i testsrc2=size=160x120:rate=30:duration=0.5 {H264}", "large.h264")
    small = run(tmp_path, f"-f lavfi -i testsrc2=size=80x60:rate=30:duration=0.5 {H264}", "small.h264")
    path = tmp_path / "changes.h264"
    path.write_bytes(large.read_bytes() + small.read_bytes())
    frames = decode(path, range(30), STRICT)
    assert frames.pixels.shape == (30, 3, 120, 160)
    assert_same(frames.pixels[:15], truth(large, 120, 160))
    shrunk = torch.nn.functional.interpolate(frames.pixels[15:].float(), (60, 80), mode="area")
    distance = [(shrunk[8] - frame.float()).abs().mean().item() for frame in truth(small, 60, 80)]
    assert distance[8] == min(distance)  # the correct frame, not a similar adjacent one


@pytest.mark.parametrize(
    ("name", "make_it"),
    [
        ("audio.m4a", "-f lavfi -i sine=d=1"),
        ("empty.mp4", b""),
        ("text.mp4", b"this is no video at all\n" * 9),
        ("no_moov.mp4", "cut"),
    ],
)
def test_a_file_without_video_raises_one_short_error(tmp_path: Path, name: str, make_it: str | bytes):
    path = tmp_path / name
    if isinstance(make_it, bytes):
        path.write_bytes(make_it)
    elif make_it == "cut":
        path.write_bytes(run(tmp_path, f"{SOURCE} {H264}", "whole.mp4").read_bytes()[:10000])
    else:
        run(tmp_path, make_it, name)
    with pytest.raises(BrokenVideoError, match=name) as caught:
        decode(path, [0])
    assert len(str(caught.value)) < 500


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path: Path):
    bomb = run(tmp_path, "-f lavfi -i color=black:size=8192x8192:rate=5:duration=1 -preset ultrafast", "bomb.mp4")
    with pytest.raises(LimitError, match=r"bomb\.mp4 .*8192x8192.*max_frame_pixels=35651584"):
        probe(bomb)
