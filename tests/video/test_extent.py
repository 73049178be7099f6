"""Files that were cut: which containers tell, where it is reported, and that whole files are not taken for cut ones."""

import csv
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.video import VideoProcessor, load_settings, process_video, stream_video
from blueberry_video.video import extent as extents
from blueberry_video.video.command import main
from blueberry_video.video.container import probe
from blueberry_video.video.decode import DecodeOptions, decode
from blueberry_video.video.errors import BrokenVideoError, DamagedVideoError
from blueberry_video.video.extent import find_cut
from blueberry_video.video.scenes import video_streams
from blueberry_video.video.sniff import sniff

WRITTEN = {  # file name: codec, options of the container
    "whole.mp4": ("libx264", {}),
    "faststart.mp4": ("libx264", {"movflags": "+faststart"}),
    "fragmented.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "indexed.mp4": ("libx264", {"movflags": "dash+global_sidx+frag_keyframe"}),
    "whole.mov": ("mpeg4", {}),
    "whole.mkv": ("libx264", {}),
    "live.mkv": ("libx264", {"live": "1", "cluster_time_limit": "300"}),
    "whole.webm": ("libvpx", {}),
    "whole.avi": ("mpeg4", {}),
    "whole.ogv": ("libvpx", {}),
    "whole.flv": ("flv", {}),
    "streamed.flv": ("flv", {"flvflags": "no_duration_filesize"}),
    "whole.wmv": ("wmv2", {}),
    "whole.ts": ("libx264", {}),
}
REAL = sorted(Path(os.environ.get("BLUEBERRY_TEST_VIDEOS", "/nowhere")).glob("*.*"))


def write(folder: Path, name: str, num_frames: int = 60) -> Path:
    codec, options = WRITTEN[name]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (64, 200, 3), dtype=np.uint8)
    form = "ogg" if name.endswith(".ogv") else None
    with av.open(str(folder / name), "w", format=form, options=options) as output:
        stream = output.add_stream(codec, rate=30, options={"g": "10"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[:, i : i + 96]), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 30)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return folder / name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {name: write(folder, name) for name in WRITTEN}


def cut(path: Path, content: bytes, at: int) -> extents.Cut | None:
    path.write_bytes(content[:at])
    return find_cut(path, sniff(path, path.name))


@pytest.mark.parametrize("name", WRITTEN)
def test_whole_files_have_their_end(files: dict[str, Path], tmp_path: Path, name: str):
    content, path = files[name].read_bytes(), tmp_path / name
    assert cut(path, content, len(content)) is None
    for padding in (b"\0" * 8, b"\0" * 5000, b"TAGtitle" + bytes(120), b"\xff" * 64, b"appended text\n" * 20):
        if name != "whole.ts" or padding[0] != ord("G"):
            path.write_bytes(content + padding)
            assert find_cut(path, sniff(path, name)) is None, padding[:10]
    assert probe(files[name]).damage == ""
    assert process_video(files[name], num_frames=4, measure_quality=False).metadata.damage == ""


@pytest.mark.skipif(not REAL, reason="BLUEBERRY_TEST_VIDEOS is not set to a folder of videos")
def test_real_files_have_their_end(tmp_path: Path):
    compared = 0
    for path in REAL:
        if path.suffix != ".md":
            assert find_cut(path, sniff(path, path.name)) is None, path
            content = path.read_bytes()
            found = cut(tmp_path / path.name, content, len(content) // 2)
            assert found is not None
            assert len(content) // 2 < (found.declared or 0) <= len(content)
            compared += 1
    assert compared >= 5


# containers whose header names the end of the file
@pytest.mark.parametrize("name", ["faststart.mp4", "indexed.mp4", "whole.mkv", "whole.webm", "whole.avi", "whole.flv"])
def test_a_cut_is_found_with_the_bytes_of_the_whole_file(files: dict[str, Path], tmp_path: Path, name: str):
    content = files[name].read_bytes()
    for at in [*range(2000, len(content) - 16, 1009), len(content) - 16]:
        found = cut(tmp_path / name, content, at)
        assert found is not None, at
        assert found.held == at
        # a box that is cut ends before those that follow it
        assert found.declared == len(content) or (name.endswith("mp4") and at < found.declared < len(content)), at
        assert f"{at} of {found.declared} bytes" in str(found)


@pytest.mark.parametrize("name", ["whole.mp4", "whole.mov", "live.mkv", "streamed.flv", "whole.wmv", "whole.ogv"])
def test_a_cut_is_found_where_a_part_is_cut(files: dict[str, Path], tmp_path: Path, name: str):
    content = files[name].read_bytes()
    cuts = [*range(3000, len(content) - 200, 1009)]
    found = [cut(tmp_path / name, content, at) for at in cuts]
    assert len(cuts) > 10
    assert all(extent is not None for extent in found)
    assert all(at < (extent.declared or at + 1) <= len(content) for at, extent in zip(cuts, found))


def test_fragments_that_are_cut_are_found_and_missing_ones_cannot_be(files: dict[str, Path], tmp_path: Path):
    content = files["fragmented.mp4"].read_bytes()
    last = content.rindex(b"moof") - 4
    assert cut(tmp_path / "a.mp4", content, last) is None
    found = cut(tmp_path / "a.mp4", content, last + 3000)
    assert found is not None
    assert found.held == last + 3000


def test_an_excerpt_of_a_transport_stream_is_reported_by_its_last_packet(files: dict[str, Path], tmp_path: Path):
    content = files["whole.ts"].read_bytes()
    assert cut(tmp_path / "a.ts", content, 188 * 50) is None
    found = cut(tmp_path / "a.ts", content, 188 * 50 + 70)
    assert str(found).startswith(f"incomplete: {188 * 50 + 70} bytes, its last packet has 70 of 188 bytes")
    assert found is not None
    assert found.declared is None
    assert len(decode(tmp_path / "a.ts", [0], DecodeOptions(salvage=False)).indices) == 1  # not refused


def test_ogg_without_the_page_that_ends_it_is_reported(files: dict[str, Path], tmp_path: Path):
    content = files["whole.ogv"].read_bytes()
    last = content.rindex(b"OggS")
    found = cut(tmp_path / "a.ogv", content, last)
    assert found is not None
    assert found.declared is None
    assert "incomplete" in process_video(tmp_path / "a.ogv", num_frames=4).metadata.damage
    found = cut(tmp_path / "a.ogv", content, last + 20)  # within the header of the page
    assert found is not None
    assert found.declared == last + 28


def riff(kind: bytes, length: int, size: int | None = None) -> bytes:
    return b"RIFF" + struct.pack("<I", length + 4 if size is None else size) + kind + bytes(length)


def judged(content: bytes, kind: str) -> extents.Cut | None:
    return extents._JUDGES[kind](lambda start, count: content[start : start + count], len(content))


def test_sizes_of_avi_files():
    assert judged(riff(b"AVI ", 1000), "avi") is None
    assert judged(riff(b"AVI ", 1001) + b"\0", "avi") is None
    for unknown in (0, 0xFFFFFFFF, 0x7FFFFFFF):  # not finished, or written to a pipe
        assert judged(riff(b"AVI ", 1000, unknown), "avi") is None
    assert judged(riff(b"AVI ", 1000, 1012), "avi") is None  # counts its header, as some writers do
    assert judged(riff(b"AVI ", 1000)[:-9], "avi") == extents.Cut(1003, 1012, "its RIFF chunk has 1003 of 1012 bytes")
    several = riff(b"AVI ", 1000) + riff(b"AVIX", 500) + riff(b"AVIX", 300)  # OpenDML
    assert judged(several, "avi") is None
    assert judged(several + bytes(100), "avi") is None
    found = judged(several[:-100], "avi")
    assert found is not None
    assert found.declared == len(several)
    last = judged(several[:-312], "avi")
    assert last is None  # without its last chunk, which the first does not mention


def box(kind: bytes, payload: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">I4s", 8 + len(payload) if length is None else length, kind) + payload


def test_sizes_of_mp4_files():
    start = box(b"ftyp", b"isom") + box(b"free")
    assert judged(start + box(b"mdat", bytes(900)) + box(b"moov", bytes(80)), "mov") is None
    assert judged(start + box(b"moov", bytes(80)) + box(b"mdat", bytes(900), 0), "mov") is None  # to the end
    wide = struct.pack(">I4sQ", 1, b"mdat", 16 + 900) + bytes(900)  # of 64 bits
    assert judged(start + wide + box(b"moov", bytes(80)), "mov") is None
    found = judged(start + wide[:-100], "mov")
    assert found is not None
    assert found.declared == len(start) + 916
    assert "'moov'" in str(found)
    unfinished = judged(start + box(b"mdat", bytes(900), 0), "mov")
    assert unfinished is not None
    assert unfinished.declared is None
    assert "'moov'" in unfinished.lacks
    assert judged(start + box(b"moov", bytes(80)), "mov") is None  # an initialization segment
    assert judged(start + box(b"moov") + box(b"mdat", bytes(9)) + box(b"abcd", b"x", 10**6), "mov") is None  # a trailer


def test_few_bytes_are_read(tmp_path: Path):
    path = tmp_path / "long.mp4"
    with path.open("wb") as file:
        file.write(box(b"ftyp", b"isom") + box(b"moov", bytes(80)))
        for _ in range(20_000):  # of 4 kB, as fragments of a live recording
            file.write(box(b"mdat", b"", 4096))
            file.seek(4088, 1)
        file.write(box(b"mdat", b"", 2**31 - 1))
    reads: list[int] = []
    with path.open("rb", buffering=0) as file:

        def read(start: int, count: int) -> bytes:
            reads.append(count)
            file.seek(start)
            return file.read(count)

        assert extents._JUDGES["mov"](read, path.stat().st_size) is None  # too many parts to tell
    assert len(reads) <= extents.MAX_READS
    assert sum(reads) <= 2**18


@pytest.mark.parametrize("name", ["whole.mkv", "whole.webm", "whole.avi", "whole.ogv", "faststart.mp4", "whole.flv"])
def test_a_lost_tail_is_reported_everywhere(files: dict[str, Path], tmp_path: Path, name: str):
    content = files[name].read_bytes()
    at = len(content) * 7 // 10
    path = tmp_path / "videos" / name
    path.parent.mkdir()
    path.write_bytes(content[:at])
    says = f"incomplete: {at} of "
    info = probe(path)
    assert info.damage.startswith(says)
    frames = decode(path, [0, 1])
    assert frames.damage == info.damage
    assert not frames.missing.any()
    video = process_video(path, num_frames=4, cache_memory_bytes=10**7)
    assert video.metadata.damage == info.damage
    assert video.summary()["metadata"]["damage"] == info.damage
    assert says in repr(video)
    assert {chunk.damage for chunk in stream_video(path, num_frames=4)} == {info.damage}
    with pytest.raises(DamagedVideoError, match=says):
        decode(path, [0, 1], DecodeOptions(salvage=False))
    (path.parent / f"good{path.suffix}").write_bytes(content)
    folder = VideoFolder(tmp_path, 4, metadata="none", max_broken_share=0.5, skipped_file=str(tmp_path / "skipped.csv"))
    assert {folder[i]["id"] for i in range(2)} == {f"good{path.suffix}"}
    [row] = [row for row in csv.reader((tmp_path / "skipped.csv").open()) if row[1] == path.name]
    assert says in row[2]
    assert "copy it again" in row[2]


def test_a_cached_video_keeps_its_damage(files: dict[str, Path], tmp_path: Path):
    path = tmp_path / "a.mkv"
    path.write_bytes(files["whole.mkv"].read_bytes()[:-3000])
    processor = VideoProcessor(load_settings("qwen2.5-vl", {"num_frames": 4, "cache_folder": str(tmp_path / "cache")}))
    first, second = processor(path), processor(path)
    assert (first.cached, second.cached) == (False, True)
    assert first.metadata.damage == second.metadata.damage != ""


def test_the_command_prints_the_damage(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "a.mkv"
    path.write_bytes(files["whole.mkv"].read_bytes()[:-3000])
    assert main([str(path), "num_frames=4"]) == 0
    assert (
        f"damage   incomplete: {path.stat().st_size} of {path.stat().st_size + 3000} bytes" in capsys.readouterr().out
    )
    path = tmp_path / "a.mp4"
    path.write_bytes(files["whole.mp4"].read_bytes()[:9000])
    assert main([str(path)]) == 1
    assert "incomplete: 9000 of " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["whole.mp4", "whole.mov"])
def test_a_file_without_its_index_raises_that_it_is_incomplete(files: dict[str, Path], tmp_path: Path, name: str):
    content = files[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: len(content) // 2])
    calls = (lambda: decode(path, [0]), lambda: process_video(path), lambda: probe(path), lambda: video_streams(path))
    for attempt in calls:
        with pytest.raises(
            BrokenVideoError, match=rf"{name} is incomplete: {len(content) // 2} of \d+ bytes.*moov.*copy it"
        ):
            attempt()
    end = content.rindex(b"moov") - 4  # all pictures, and no index
    path.write_bytes(content[:end])
    with pytest.raises(BrokenVideoError, match=rf"{name} is incomplete: {end} bytes.*moov.*copy it again"):
        decode(path, [0])


def test_mp4_whose_frames_are_all_there_is_reported_but_not_refused(files: dict[str, Path], tmp_path: Path):
    """As a file with its sound or its free space cut off."""
    content = files["faststart.mp4"].read_bytes() + box(b"free", bytes(100), 5000)
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    frames = decode(path, range(60), DecodeOptions(salvage=False))
    assert frames.damage.startswith(f"incomplete: {len(content)} of {len(content) + 4892} bytes")
    assert not frames.missing.any()
