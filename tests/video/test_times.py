"""Frames and durations at a variable frame rate: held frames, gaps, any first timestamp, durations of single frames.

The expected frame at a time is the last one with a timestamp at or before it, found here by a loop over fractions.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blueberry_video.video import process_video
from blueberry_video.video.container import probe
from blueberry_video.video.frame_list import Animation
from blueberry_video.video.sampling import SamplingOptions, choose
from blueberry_video.video.scenes import find_scenes, split
from blueberry_video.video.source_options import SourceOptions
from blueberry_video.video.times import every_interval, frame_rate, on_screen, time_range

MILLISECOND = Fraction(1, 1000)


def write(
    path: Path,
    starts: Sequence[int],
    last: int,
    codec: str = "libx264",
    base: Fraction = MILLISECOND,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes frames with gray level 20 + 10 i at ``starts``, the last one shown for ``last``, in units of ``base``.
    Packets have the display time of their frame, which encoders do not pass on."""
    shown = dict(zip(starts, [*np.diff(starts).tolist(), last]))
    with av.open(str(path), "w", options=options or {}) as output:
        stream = output.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = base
        packets = []
        for i, start in enumerate(starts):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 + 10 * i % 200, np.uint8), format="rgb24")
            frame.pts, frame.time_base = start, base
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            packet.duration = shown[round(packet.pts * packet.time_base / base)]
            output.mux(packet)
    return path


def shown_at(starts: Sequence[Fraction], time: Fraction) -> int:
    return max([i for i, start in enumerate(starts) if start <= time], default=0)


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    st.integers(-4000, 10**9),
    st.sampled_from([Fraction(1, 1000), Fraction(1001, 30000), Fraction(1, 90000), Fraction(1, 12800)]),
)
@settings(max_examples=60, deadline=None)
def test_the_frame_on_screen_is_the_last_that_has_begun(gaps: list[int], first: int, base: Fraction):
    starts = [(first + sum(gaps[:i])) * base for i in range(len(gaps) + 1)]
    times = np.array([float(start) for start in starts])
    assert on_screen(times, times) == list(range(len(times)))  # its own time gives each frame
    steps = [starts[0] + (starts[-1] - starts[0]) * Fraction(k, 17) for k in range(18)]
    # a time within the tolerance before a frame belongs to that frame
    wanted = [shown_at(starts, step + Fraction(1, 10**6)) for step in steps]
    assert on_screen(times, np.array([float(step) for step in steps])) == wanted
    count = min(6, len(times) // 2 * 2)
    if count:
        even = [starts[0] + (starts[-1] - starts[0]) * Fraction(k, count - 1) for k in range(count)]
        chosen = choose(times, SamplingOptions(num_frames=count, by_time=True))
        assert chosen == [shown_at(starts, time + Fraction(1, 10**6)) for time in even]


SLIDES = np.array([0.0, 5.0, 7.0, 12.0])  # pictures shown for 5, 2, 5 and 8 s
SLIDES_SECONDS = 20.0


def test_times_within_held_frames_have_the_held_frame():
    assert on_screen(SLIDES, np.array([-1.0, 0.0, 4.999, 5.0, 6.9, 11.0, 12.0, 99.0])) == [0, 0, 0, 1, 1, 2, 3, 3]
    options = SamplingOptions(num_frames=4, by_time=True)
    assert choose(SLIDES, options) == [0, 0, 2, 3]  # at 0, 4, 8 and 12 s; 5 is nearer to 4
    assert choose(SLIDES, options, duration=SLIDES_SECONDS) == [0, 1, 2, 3]  # at 0, 5.33, 10.67 and 16 s
    assert every_interval(SLIDES, 5.0, min_frames=1, frame_factor=1, end=SLIDES_SECONDS) == [0, 1, 2, 3]
    duration = SamplingOptions(sampling="duration", base_interval=10.0, min_frames=1)
    assert choose(SLIDES, duration, duration=SLIDES_SECONDS) == [0, 3]


def test_ranges_begin_with_a_held_frame():
    motion = np.array([*np.arange(10) / 10, 9.0, 9.1, 9.2])  # the tenth frame is on screen from 0.9 to 9 s
    assert time_range(motion, 4.0, 9.1) == (9, 11)
    assert time_range(motion, 4.0) == (9, 12)
    assert time_range(motion, 8.9, 9.1) == (10, 11)  # for less than two mean intervals of 0.77 s from there on
    assert time_range(motion, 8.9, 9.1, by_time=True) == (9, 11)
    assert choose(motion, SamplingOptions(sampling="duration", base_interval=0.1, video_start=8.9))[0] == 9
    # evenly from 4 s on, not from the start of the held frame
    assert choose(motion, SamplingOptions(num_frames=2, by_time=True, video_start=4.0)) == [9, 12]
    assert choose(motion, SamplingOptions(num_frames=4, by_time=True, video_start=4.0, frame_factor=4)) == [9, 9, 9, 12]
    late = SamplingOptions(num_frames=2, by_time=True, video_start=8.0, video_end=9.1, frame_factor=1)
    assert choose(motion, late) == [9, 11]


def test_ranges_within_the_last_frame():
    for by_time in (False, True):
        assert time_range(SLIDES, 15.0, 18.0, SLIDES_SECONDS, by_time) == (3, 3)
        assert time_range(SLIDES, 15.0, duration=SLIDES_SECONDS, by_time=by_time) == (3, 3)
        with pytest.raises(ValueError, match=r"video_start=20\.0 .*0 to 20 s"):
            time_range(SLIDES, 20.0, duration=SLIDES_SECONDS, by_time=by_time)


@pytest.mark.parametrize("rate", [23.976, 30000 / 1001, 50, 119.88])
def test_a_range_at_a_constant_rate_begins_with_the_next_frame(rate: float):
    times = np.arange(500) / rate + 1e4
    for start in np.random.default_rng(0).uniform(0, 400 / rate, 100):
        assert time_range(times, start)[0] == int(np.ceil(start * rate))  # as in qwen-vl-utils
        assert time_range(times, start, by_time=True)[0] == int(start * rate)
    for i in range(0, 500, 7):
        assert time_range(times, i / rate, i / rate) == (i, i)
        assert time_range(times, i / rate, i / rate, by_time=True) == (i, i)


def test_the_rate_counts_the_display_time_of_the_last_frame():
    times = np.arange(10) / 10
    assert frame_rate(times) == frame_rate(times, 1.0) == 10
    assert frame_rate(times, 5.9) == pytest.approx(10 / 5.9)
    assert frame_rate(np.arange(60) * 1001 / 30000, 60 * 1001 / 30000) == 30000 / 1001
    assert len(choose(times, SamplingOptions(fps=1.0))) == 4  # min_frames
    assert len(choose(times, SamplingOptions(fps=1.0), duration=6.0)) == 6


@pytest.mark.parametrize(
    ("name", "codec"),
    [("slides.mkv", "mpeg4"), ("slides.mkv", "libx264"), ("slides.mp4", "mpeg4"), ("fragmented.mp4", "mpeg4")],
)
def test_duration_of_a_file_ends_with_its_last_frame(tmp_path: Path, name: str, codec: str):
    options = {"movflags": "frag_keyframe+empty_moov"} if name == "fragmented.mp4" else {}
    info = probe(write(tmp_path / name, [0, 5000, 7000, 12000], 8000, codec, options=options))
    assert info.num_frames == 4
    assert (info.timestamps - info.timestamps[0]).tolist() == pytest.approx(SLIDES.tolist())
    assert info.duration == pytest.approx(SLIDES_SECONDS, abs=2e-3)


@pytest.mark.parametrize("options", [{}, {"movflags": "frag_keyframe+empty_moov"}])
def test_duration_of_mp4_with_reordered_frames_is_that_of_the_header(tmp_path: Path, options: dict[str, str]):
    """The durations in mp4 are those from one packet to the next, which B-frames separate from their display times:
    that of the last frame is 2 s here. The header has the sum, which is not 20 s either, but all that the file says.
    """
    path = write(tmp_path / "a.mp4", [0, 5000, 7000, 12000], 8000, options=options)
    info = probe(path)
    with av.open(str(path)) as container:
        [stream] = container.streams.video
        assert info.duration == pytest.approx(float(stream.duration * stream.time_base), abs=2e-3) == 17.0


def test_duration_of_the_last_block_counts_in_matroska(tmp_path: Path):
    path = write(tmp_path / "a.mkv", [0, 100, 200, 300], 4000, "mpeg4")
    assert probe(path).duration == pytest.approx(4.3)
    process_video(path, max_duration=4.4)
    shorter = write(tmp_path / "b.mkv", [0, 100, 200, 300], 10, "mpeg4")
    assert probe(shorter).duration == pytest.approx(0.31)


@pytest.mark.parametrize("name", ["a.flv", "a.wmv"])
def test_duration_in_the_header_where_packets_have_none(tmp_path: Path, name: str):
    codec = {"a.flv": "flv", "a.wmv": "wmv2"}[name]
    info = probe(write(tmp_path / name, [0, 5000, 7000, 12000], 3000, codec))
    assert info.duration == pytest.approx(15.0, abs=0.05)  # 16 with the mean interval


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_durations_of_animations(tmp_path: Path, name: str):
    frames = [Image.new("RGB", (32, 24), (60 * i, 0, 0)) for i in range(4)]
    lossless = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=[100, 300, 50, 3000], **lossless)
    known = process_video(tmp_path / name, sampling="all").metadata
    assert known.timestamps == pytest.approx([0.0, 0.1, 0.4, 0.45])
    assert known.duration == pytest.approx(3.45)
    assert known.seconds_per_frame == pytest.approx(3.45 / 4)
    held = process_video(tmp_path / name, num_frames=4, pad_frames=True, video_start=2.0).metadata
    assert held.frame_indices == (3, 3, 3, 3)
    middle = process_video(tmp_path / name, num_frames=2, by_time=True, video_start=0.3, video_end=0.42).metadata
    assert middle.frame_indices == (1, 2)


def test_frames_of_an_animation_without_duration_last_a_tenth_of_a_second(tmp_path: Path):
    frames = [Image.new("RGB", (32, 24), (60 * i, 0, 0)) for i in range(3)]
    path = tmp_path / "a.png"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[500, 0, 250])
    animation = Animation(path, "a.png", SourceOptions())
    assert animation.timestamps == pytest.approx((0.0, 0.5, 0.6))
    assert animation.last_duration == 0.25
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=0)
    unknown = Animation(path, "a.png", SourceOptions())
    assert (unknown.timestamps, unknown.last_duration, unknown.fps) == (None, None, 0.0)


def test_durations_of_frame_lists():
    frames = [Image.new("RGB", (32, 24), (60 * i, 0, 0)) for i in range(4)]
    assert process_video(frames).metadata.duration == 2.0  # at two frames per second
    assert process_video(frames, frames_fps=8.0).metadata.duration == 0.5
    assert process_video(frames[:1]).metadata.duration == 0.0  # a still image
    assert process_video(frames[:1], frames_fps=8.0).metadata.duration == 0.125


def frames_of(video) -> list[int]:
    return [round((frame.float().mean().item() - 20) / 10) for frame in video.pixels]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("first", [0, -1000, 4000])
def test_slideshows_are_sampled_by_what_is_on_screen(tmp_path: Path, codec: str, first: int):
    path = write(tmp_path / "slides.mkv", [first + start for start in (0, 5000, 7000, 12000)], 8000, codec)
    for options, indices in (
        ({"num_frames": 4, "by_time": True}, (0, 1, 2, 3)),  # at 0, 5.33, 10.67 and 16 s
        ({"num_frames": 2, "by_time": True, "video_start": 4.0, "video_end": 6.0}, (0, 1)),
        ({"num_frames": 2, "by_time": True, "video_start": 5.0, "video_end": 7.0}, (1, 2)),  # their own times
        ({"sampling": "all", "video_start": 8.0, "video_end": 9.0}, (2, 2)),
        ({"sampling": "all", "video_start": 17.0}, (3, 3)),
        ({"sampling": "duration", "base_interval": 5.0, "min_frames": 1}, (0, 1, 2, 3)),
    ):
        video = process_video(path, **options)
        assert video.metadata.frame_indices == indices, options
        assert frames_of(video) == list(indices), options
        assert video.metadata.timestamps == pytest.approx([SLIDES[i] for i in indices])


def test_an_edit_list_moves_the_times(tmp_path: Path):
    """The muxer writes an edit list for a first timestamp other than 0, and for frames before 0, which are cut."""
    late = probe(write(tmp_path / "late.mp4", [2500, 3000, 6000, 6100], 900, "mpeg4"))
    assert late.timestamps.tolist() == pytest.approx([2.5, 3.0, 6.0, 6.1])
    assert late.duration == pytest.approx(4.5, abs=2e-3)
    video = process_video(late.path, num_frames=3, by_time=True, frame_factor=1, video_start=0.4, video_end=3.55)
    assert video.metadata.frame_indices == (0, 1, 2)  # at 0.4, 1.95 and 3.5 s after the first frame
    cut = write(tmp_path / "cut.mp4", [-1000, -500, 0, 2000, 2100], 400, "mpeg4", options={"use_editlist": "1"})
    info = probe(cut)
    assert (info.timestamps - info.timestamps[0])[-3:].tolist() == pytest.approx([0.0, 2.0, 2.1])


def test_the_last_scene_is_as_long_as_its_frame_is_on_screen(tmp_path: Path):
    changes, times = np.array([0.0, 0.0, 0.0, 0.9]), np.array([0.0, 1.0, 2.0, 3.0])
    assert [scene.first for scene in split(changes, times, 0.1, 0.5)] == [0]
    assert [scene.first for scene in split(changes, times, 0.1, 0.5, duration=7.0)] == [0, 3]
    assert [scene.first for scene in split(changes, times, 0.1, 0.5, duration=3.2)] == [0]
    frames = [Image.new("RGB", (32, 24), (level, level, level)) for level in (10, 12, 14, 250)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[1000, 1000, 1000, 4000])
    assert [(scene.first, scene.last) for scene in find_scenes(tmp_path / "a.gif")] == [(0, 2), (3, 3)]
