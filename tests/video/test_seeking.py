"""Seeking and counting of frames in real containers: every frame equals that of the ffmpeg program, at bounded cost.

The containers differ in what a seek lands on (presentation or decoding times), in the timestamps of packets and in what
a packet holds.
"""

import itertools
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from test_odd_videos import assert_same, run, truth

from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.video import backends, process_video, seeking
from blueberry_video.video.container import open_video, probe
from blueberry_video.video.decode import DecodeOptions, decode
from blueberry_video.video.errors import BrokenVideoError, LimitError
from blueberry_video.video.seeking import selected_frames

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="the files are written by ffmpeg, which is not installed"
)

SOURCE = "-f lavfi -i testsrc2=size=96x64:rate=30:duration=4"
H264, HEVC = "-pix_fmt yuv420p -c:v libx264 -preset veryfast", "-pix_fmt yuv420p -c:v libx265 -preset ultrafast"
STRICT = DecodeOptions(salvage=False)
ENCODERS = {
    "h264": f"{H264} -bf 3 -g 12",
    "h264_no_b": f"{H264} -bf 0 -g 12",
    "h264_open": f"{H264} -bf 3 -x264-params open-gop=1:keyint=12:b-pyramid=normal",
    "h264_refresh": f"{H264} -bf 0 -x264-params intra-refresh=1:keyint=12",
    "h264_intra": f"{H264} -g 1",
    "hevc": f"{HEVC} -x265-params log-level=none:bframes=3:keyint=12:open-gop=0",
    "hevc_open": f"{HEVC} -x265-params log-level=none:bframes=3:keyint=12:open-gop=1",
    "mpeg2": "-c:v mpeg2video -bf 2 -g 12",
    "mpeg2_small": "-c:v mpeg2video -bf 2 -g 12 -q:v 20",
    "mpeg1": "-c:v mpeg1video -bf 2 -g 12",
    "mpeg4": "-c:v mpeg4 -bf 2 -g 12",
    "av1": "-c:v libsvtav1 -preset 12 -g 12",
    "vp8": "-c:v libvpx -deadline realtime -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 12 -g 12",
    "vp9": "-c:v libvpx-vp9 -speed 8 -deadline realtime -g 12",
    "vp9_hidden": "-c:v libvpx-vp9 -speed 5 -lag-in-frames 12 -auto-alt-ref 1 -g 30",
}
FILES = [
    *(f"{codec}.{kind}" for codec in list(ENCODERS)[:7] for kind in ("ts", "m2ts", "mkv", "mp4")),
    *(f"{codec}.{kind}" for codec in ("mpeg2", "mpeg2_small") for kind in ("mpg", "vob", "ts", "m2ts", "mkv", "mp4")),
    *("mpeg1.mpg", "mpeg4.mp4", "mpeg4.mkv", "mpeg4.ts", "h264.flv", "h264.vob", "h264.avi", "mpeg2.avi"),
    *(
        "av1.mkv",
        "av1.mp4",
        "av1.webm",
        "av1.ivf",
        "vp8.webm",
        "vp8.mkv",
        "vp8.ivf",
        "mpeg1.ts",
        "mpeg1.mkv",
        "mpeg4.avi",
    ),
    *("vp9.webm", "vp9_hidden.webm", "vp9_hidden.mp4", "h264.nut", "hevc.hevc", "h264.h264"),
]


@pytest.mark.parametrize("name", FILES)
def test_selected_frames_equal_those_of_ffmpeg(tmp_path: Path, name: str):
    path = run(tmp_path, f"{SOURCE} {ENCODERS[name.split('.')[0]]}", name)
    expected = truth(path, 64, 96)
    assert len(expected) == 120
    rng = np.random.default_rng(0)
    choices = [range(120), [119], [0, 60, 61, 119], *(sorted(rng.choice(120, 9, replace=False)) for _ in range(4))]
    for threads, choice in itertools.product((0, 1), choices):
        indices = [int(index) for index in choice]
        frames = decode(path, indices, DecodeOptions(num_threads=threads, salvage=False))
        assert frames.backend == "pyav"
        assert frames.failures == {}
        assert_same(frames.pixels, expected[indices])


def decoded_packets(path: Path, wanted: list[int]) -> int:
    """Number of packets that the decoder receives for the frames."""
    with open_video(path, num_threads=1) as video:
        count, original = 0, backends.video_frames

        def counted(packet: av.Packet, *rest):
            nonlocal count
            count += packet.size > 0
            return original(packet, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("blueberry_video.video.seeking.video_frames", counted)
            assert len(list(selected_frames(video, wanted))) == len(wanted)
    return count


@pytest.mark.parametrize("name", [name for name in FILES if name.split(".")[-1] in ("ts", "m2ts", "mpg", "vob", "mkv")])
def test_frames_cost_at_most_the_packets_since_their_keyframe(tmp_path: Path, name: str):
    if name == "h264.vob" or name.startswith("h264_refresh"):
        pytest.skip("no timestamps, or no keyframes, to seek to")
    path = run(tmp_path, f"{SOURCE} {ENCODERS[name.split('.')[0]]}", name)
    info = probe(path)
    assert len(info.keyframes) >= 120 // 12
    for wanted in ([0], [119], [20, 63, 100], list(range(5, 120, 23))):
        # B-frames of a target follow it, and leading B-frames of an open GOP follow its keyframe
        since = sum(index - info.keyframes[info.keyframes <= index][-1] + 1 + 4 for index in wanted)
        assert decoded_packets(path, wanted) <= since


@pytest.mark.parametrize(
    "name", ["h264.ts", "h264.m2ts", "hevc.ts", "mpeg2.mpg", "mpeg2_small.vob", "h264.mkv", "h264.mp4"]
)
def test_no_container_is_read_from_its_start_to_reach_a_keyframe(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Seeking in a transport stream by presentation times lands after the keyframe."""
    path = run(tmp_path, f"{SOURCE} {ENCODERS[name.split('.')[0]]}", name)
    expected = truth(path, 64, 96)
    monkeypatch.setattr(seeking, "reopened", None)
    for wanted in ([119], [5, 119], [0, 30, 60, 90, 119]):
        frames = decode(path, wanted, STRICT)
        assert frames.failures == {}
        assert_same(frames.pixels, expected[wanted])


@pytest.mark.parametrize("name", ["hevc.ts", "hevc_open.ts", "h264_open.ts", "mpeg2.ts", "mpeg2.mpg"])
def test_an_intact_file_is_intact_in_all_entry_points(tmp_path: Path, name: str):
    (tmp_path / "clips" / "videos").mkdir(parents=True)
    path = run(tmp_path / "clips" / "videos", f"{SOURCE} {ENCODERS[name.split('.')[0]]}", name)
    expected = truth(path, 64, 96)
    indices = [round(i * 119 / 5) for i in range(6)]
    assert_same(decode(path, indices, STRICT).pixels, expected[indices])
    video = process_video(path, num_frames=6)
    assert not video.missing.any()
    assert not video.suspect.any()
    assert video.failures == {}
    clips = VideoFolder(tmp_path / "clips", 6, metadata="none", sampler="uniform")
    assert_same(clips[0]["video"], expected[indices])


@pytest.mark.parametrize("name", ["h264.ts", "h264_open.ts", "hevc.ts", "hevc_open.ts", "mpeg2.ts", "h264_open.m2ts"])
def test_a_recording_that_starts_between_keyframes_is_intact_from_the_first_one(tmp_path: Path, name: str):
    """ffmpeg also shows HEVC frames before it, predicted from frames that the file does not hold."""
    path = run(tmp_path, f"{SOURCE} {ENCODERS[name.split('.')[0]]}", f"whole_{name}")
    packet = 192 if name.endswith("m2ts") else 188
    content, whole = path.read_bytes(), truth(path, 64, 96)
    for share in (0.2, 0.33, 0.5):
        start = int(len(content) * share) // packet * packet
        cut = tmp_path / f"cut_{name}"
        cut.write_bytes(content[start:])
        shown, count = truth(cut, 64, 96), probe(cut).num_frames
        assert 30 < count < 115
        expected, wrong = shown[len(shown) - count :], shown[: len(shown) - count]
        assert len(wrong) == 0 or name.startswith("hevc")
        assert_same(expected, whole[-count:])
        for frame, original in zip(wrong, whole[-len(shown) : len(whole) - count]):
            assert (frame.short() - original.short()).abs().max() > 8
        frames = decode(cut, range(len(expected)), STRICT)
        assert_same(frames.pixels, expected)
        some = [0, len(expected) // 2, len(expected) - 1]
        assert_same(decode(cut, some, STRICT).pixels, expected[some])


# NAL units without a picture: access unit delimiter, SEI of user data, filler data; OBUs: temporal delimiter, padding,
# metadata; user data of MPEG
NO_PICTURE = {
    "av1": [bytes([0x12, 0]), bytes([0x7A, 4, 1, 2, 3, 0x80]), bytes([0x2A, 6, 4, 0xB5, 0, 1, 2, 0x80])],
    "mpeg2": [b"\0\0\1\xb2nothing"],
    "mpeg4": [b"\0\0\1\xb2nothing"],
    "h264": [bytes([9, 0x10]), bytes([6, 5, 17, *range(1, 18), 0x80]), bytes([12, *[255] * 40, 0x80])],
    "hevc": [bytes([70, 1, 0x50]), bytes([78, 1, 5, 17, *range(1, 18), 0x80]), bytes([76, 1, *[255] * 40, 0x80])],
}


@pytest.mark.parametrize(
    ("codec", "container"),
    [
        *itertools.product(("h264", "hevc"), ("mp4", "mkv", "ts")),
        *(("av1", "mp4"), ("av1", "mkv"), ("mpeg2", "mkv"), ("mpeg4", "mkv"), ("mpeg4", "mp4")),
    ],
)
def test_packets_without_a_picture_are_neither_frames_nor_damage(tmp_path: Path, codec: str, container: str):
    """Writes the packets of a video with packets between them that hold no picture, with their own times."""
    whole = run(tmp_path, f"{SOURCE} {ENCODERS[codec]}", "whole.mp4")
    path = tmp_path / f"a.{container}"
    units = itertools.cycle(NO_PICTURE[codec])
    added = 0
    with av.open(str(whole)) as source, av.open(str(path), "w", format={"ts": "mpegts"}.get(container)) as output:
        stream = source.streams.video[0]
        target = output.add_stream_from_template(stream, opaque=True)  # without an encoder of its own
        half = int(stream.average_rate.denominator / stream.average_rate.numerator / stream.time_base) // 2
        for number, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            pts, dts = packet.pts, packet.dts
            packet.stream = target
            output.mux(packet)
            if number % 3 == 1:
                unit = next(units)
                empty = av.Packet((len(unit).to_bytes(4, "big") if codec in ("h264", "hevc") else b"") + unit)
                empty.pts, empty.dts, empty.time_base, empty.stream = pts + half, dts + half, stream.time_base, target
                output.mux(empty)
                added += 1
    assert added == 40
    expected = truth(path, 64, 96)
    assert len(expected) == 120
    assert probe(path).num_frames == 120
    for indices in (range(120), [7, 64, 119]):
        frames = decode(path, list(indices), STRICT)
        assert frames.failures == {}
        assert_same(frames.pixels, expected[list(indices)])
    video = process_video(path, num_frames=8)
    assert (video.metadata.total_frames, bool(video.missing.any()), video.failures) == (120, False, {})


@pytest.mark.skipif(backends.backend_failure("decord") is not None, reason="decord does not work here")
@pytest.mark.parametrize("name", ["h264.h264", "h264.vob", "mpeg4.avi"])
def test_decord_returns_the_right_frames_or_raises(tmp_path: Path, name: str):
    path = run(tmp_path, f"{SOURCE} {ENCODERS[name.split('.')[0]]}", name)
    expected = truth(path, 64, 96)
    for indices in (range(120), [3, 50, 119]):
        try:
            frames = decode(path, list(indices), DecodeOptions(backends=("decord",), salvage=False))
        except BrokenVideoError as error:
            assert "decord: " in str(error)  # noqa: PT017 (either outcome is right)
            continue
        assert_same(frames.pixels, expected[list(indices)])


def test_duration_ends_with_the_end_of_the_last_frame(tmp_path: Path):
    """Ten frames at 10 per second, the last one shown for 3 s."""
    path = run(tmp_path, "-f lavfi -i testsrc2=size=96x64:rate=10:duration=1 -final_delay 300", "a.gif")
    info = probe(path)
    assert info.timestamps[-1] == pytest.approx(0.9)
    assert info.duration == pytest.approx(0.9 + 3.0)
    video = process_video(path, sampling="all")
    assert video.metadata.duration == pytest.approx(3.9)
    assert video.quality["coverage"] == pytest.approx(1.0)
    assert video.quality["largest_gap"] == pytest.approx(0.1)
    with pytest.raises(LimitError, match=r"lasts 4 s.*max_duration=3"):
        process_video(path, max_duration=3.0)


@pytest.mark.parametrize(("options", "is_one"), [("-g 1", True), ("-g 4 -bf 0", True), ("-g 60", False)])
def test_short_groups_of_frames_are_decoded_by_one_thread(tmp_path: Path, options: str, is_one: bool):
    path = run(tmp_path, f"{SOURCE} {H264} {options}", "a.mp4")
    with open_video(path, num_threads=0) as video:
        assert (video.num_threads == 1) == is_one
    with open_video(path, num_threads=3) as video:
        assert video.num_threads == 3
