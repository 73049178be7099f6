"""Every supported input becomes a Source, and every refused input opens no other file."""

import base64
import contextlib
import ctypes
import hashlib
import io
import os
import re
import socket
import struct
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from blueberry_video.video.errors import BrokenVideoError, FetchError, LimitError, RefusedSourceError, VideoError
from blueberry_video.video.source import open_source
from blueberry_video.video.source_options import SourceOptions

LOOPBACK = SourceOptions(allowed_networks=("127.0.0.1/32",), fetch_timeout=5)


def write_video(path: Path, codec: str = "mpeg4", container: str | None = None, frames: int = 8) -> Path:
    pixels = np.zeros((48, 64, 3), np.uint8)
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p", "mpeg2video": "yuv420p"}.get(codec, "yuv420p")
        for i in range(frames):
            pixels[...] = 20 * i
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


def picture(level: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    """Gray image of (width, height) ``size`` with a red top left pixel."""
    image = Image.new("RGB", size, (level, level, level))
    image.putpixel((0, 0), (255, 0, 0))
    return image


@pytest.fixture(autouse=True)
def private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder for temporary files. Checks that every test leaves it empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


_opened: list[str] | None = None
_hooked = False


@contextlib.contextmanager
def files_opened() -> Iterator[list[str]]:
    """Names of the files that Python opens inside the block."""
    global _opened, _hooked

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and _opened is not None:
            _opened.append(str(arguments[0]))

    if not _hooked:  # a hook cannot be removed
        sys.addaudithook(hook)
        _hooked = True
    _opened = found = []
    try:
        yield found
    finally:
        _opened = None


@contextlib.contextmanager
def accesses(path: Path) -> Iterator[list[int]]:
    """List with one item for each time that the file was opened inside the block, also by FFmpeg. Filled at its end."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0
    assert libc.inotify_add_watch(watch, os.fsencode(path), 0x20) >= 0  # IN_OPEN
    found: list[int] = []
    try:
        yield found
        with contextlib.suppress(BlockingIOError):
            found += [1] * (len(os.read(watch, 4096)) // 16)
    finally:
        os.close(watch)


class Web:
    """HTTP server on loopback that serves ``files`` by path and counts ``requests``."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests = 0
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests += 1
                body = web.files[self.path.partition("?")[0]]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def web() -> Iterator[Web]:
    served = Web()
    yield served
    served.server.shutdown()
    served.server.server_close()


# ---- encoded video


def test_a_local_file_is_used_in_place(video: Path, tmp_path: Path):
    link = tmp_path / "link.mp4"
    link.symlink_to(video)
    for value in (str(video), video, link):
        with open_source(value) as source:
            assert (source.kind, source.container, source.path, source.frames) == ("file", "mov", video.resolve(), None)
            assert source.content_hash() == hashlib.sha256(video.read_bytes()).hexdigest()
    assert video.exists()


def test_every_input_type_yields_the_same_bytes(video: Path, web: Web, private_folder: Path):
    content = video.read_bytes()
    text = base64.b64encode(content).decode()
    web.files["/clip.mp4"] = content
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\r\n"
    values_of_kind = {
        "bytes": [
            content,
            bytearray(content),
            memoryview(content),
            io.BytesIO(content),
            {"path": None, "bytes": content},
            {"path": "/gone/clip.mp4", "bytes": content},
        ],
        "base64": [
            text,
            wrapped,
            base64.urlsafe_b64encode(content).decode(),
            f"data:video/mp4;base64,{text}",
            f"DATA:;BASE64,{wrapped}",
        ],
        "url": [f"{web.address}/clip.mp4?key=secret", f"HTTP{web.address[4:]}/clip.mp4"],
        "file": [{"path": str(video), "bytes": None}, {"path": str(video)}],
    }
    for kind, values in values_of_kind.items():
        for value in values:
            with open_source(value, LOOPBACK) as source:
                assert (source.kind, source.container) == (kind, "mov")
                assert source.path is not None
                assert source.path.read_bytes() == content
                assert source.content_hash() == hashlib.sha256(content).hexdigest()
                assert "secret" not in source.name
                if kind != "file":
                    assert source.path.parent == private_folder
                    assert source.path.stat().st_mode & 0o077 == 0
            assert source.path.exists() == (kind == "file")
    assert web.requests == 2


def test_a_stream_is_read_from_its_position(video: Path):
    with video.open("rb") as stream, open_source(stream) as source:
        assert source.content_hash() == hashlib.sha256(video.read_bytes()).hexdigest()
    with pytest.raises(TypeError, match=r"returns str.*binary"):
        open_source(io.StringIO("text"))


def test_a_garbage_collected_source_deletes_its_file(video: Path, private_folder: Path):
    source = open_source(video.read_bytes())
    assert len(list(private_folder.iterdir())) == 1
    del source
    assert list(private_folder.iterdir()) == []


def test_closing_in_a_forked_worker_keeps_the_file(video: Path):
    source = open_source(video.read_bytes())
    child = os.fork()
    if child == 0:
        source.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert source.path is not None
    assert source.path.exists()
    source.close()


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "mpeg4", "mov"),
        ("a.mov", "mpeg4", "mov"),
        ("a.3gp", "mpeg4", "mov"),
        ("a.avi", "mpeg4", "avi"),
        ("a.mkv", "mpeg4", "matroska"),
        ("a.webm", "libvpx", "matroska"),
        ("a.gif", "gif", "gif"),
        ("a.ts", "mpeg2video", "mpegts"),
        ("a.m2ts", "mpeg2video", "mpegts"),
        ("a.mpg", "mpeg2video", "mpeg"),
        ("a.flv", "flv", "flv"),
        ("a.wmv", "wmv2", "asf"),
        ("a.ogv", "libtheora", "ogg"),
        ("a.ivf", "libvpx", "ivf"),
        ("a.y4m", "wrapped_avframe", "yuv4mpeg"),
        ("a.h264", "libx264", "elementary"),
        ("a.hevc", "libx265", "elementary"),
        ("a.m4v", "mpeg4", "elementary"),
        ("a.m2v", "mpeg2video", "elementary"),
        ("a.mxf", "mpeg2video", "mxf"),
        ("a.obu", "libsvtav1", "obu"),
        ("a.mjpeg", "mjpeg", "mjpeg"),
    ],
)
def test_every_container_is_accepted(tmp_path: Path, name: str, codec: str, container: str):
    path = tmp_path / name
    forced = {".m4v": "m4v", ".y4m": "yuv4mpegpipe", ".m2v": "mpeg2video"}.get(path.suffix)
    try:
        write_video(path, codec, forced, frames=4)
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg does not write {name}: {error}")
    with open_source(path) as source:
        assert (source.container, source.path) == (container, path)


# ---- refused sources


@pytest.mark.parametrize(
    "text",
    [
        "concat:{canary}|{canary}",
        "concatf:{canary}",
        "subfile,,start,0,end,100,,:{canary}",
        "cache:{canary}",
        "file:{canary}",
        "file://elsewhere{canary}",
        "file:///{canary}\0",
        "crypto:{canary}",
        "async:{canary}",
        "fd:0",
        "pipe:0",
        "tcp://{host}",
        "rtmp://{host}/x",
        "rtsp://{host}/x",
        "ftp://{host}/x",
        "async:http://{host}/x",
        "hls+http://{host}/x.m3u8",
        " file:{canary}",
        "-",
        "",
        "{canary}\0.mp4",
        "data:video/mp4,abc",
        "data:video/mp4;base64",
        "http://{host}/clip.mp4",
        "http://me@{host}/clip.mp4",
    ],
)
def test_refused_strings_open_no_file_and_send_no_request(video: Path, web: Web, text: str):
    value = text.format(canary=video, host=web.address.removeprefix("http://"))
    for form in (value, [value], {"path": value, "bytes": None}):
        with files_opened() as opened, pytest.raises(VideoError):
            open_source(form)
        assert not any(str(video) in name for name in opened)
    if not value.startswith(("http:", "data:", "-", "\0")) and value:
        with pytest.raises(VideoError):
            open_source(Path(value))
    assert web.requests == 0


def test_special_files_are_refused_without_opening_them(tmp_path: Path):
    pipe, plug = tmp_path / "pipe.mp4", tmp_path / "socket.mp4"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(plug))
        for special in (pipe, plug, Path("/dev/zero"), Path("/dev/stdin").parent):
            with files_opened() as opened, pytest.raises(RefusedSourceError):
                open_source(special)  # opening a pipe would block
            with pytest.raises(RefusedSourceError):
                open_source([special])
            assert str(pipe) not in opened


def test_a_missing_file_raises(tmp_path: Path):
    values = [tmp_path / "none.mp4", "none.mp4", "a" * 40, "a.b" * 100, {"path": "none.mp4", "bytes": None}]
    for value in values:
        name = Path(value["path"] if isinstance(value, dict) else value).name[:40]
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            open_source(value)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "\ufeff\n #extm3u\n{target}\n",
        "ffconcat version 1.0\nfile '{target}'\n",
        "<?xml version='1.0'?><MPD><BaseURL>{target}</BaseURL></MPD>",
        "[playlist]\nFile1={target}\n",
        "v=0\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
    ],
)
def test_a_playlist_is_refused_under_any_name(tmp_path: Path, video: Path, web: Web, playlist: str):
    for target in (str(video), f"{web.address}/clip.ts"):
        content = playlist.format(target=target).encode()
        web.files["/list.mp4"] = content
        path = tmp_path / "renamed.mp4"
        path.write_bytes(content)
        values = [
            path,
            content,
            io.BytesIO(content),
            f"data:video/mp4;base64,{base64.b64encode(content).decode()}",
            f"{web.address}/list.mp4",
        ]
        requests = web.requests
        for value in values:
            with accesses(video) as opened, pytest.raises(RefusedSourceError, match="playlist"):
                open_source(value, LOOPBACK)
            assert opened == []
        assert web.requests == requests + 1  # the playlist itself


def test_an_image_sequence_name_is_refused(tmp_path: Path, video: Path):
    for number in range(2):
        picture(90).save(tmp_path / f"frame{number}.jpg")
    trap = tmp_path / "frame%d.jpg"
    trap.write_bytes(video.read_bytes())
    canary = tmp_path / "frame1.jpg"
    with accesses(canary) as opened, av.open(str(trap)) as container:  # FFmpeg opens the other file
        list(container.decode(video=0))
    assert opened
    with accesses(canary) as opened, pytest.raises(RefusedSourceError, match=r"frame%d\.jpg.*pattern.*rename"):
        open_source(trap)
    assert opened == []
    harmless = tmp_path / "50%20done.mp4"
    harmless.write_bytes(video.read_bytes())
    assert open_source(harmless).path == harmless


def with_outside_reference(content: bytes, name: str) -> bytes:
    """Rewrites the ``dref`` of an mp4 file to an alias record with the relative path of an external file."""
    path = name.encode() + b"\0" * (len(name) % 2)
    alias = bytes(10) + b"\0" + bytes(27) + bytes(12) + b"\0" + bytes(63) + bytes(16)
    alias += struct.pack(">hh", 1, 1) + bytes(16) + struct.pack(">hh", 2, len(name)) + path + struct.pack(">hh", -1, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    dref = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry

    def rebuilt(boxes: bytes) -> bytes:
        out, at = b"", 0
        while at < len(boxes):
            size, kind = struct.unpack_from(">I4s", boxes, at)
            body = boxes[at + 8 : at + size]
            if kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
                body = rebuilt(body)
            out += dref if kind == b"dref" else struct.pack(">I4s", 8 + len(body), kind) + body
            at += size
        return out

    return rebuilt(content)


def test_an_external_reference_in_an_mp4_is_ignored(tmp_path: Path, video: Path):
    canary = tmp_path / "canary.mp4"
    canary.write_bytes(video.read_bytes())
    path = tmp_path / "refers.mp4"
    path.write_bytes(with_outside_reference(video.read_bytes(), "canary.mp4"))

    def read(**options: str) -> None:
        with av.open(str(path), options=options) as container:
            for packet in container.demux(video=0):
                packet.decode()

    with accesses(canary) as opened:
        read(enable_drefs="1")  # checks that the reference works
    assert opened
    with accesses(canary) as opened, open_source(path) as source:
        assert source.container == "mov"
        read()
    assert opened == []


@pytest.mark.parametrize("content", [b"", b"no video", b"PK\x03\x04" + bytes(40), bytes(5000)])
def test_what_is_no_video_is_broken(tmp_path: Path, content: bytes):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    for value in (path, content):
        with pytest.raises(BrokenVideoError):
            open_source(value)


@pytest.mark.parametrize("value", [None, 3, {"frames": []}, {}, {"path": None, "bytes": None}, object(), {1, 2}])
def test_unsupported_types_raise_a_type_error(value: object):
    with pytest.raises(TypeError, match=rf"\b{type(value).__name__}\b.*'path'"):
        open_source(value)


# ---- limits


def test_max_bytes_applies_to_every_input_type(video: Path, web: Web):
    content = video.read_bytes()
    web.files["/clip.mp4"] = content
    text = base64.b64encode(content).decode()
    values = [video, content, memoryview(content), io.BytesIO(content), text, f"data:;base64,{text}"]
    values.append(f"{web.address}/clip.mp4")
    for value in values:
        over = SourceOptions(max_bytes=len(content) - 1, allowed_networks=("127.0.0.1/32",))
        with pytest.raises(LimitError, match=rf"max_bytes={len(content) - 1}\b"):
            open_source(value, over)
        if isinstance(value, io.BytesIO):
            value.seek(0)
        open_source(value, SourceOptions(max_bytes=len(content), allowed_networks=("127.0.0.1/32",))).close()


def test_an_endless_stream_is_read_up_to_max_bytes():
    class Endless(io.RawIOBase):
        num_read = 0

        def read(self, size: int = -1) -> bytes:
            self.num_read += size
            return bytes(size)

    stream = Endless()
    with pytest.raises(LimitError, match="max_bytes=3000000"):
        open_source(stream, SourceOptions(max_bytes=3_000_000))
    assert stream.num_read < 5_000_000


def test_base64_above_max_bytes_is_not_decoded():
    text = "AAAA" * 2_000_000
    uri = "data:video/mp4;base64," + text
    tracemalloc.start()
    try:
        for value in (text, uri):
            with pytest.raises(LimitError, match=r"6000000 .*max_bytes=1000000"):
                open_source(value, SourceOptions(max_bytes=1_000_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000


def test_base64_is_decoded_in_chunks(video: Path):
    text = base64.b64encode(video.read_bytes() + bytes(20_000_000)).decode()
    tracemalloc.start()
    try:
        open_source(text).close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def test_invalid_base64_raises(video: Path):
    text = base64.b64encode(video.read_bytes()).decode().rstrip("=")
    text = text[: len(text) // 4 * 4]
    for wrong in (text[:-3], text + "=", text[:100] + "===" + text[101:], text[:200] + "!" + text[201:], text + "é==="):
        with pytest.raises(BrokenVideoError, match=rf"base64 text \({len(wrong)} characters\)"):
            open_source("data:video/mp4;base64," + wrong)
    with pytest.raises(BrokenVideoError, match=r"base64 text \(1048580 characters\).*padding"):
        open_source("QUJD" * 262143 + "QUI=" + "QUJD")  # padding at the end of a chunk, then more


def test_invalid_options_raise():
    assert SourceOptions(allowed_networks=["10.0.0.0/8"]).allowed_networks == ("10.0.0.0/8",)  # type: ignore[arg-type]
    for key in ("max_bytes", "max_duration", "max_frame_pixels", "max_decoded_pixels", "fetch_timeout", "frames_fps"):
        for value in (0, -1, float("nan")):
            with pytest.raises(ValueError, match=f"{key}={value}"):
                SourceOptions(**{key: value})
    with pytest.raises(ValueError, match=r"allowed_networks=.*intranet"):
        SourceOptions(allowed_networks=("intranet",))


def test_a_failed_download_leaves_no_file(web: Web):
    web.files["/clip.mp4"] = b"#EXTM3U\n"
    with pytest.raises(RefusedSourceError):
        open_source(f"{web.address}/clip.mp4", LOOPBACK)
    web.server.server_close()
    with pytest.raises(FetchError):
        open_source(f"{web.address}/clip.mp4", SourceOptions(allowed_networks=("127.0.0.1/32",), fetch_timeout=0.3))


# ---- frames


def gray_levels(frames: torch.Tensor) -> list[int]:
    return frames[:, 0, -1, -1].tolist()


def test_a_folder_of_images_has_natural_order(tmp_path: Path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in (1, 2, 10):
        picture(number).save(folder / f"frame{number}.png")
    (folder / ".hidden").write_text("")
    with open_source(folder, SourceOptions(frames_fps=4)) as source:
        frames = source.frames
        assert (source.kind, source.container, source.path) == ("frames", None, None)
        assert frames is not None
        assert (len(frames), frames.size, frames.timestamps) == (3, (4, 6), (0.0, 0.25, 0.5))
        pixels = frames.read([2, 0, 1, 0])
        assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (4, 3, 4, 6))
        assert gray_levels(pixels) == [10, 1, 2, 1]
        assert pixels[0, :, 0, 0].tolist() == [255, 0, 0]
        for wrong in ([3], [-1], []):
            with pytest.raises(IndexError, match=re.escape(str(wrong)) + ".*0 to 2"):
                frames.read(wrong)
    (folder / "notes.txt").write_text("")
    with pytest.raises(RefusedSourceError, match=r"notes\.txt"):
        open_source(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RefusedSourceError, match="no image"):
        open_source(empty)


def test_image_files_are_opened_lazily(tmp_path: Path):
    paths = [tmp_path / f"{i}.bmp" for i in range(3)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    frames = open_source([str(path) for path in paths]).frames
    assert frames is not None
    with files_opened() as opened:
        assert gray_levels(frames.read([1])) == [1]
    assert str(paths[1]) in opened
    assert not {str(paths[0]), str(paths[2])} & set(opened)


def test_exif_orientation_is_applied(tmp_path: Path):
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6) * 9
    turned = {2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T}
    turned |= {6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("png", "tiff", "webp"):
            path = tmp_path / f"{orientation}.{suffix}"
            Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, lossless=True)
            frames = open_source(path).frames
            assert frames is not None
            assert frames.size == (4, 6)
            assert torch.equal(frames.read([0])[0, 0], torch.from_numpy(upright)), (orientation, suffix)


def test_every_image_mode_is_converted_to_rgb(tmp_path: Path):
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    cases = {
        "I;16": (Image.fromarray(deep), [0, 100, 255]),
        "L": (Image.fromarray(np.array([[0, 100, 255]], np.uint8)), [0, 100, 255]),
        "RGBA": (Image.fromarray(np.array([[[7, 7, 7, 0]] * 3], np.uint8)), [255, 255, 255]),
        "LA": (Image.fromarray(np.array([[[7, 255], [7, 255], [7, 0]]], np.uint8), "LA"), [7, 7, 255]),
        "1": (Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1"), [0, 255, 255]),
        "P": (Image.fromarray(np.array([[0, 0, 255]], np.uint8)).convert("P"), [0, 0, 255]),
    }
    for mode, (image, values) in cases.items():
        assert image.mode == mode
        image.save(tmp_path / "x.png")
        for value in (image, [image], tmp_path / "x.png"):
            frames = open_source(value).frames
            assert frames is not None
            assert frames.read([0])[0].tolist() == [[values]] * 3
    with pytest.raises(BrokenVideoError, match="mode=F"):
        open_source(Image.fromarray(np.zeros((2, 2), np.float32))).frames.read([0])  # type: ignore[union-attr]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_a_still_image_is_one_frame_for_every_input_type(tmp_path: Path, suffix: str):
    path = tmp_path / f"x.{suffix}"
    picture(50).save(path)
    for value in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        with open_source(value) as source:
            assert source.path is None
            assert source.frames is not None
            assert (len(source.frames), source.frames.size) == (1, (4, 6))
            assert source.frames.read([0, 0]).shape == (2, 3, 4, 6)


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_an_animation_keeps_its_timestamps(tmp_path: Path, suffix: str):
    path = tmp_path / f"x.{suffix}"
    images = [picture(level) for level in (10, 90, 200)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100, 300, 50], lossless=True)
    with open_source(path) as source:
        frames = source.frames
        assert frames is not None
        assert frames.timestamps == pytest.approx((0, 0.1, 0.4))
        assert gray_levels(frames.read([2, 0, 2, 1])) == [200, 10, 200, 90]
        assert gray_levels(frames.read([1])) == [90]
    with pytest.raises(LimitError, match=r"3 frames.*max_decoded_pixels=71"):
        open_source(path, SourceOptions(max_decoded_pixels=3 * 24 - 1))


def test_the_default_image_of_an_animation_is_no_frame(tmp_path: Path):
    path = tmp_path / "x.png"
    images = [picture(level) for level in (10, 90, 200)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, default_image=True)
    frames = open_source(path).frames
    assert frames is not None
    assert gray_levels(frames.read([0, 1])) == [90, 200]
    assert frames.timestamps == pytest.approx((0, 0.1))


def arrays() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 8, 10), dtype=torch.uint8)


def test_arrays_and_tensors_in_every_layout():
    frames = arrays()
    last = frames.permute(0, 2, 3, 1)
    same = [
        frames,
        last,
        frames.numpy(),
        last.numpy(),
        np.ascontiguousarray(last.numpy()),
        np.flip(np.flip(frames.numpy(), 0).copy(), 0),
        frames.float() / 255,
        frames.double() / 255,
        (frames.float() / 255).numpy().astype(">f4"),
        (frames.float() / 255).requires_grad_(),
        list(frames),
        tuple(last.numpy()),
        [Image.fromarray(frame) for frame in last.numpy()],
        torch.cat([frames, torch.full_like(frames[:, :1], 255)], 1),
        torch.cat([last, torch.full_like(last[..., :1], 255)], 3),
    ]
    for value in same:
        with open_source(value) as source:
            assert source.frames is not None
            assert (source.kind, len(source.frames), source.frames.size) == ("frames", 5, (8, 10))
            assert source.frames.timestamps is None
            assert torch.equal(source.frames.read([4, 1]), frames[[4, 1]])
    gray = open_source(frames[:, :1]).frames
    assert gray is not None
    assert torch.equal(gray.read(range(5)), frames[:, :1].expand(-1, 3, -1, -1))
    half = open_source((frames.float() / 255).to(torch.bfloat16)).frames
    assert half is not None
    assert (half.read([0]).int() - frames[:1].int()).abs().max() <= 1


def test_read_returns_a_copy():
    frames = arrays()
    source = open_source(frames).frames
    assert source is not None
    source.read([0]).zero_()
    assert torch.equal(source.read([0])[0], frames[0])
    assert frames.any()


def test_channels_are_first_if_both_layouts_match():
    frames = torch.randint(0, 256, (3, 3, 7, 3), dtype=torch.uint8)
    found = open_source(frames).frames
    assert found is not None
    assert found.size == (7, 3)
    assert torch.equal(found.read([0, 1, 2]), frames)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (torch.zeros(2, 5, 8, 9), r"Frame 0 .*\(5, 8, 9\)"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(1, 2, 3, 8, 8), r"\(1, 2, 3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "Tensor of 0 frames"),
        (torch.zeros(2, 3, 0, 8), "Frame 0 .*0 x 8.*max_frame_pixels="),
        ([], "list of 0 frames"),
        (torch.full((2, 3, 8, 8), 255.0), r"Frame 0 .*float32.*255\.0"),
        (torch.full((2, 3, 8, 8), -0.1), r"Frame 0 .*float32.*-0\.1"),
        (torch.full((2, 3, 8, 8), float("nan")), "nan"),
        (np.full((2, 3, 8, 8), np.inf), "inf"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        (np.zeros((2, 3, 8, 8), bool), "bool"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], "Frame 1 .*8 x 9.*8 x 8"),
        ([np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)], r"Frame 1 .*\(8, 8, 3\).*\(3, 8, 8\)"),
        ([picture(1), picture(2, (5, 4))], "Frame 1 .*4 x 5.*4 x 6"),
    ],
)
def test_invalid_frames_raise(frames: object, expected: str):
    with pytest.raises(VideoError, match=expected):
        open_source(frames)


def test_image_files_of_different_sizes_raise(tmp_path: Path):
    picture(1).save(tmp_path / "1.png")
    picture(2, (4, 6)).save(tmp_path / "2.png")
    with pytest.raises(BrokenVideoError, match=r"Frame 1 .*6 x 4 .*frame 0 .*4 x 6"):
        open_source([tmp_path / "1.png", tmp_path / "2.png"])


def test_mixed_or_unsupported_frames_raise_a_type_error(tmp_path: Path):
    picture(1).save(tmp_path / "1.png")
    one = np.zeros((3, 4, 6), np.uint8)
    for mixed in (
        [one, picture(1)],
        [tmp_path / "1.png", picture(1)],
        [one, torch.zeros(3, 4, 6)],
        [1, 2],
        [b"x", one],
    ):
        names = ", ".join(sorted({type(frame).__name__ for frame in mixed}))
        with pytest.raises(TypeError, match=rf"list of {len(mixed)} frames .*\({names}\)"):
            open_source(mixed)


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (9000, 9000)).save(path)
    assert path.stat().st_size < 20_000
    decoded: list[object] = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: decoded.append(image))
    for value in (path, [path], path.read_bytes()):
        with pytest.raises(LimitError, match=r"9000 x 9000.*max_frame_pixels=35651584"):
            open_source(value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(LimitError, match=r"bomb\.png.*Pillow"):
        open_source(path)
    with pytest.raises(LimitError, match="max_frame_pixels=63"):
        open_source(torch.zeros(1, 3, 8, 8), SourceOptions(max_frame_pixels=63))
    assert decoded == []


def test_unknown_and_truncated_images_raise(tmp_path: Path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(BrokenVideoError, match=r"x\.png cannot be read as an image"):
        open_source([tmp_path / "x.png"])
    picture(1, (60, 40)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:90])
    frames = open_source(tmp_path / "cut.png").frames
    assert frames is not None
    with pytest.raises(BrokenVideoError, match=r"cut\.png cannot be read as an image"):
        frames.read([0])


def test_content_hashes_differ_for_different_contents(tmp_path: Path):
    frames = arrays()
    other = frames.clone()
    other[4, 2, 7, 9] ^= 1
    picture(1).save(tmp_path / "1.png")
    picture(2).save(tmp_path / "2.png")
    one, two = tmp_path / "1.png", tmp_path / "2.png"
    values: list[object] = [frames, other, frames[:4], frames.float() / 255, frames.permute(0, 2, 3, 1)]
    values += [frames.reshape(5, 3, 10, 8), [one], [two], [one, two], [two, one], [picture(1)], [picture(2)]]
    hashes = [open_source(value).content_hash() for value in values]
    assert len(set(hashes)) == len(values)
    assert hashes == [open_source(value).content_hash() for value in values]
    assert all(len(found) == 64 for found in hashes)
