"""Inputs that people have: frames as URLs or base64, messages, decoders, headers and tokens, servers that are busy."""

import base64
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from blueberry_video.video import process_video
from blueberry_video.video.command import main
from blueberry_video.video.errors import BrokenVideoError, FetchError, LimitError, RefusedSourceError, VideoError
from blueberry_video.video.messages import read_message
from blueberry_video.video.pool import Outcome
from blueberry_video.video.source import open_source
from blueberry_video.video.source_options import SourceOptions

LOOPBACK = SourceOptions(allowed_networks=("127.0.0.1/32",), fetch_timeout=5)


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (level, level, level)).save(file, "png")
    return file.getvalue()


def levels(value: object, options: SourceOptions = LOOPBACK) -> list[int]:
    with open_source(value, options) as source:
        assert source.frames is not None
        return source.frames.read(range(len(source.frames)))[:, 0, 0, 0].tolist()


class Web:
    """Server on 127.0.0.1: ``answer(path, number of the request)`` is (status, headers, body)."""

    def __init__(self, answer: Callable[[str, int], tuple[int, dict[str, str], bytes]]):
        self.headers: list[dict[str, str]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.headers.append(dict(self.headers))
                status, headers, body = answer(self.path, len(web.headers))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Web]]:
    started: list[Web] = []

    def start(answer: Callable[[str, int], tuple[int, dict[str, str], bytes]]) -> Web:
        started.append(Web(answer))
        return started[-1]

    yield start
    for web in started:
        web.server.shutdown()
        web.server.server_close()


def test_frames_in_every_form(tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch):
    web = serve(lambda path, _: (200, {}, png(int(path[1:]))))
    text = base64.b64encode(png(30)).decode()
    path = tmp_path / "a 40%.png"
    path.write_bytes(png(40))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "50.png").write_bytes(png(50))
    frames = [f"http://{web.host}/20", f"data:image/png;base64,{text}", path, f"file://{path}", "~/50.png", png(60)]
    frames += [text.rstrip("="), {"path": None, "bytes": png(70)}, path.as_uri()]
    assert levels(frames) == [20, 30, 40, 40, 50, 60, 30, 70, 40]
    assert levels(f"data:video/jpeg;base64,{text},{text}") == [30, 30]
    assert levels("~/50.png") == levels(f"file://localhost{tmp_path}/50.png") == [50]


def test_frames_keep_the_rules_of_sources(tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    web = serve(
        lambda path, _: (302, {"Location": "http://127.0.0.2/x"}, b"") if path == "/away" else (200, {}, png(1))
    )
    url = f"http://{web.host}/1"
    with pytest.raises(RefusedSourceError, match=r"127\.0\.0\.1"):
        open_source([png(1), url])  # loopback is not allowed by default
    assert web.headers == []
    with pytest.raises(RefusedSourceError, match=r"127\.0\.0\.2"):
        open_source([f"http://{web.host}/away"], LOOPBACK)
    for wrong in ("concat:a|b", "file:/etc/passwd", "file://host/etc/passwd", "rtsp://h/x"):
        with pytest.raises(VideoError):
            open_source([wrong], LOOPBACK)
    with pytest.raises(RefusedSourceError, match="playlist"):
        open_source([b"#EXTM3U\n/etc/passwd\n"])
    with pytest.raises(BrokenVideoError, match=r"Frame 0 .*mov"):
        open_source([b"\0\0\0\x20ftypisom" + bytes(64)])
    small = SourceOptions(max_bytes=len(png(1)) * 2, allowed_networks=("127.0.0.1/32",))
    assert levels([png(1), url], small) == [1, 1]
    for frames in ([url] * 3, [png(1)] * 3, [png(1), url, base64.b64encode(png(1)).decode()]):
        with pytest.raises(LimitError, match="max_bytes"):
            open_source(frames, small)
    assert list(tmp_path.iterdir()) == []


def test_one_deadline_covers_all_frames(serve):
    def answer(path: str, number: int) -> tuple[int, dict[str, str], bytes]:
        time.sleep(0.15)
        return 200, {}, png(1)

    web = serve(answer)
    with pytest.raises(FetchError, match=r"fetch_timeout=0\.4"):
        open_source([f"http://{web.host}/1"] * 9, SourceOptions(allowed_networks=("127.0.0.1/32",), fetch_timeout=0.4))
    assert len(web.headers) <= 3


def test_own_outputs_are_inputs():
    pictures = [Image.new("RGB", (56, 56), (i, i, i)) for i in (10, 90, 170, 250)]
    common = {"resized_height": 56, "resized_width": 56, "image_format": "png"}
    for kind in ("base64", "openai", "pil", "numpy", "tensor"):
        first = process_video(pictures, "gpt-4o", format=kind, **common)
        again = process_video(first.frames, "gpt-4o", **common)
        assert torch.equal(again.pixels, first.pixels), kind


def test_messages():
    assert read_message({"type": "video", "video": "a.mp4", "nframes": 8}) == ("a.mp4", {"num_frames": 8})
    openai = [
        {"role": "system", "content": "You see a video."},
        {
            "role": "user",
            "content": [{"type": "video_url", "video_url": {"url": "b.mp4"}}, {"type": "text", "text": "?"}],
        },
    ]
    assert read_message(openai) == ("b.mp4", {})
    images = [{"type": "input_image", "image_url": f"{i}.png", "max_pixels": 9} for i in range(2)]
    assert read_message({"role": "user", "content": images}) == (["0.png", "1.png"], {"max_pixels": 9})
    frames = {"role": "user", "content": [{"type": "video", "video": ["0.png", "1.png"], "sample_fps": 4.0}]}
    assert read_message([frames]) == (["0.png", "1.png"], {"frames_fps": 4.0})
    for other in ("a.mp4", {"path": "a", "bytes": None}, [{"path": "a.png"}], ["a.png"], [], {}):
        assert read_message(other) == (other, {})
    for wrong in (
        {"role": "user", "content": "text"},
        [{"video": "a"}, {"video": "b"}],
        [{"video": "a"}, {"image": "b"}],
        [{"video": "a", "frames": 3}],
        [{"image": "a", "max_pixels": 1}, {"image": "b", "max_pixels": 2}],
    ):
        with pytest.raises(VideoError):
            read_message(wrong)


def test_the_settings_of_a_message_are_used():
    pictures = [Image.new("RGB", (64, 64), (i, i, i)) for i in range(6)]
    part = {"type": "video", "video": pictures, "sample_fps": 4.0, "resized_height": 56, "resized_width": 84}
    video = process_video(
        {"role": "user", "content": [part]}, resized_height=28, resized_width=28, format="huggingface"
    )
    assert video.metadata.resolution == (56, 84)
    assert video.frames["second_per_grid_ts"].tolist() == [0.5]


def test_decoders_and_gray_arrays(tmp_path: Path):
    gray = np.stack([np.full((8, 10), i, np.uint8) for i in (3, 200)])
    for value, expected in (
        (gray, [3, 200]),
        (list(gray), [3, 200]),
        (gray[0], [3]),
        (torch.from_numpy(gray), [3, 200]),
    ):
        assert levels(value) == expected
    with pytest.raises(BrokenVideoError, match=r"\(8, 10, 3\)"):
        open_source(np.zeros((8, 10, 3), np.uint8))
    (tmp_path / "a.png").write_bytes(png(5))
    assert levels(SimpleNamespace(_hf_encoded={"path": str(tmp_path / "a.png"), "bytes": None})) == [5]
    pixels = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2).expand(3, 3, 2, 2)

    class VideoDecoder:  # torchcodec's interface
        metadata = SimpleNamespace(average_fps=4.0)

        def __len__(self) -> int:
            return 3

        def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
            return SimpleNamespace(data=pixels[indices])

    with open_source(VideoDecoder()) as source:
        assert source.frames is not None
        assert (source.kind, source.frames.timestamps, source.frames.size) == ("decoder", (0.0, 0.25, 0.5), (2, 2))
        assert torch.equal(source.frames.read([2, 0]), pixels[[2, 0]])


def test_a_token_is_sent_to_its_hosts_only(serve):
    away = serve(lambda *_: (200, {}, png(2)))
    home = serve(
        lambda path, _: (302, {"Location": f"http://{away.host}/"}, b"") if path == "/go" else (200, {}, png(1))
    )
    options = SourceOptions(
        allowed_networks=("127.0.0.1/32",), token="secret", request_headers={"Cookie": "a=b"}, token_hosts=(home.host,)
    )
    assert "secret" not in repr(options)
    assert "a=b" not in repr(options)
    assert levels([f"http://{home.host}/1", f"http://{away.host}/2", f"http://{home.host}/go"], options) == [1, 2, 2]
    assert [(h.get("Authorization"), h.get("Cookie")) for h in home.headers] == [("Bearer secret", "a=b")] * 2
    assert len(away.headers) == 2
    assert not any({"Authorization", "Cookie"} & set(headers) for headers in away.headers)
    with pytest.raises(ValueError, match="token_hosts"):
        SourceOptions(token="secret")
    for name in ("Host", "transfer-encoding", "A b", "X\r\nY", "X:"):
        with pytest.raises(ValueError, match="request_headers"):
            SourceOptions(request_headers={name: "1"}, token_hosts=("a",))
    with pytest.raises(ValueError, match="request_headers") as failure:
        SourceOptions(token="secret\r\nHost: b", token_hosts=("a",))
    assert "secret" not in str(failure.value)


def test_a_token_is_not_sent_in_plain_text(monkeypatch: pytest.MonkeyPatch):
    connected: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("93.184.216.34", 80))])
    monkeypatch.setattr("socket.socket.connect", lambda *a: connected.append(a))
    options = SourceOptions(token="secret", token_hosts=("videos.test",))
    with pytest.raises(RefusedSourceError, match="plain text"):
        open_source("http://videos.test/a.png", options)
    assert connected == []


def test_a_busy_server_is_asked_again(serve):
    web = serve(lambda path, number: (503, {"Retry-After": "0"}, b"") if number < 3 else (200, {}, png(9)))
    assert levels(f"http://{web.host}/") == [9]
    assert len(web.headers) == 3
    soon = formatdate(time.time() + 1.5, usegmt=True)
    web = serve(lambda path, number: (429, {"Retry-After": soon}, b"") if number < 2 else (200, {}, png(9)))
    assert levels(f"http://{web.host}/") == [9]
    web = serve(lambda *_: (503, {}, b""))
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"503.*2 attempts.*fetch_retries=1"):
        open_source(f"http://{web.host}/", SourceOptions(allowed_networks=("127.0.0.1/32",), fetch_retries=1))
    assert time.monotonic() - began >= 0.5  # the first wait without a Retry-After header
    assert len(web.headers) == 2


def test_a_wait_beyond_the_deadline_raises_at_once(serve):
    web = serve(lambda *_: (429, {"Retry-After": "3600"}, b""))
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"429.*3600.*fetch_timeout=5\b"):
        open_source(f"http://{web.host}/", LOOPBACK)
    assert time.monotonic() - began < 2
    assert len(web.headers) == 1


def test_results_are_shown_in_one_line():
    video = process_video(np.zeros((4, 32, 32, 3), np.uint8))
    outcome = Outcome(0, np.zeros((40, 40)), video, None, 0.5, 1)
    for shown in (repr(video), repr(outcome)):
        assert len(shown) < 200
        assert "\n" not in shown


def test_a_file_that_looks_like_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("-x.png").write_bytes(png(1))
    assert main(["-x.png"]) == 0
    assert "tokens" in capsys.readouterr().out
    assert os.listdir() == ["-x.png"]
