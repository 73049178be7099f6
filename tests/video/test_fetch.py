"""Downloads from a loopback server that counts connections, and container detection from the first bytes."""

import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blueberry_video.video import fetch as fetching
from blueberry_video.video.errors import BrokenVideoError, FetchError, LimitError, RefusedSourceError
from blueberry_video.video.fetch import fetch, is_public, parse_networks, public_name
from blueberry_video.video.sniff import sniff

LOOPBACK = ("127.0.0.1/32",)
BODY = bytes(range(256)) * 3000  # longer than one read
# Key for these tests only, with a certificate for videos.test that is valid until 2126.
CERTIFICATE = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgssZrmuEqGDqLGC3w
f/XOba+BE8VapdmkamfO6GKIu9ChRANCAASsCEwcrK2dJaYwIXqHibNb8G/L07Qo
y83jWNTDrjPsc0x3/gDqwsaIyXQS6j82mpd7ethfkMyQjd9+ey2t123e
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBnDCCAUGgAwIBAgIUa9WwG71fBREdVKkRpLc601WNLkowCgYIKoZIzj0EAwIw
FjEUMBIGA1UEAwwLdmlkZW9zLnRlc3QwIBcNMjYxMTIxMTMzMjAyWhgPMjEyNjEw
MjgxMzMyMDJaMBYxFDASBgNVBAMMC3ZpZGVvcy50ZXN0MFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAErAhMHKytnSWmMCF6h4mzW/Bvy9O0KMvN41jUw64z7HNMd/4A
6sLGiMl0Euo/NpqXe3rYX5DMkI3ffnstrddt3qNrMGkwHQYDVR0OBBYEFFibqvGL
jxadXnwpOWPgkpubh8UaMB8GA1UdIwQYMBaAFFibqvGLjxadXnwpOWPgkpubh8Ua
MA8GA1UdEwEB/wQFMAMBAf8wFgYDVR0RBA8wDYILdmlkZW9zLnRlc3QwCgYIKoZI
zj0EAwIDSQAwRgIhAKMuzeYWIcLBOmZ2ooYNrAz6H8j4Z/hTzi0hXdyYGGDjAiEA
09OaQYfV8UkqvRlf2UiJI19/uOLGtY3FUDqUSS+Q1UY=
-----END CERTIFICATE-----
"""


class Server:
    """Server on 127.0.0.1 that calls ``answer(connection, path)`` for each request and counts ``connections``."""

    def __init__(self, answer: Callable[[socket.socket, str], None], context: ssl.SSLContext | None = None):
        self.answer, self.context = answer, context
        self.connections, self.requests = 0, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.talk, args=(connection,), daemon=True).start()

    def talk(self, connection: socket.socket) -> None:
        try:
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            with connection:
                request = b""
                while b"\r\n\r\n" not in request and (piece := connection.recv(65536)):
                    request += piece
                self.requests.append(request.decode("latin-1"))
                self.answer(connection, request.split(b" ")[1].decode("latin-1"))
        except OSError:
            connection.close()  # the client closed the connection, as many tests expect

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(answer: Callable[[socket.socket, str], None] | bytes, context: ssl.SSLContext | None = None) -> Server:
        content = answer
        servers.append(Server((lambda c, _: c.sendall(content)) if isinstance(content, bytes) else content, context))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def response(body: bytes = BODY, status: str = "200 OK", **headers: str) -> bytes:
    fields = {"Content-Length": str(len(body))} | {key.replace("_", "-"): value for key, value in headers.items()}
    lines = "".join(f"{key}: {value}\r\n" for key, value in fields.items() if value)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def get(url: str, max_bytes: int = 10**7, timeout: float = 5.0, networks: tuple[str, ...] = LOOPBACK) -> bytes:
    into = io.BytesIO()
    fetch(url, into, max_bytes, timeout, networks)
    return into.getvalue()


def names(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]]) -> list[str]:
    """Replaces name resolution: each look-up of a host returns its next address. Returns the list of look-ups."""
    resolved: list[str] = []
    real = socket.getaddrinfo

    def look_up(host, port, *args, **kwargs):
        resolved.append(host)
        address = answers[host].pop(0) if host in answers else host
        return [found for one in address.split() for found in real(one, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return resolved


def test_a_public_url_is_downloaded(serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # proxies of the environment are ignored
    server = serve(response())
    assert get(f"http://127.0.0.1:{server.port}/a/clip.mp4?key=1&x=ü#part") == BODY
    [request] = server.requests
    assert request.startswith("GET /a/clip.mp4?key=1&x=%C3%BC HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{server.port}\r\n" in request
    assert "Accept-Encoding: identity\r\n" in request


@pytest.mark.parametrize("length", [None, "chunked"])
def test_a_body_without_content_length_is_complete(serve, length: str | None):
    if length:
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:700000], BODY[700000:]))
        server = serve(response(chunks + b"0\r\n\r\n", Content_Length="", Transfer_Encoding="chunked"))
    else:
        server = serve(response(Content_Length=""))
    assert get(f"http://127.0.0.1:{server.port}/") == BODY


def test_redirects_are_followed_and_each_name_is_resolved_once(serve, monkeypatch: pytest.MonkeyPatch):
    resolved = names(monkeypatch, {"a.test": ["127.0.0.1"] * 2, "b.test": ["127.0.0.1"]})
    steps = {"/0": "/1", "/1": "http://b.test:{port}/2"}

    def answer(connection: socket.socket, path: str) -> None:
        target = steps.get(path, "").format(port=server.port)
        connection.sendall(response(b"", "302 Found", Location=target) if target else response())

    server = serve(answer)
    assert get(f"http://a.test:{server.port}/0") == BODY
    assert resolved == ["a.test", "a.test", "b.test"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "0.0.0.0",
        "0",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "192.88.99.1",
        "198.18.0.1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:8.8.8.8]",
        "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b:1::127.0.0.1]",
        "[2002:7f00:1::]",
        "[2001:0:7f00:1::]",
        "[2001:db8::1]",
        "[fe80::1]",
        "[fec0::1]",
        "[fd00::1]",
        "[ff0e::1]",
    ],
)
def test_private_addresses_are_refused(serve, monkeypatch: pytest.MonkeyPatch, host: str):
    server = serve(response())
    opened: list[object] = []
    monkeypatch.setattr(fetching, "_connected", lambda *arguments: opened.append(arguments))
    with pytest.raises(RefusedSourceError, match=rf"//{re.escape(host)}:{server.port}/.*allowed_networks"):
        get(f"http://{host}:{server.port}/", networks=())
    assert (server.connections, opened) == (0, [])


def test_is_public():
    for address in ("8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"):
        assert is_public(address)
    for block in fetching._SPECIAL:
        assert not is_public(str(block[0]))
    assert not any(is_public(str(ipaddress.IPv6Address(1 << shift))) for shift in range(125))


def test_one_private_address_among_public_ones_refuses_all(serve, monkeypatch: pytest.MonkeyPatch):
    server = serve(response())
    names(monkeypatch, {"mixed.test": ["8.8.8.8 127.0.0.1"]})
    with pytest.raises(RefusedSourceError, match=r"127\.0\.0\.1"):
        get(f"http://mixed.test:{server.port}/", networks=())
    assert server.connections == 0


def test_a_host_name_is_resolved_once_per_request(serve, monkeypatch: pytest.MonkeyPatch):
    server = serve(response())
    resolved = names(monkeypatch, {"rebind.test": ["127.0.0.1", "127.0.0.2"]})
    assert get(f"http://rebind.test:{server.port}/") == BODY
    assert resolved == ["rebind.test"]
    assert server.connections == 1
    with pytest.raises(RefusedSourceError, match=r"127\.0\.0\.2"):
        get(f"http://rebind.test:{server.port}/")
    assert server.connections == 1


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "//127.0.0.2:{port}/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "http://a@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}\\@8.8.8.8/",
        "/a b",
    ],
)
def test_a_redirect_is_checked_like_a_url(serve, target: str):
    server = serve(lambda c, _: c.sendall(response(b"", "302 Found", Location=target.format(port=server.port))))
    with pytest.raises(RefusedSourceError):
        get(f"http://127.0.0.1:{server.port}/start")
    assert server.connections == 1


def test_a_redirect_loop_raises(serve):
    server = serve(response(b"", "301 Moved", Location="/again"))
    with pytest.raises(FetchError, match=r"/again.*\b5 redirects"):
        get(f"http://127.0.0.1:{server.port}/")
    assert server.connections == 6


@pytest.mark.parametrize(
    "url",
    [
        "http://good@127.0.0.1:{port}/",
        "http://user:secret@127.0.0.1:{port}/",
        "http://8.8.8.8:80@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}\\@example.com/",
        "http://example.com\\@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}#@example.com/",
        "http://example.com#@127.0.0.1:{port}/",
        "http://example.com?@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}/a\tb",
        "http://127.0.0.1:{port}/a\r\nHost: x",
        "ht\ntp://127.0.0.1:{port}/",
        "\x00http://127.0.0.1:{port}/",
        "http://127.0.0.1:{port}/ ",
        "http://127.0.0.1 :{port}/",
        "http:///127.0.0.1:{port}/",
        "http:/127.0.0.1:{port}/",
        "http:127.0.0.1:{port}/",
        "http://:{port}/",
        "http://127.0.0.1:/",
        "http://127.0.0.1:0/",
        "http://127.0.0.1:+{port}/",
        "http://127.0.0.1:0{port}/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:{port}:80/",
        "http://127.0.0.1%2f:{port}/",
        "http://127.0.0.1,8.8.8.8:{port}/",
        "http://[::1/",
        "http://[::1%25lo]:{port}/",
        "http://[fe80::1%lo]/",
        "http://\uff11\uff12\uff17.0.0.1:{port}/",
        "http://127\u30020\u30020\u30021:{port}/",
        "http://a..b/",
        "http://" + "a." * 150 + "b/",
        "ftp://127.0.0.1:{port}/",
        "file:///etc/passwd",
    ],
)
def test_ambiguous_urls_are_refused_before_name_resolution(serve, monkeypatch, url: str):
    server = serve(response())
    resolved = names(monkeypatch, {})
    with pytest.raises(RefusedSourceError) as refusal:
        get(url.format(port=server.port))
    assert "secret" not in str(refusal.value)
    assert ("before '@'" in str(refusal.value)) == ("@127.0.0.1:{port}/" in url and not set("\\?#") & set(url))
    assert (resolved, server.connections) == ([], 0)


def test_messages_omit_the_query(serve):
    server = serve(response(status="403 Forbidden"))
    address = f"http://127.0.0.1:{server.port}/clip.mp4"
    with pytest.raises(FetchError, match="status 403") as failure:
        get(f"{address}?token=secret#secret")
    assert "secret" not in str(failure.value)
    assert public_name(f"{address}?token=secret#secret") == address
    with pytest.raises(RefusedSourceError) as refusal:
        get(f"{address}?token=secret", networks=())
    assert "secret" not in str(refusal.value)


def drip(connection: socket.socket, start: bytes, piece: bytes) -> None:
    connection.sendall(start)
    while True:
        connection.sendall(piece)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: x\r\n"),
    ],
)
def test_a_slow_response_ends_at_the_deadline(serve, start: bytes, piece: bytes):
    server = serve(lambda c, _: drip(c, start, piece))
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"fetch_timeout=0\.4|100 headers"):
        get(f"http://127.0.0.1:{server.port}/", timeout=0.4)
    assert 0.3 < time.monotonic() - began < 1.2


def test_the_deadline_includes_redirects(serve):
    def answer(connection: socket.socket, _: str) -> None:
        time.sleep(0.2)
        connection.sendall(response(b"", "302 Found", Location="/"))

    server = serve(answer)
    with pytest.raises(FetchError, match=r"fetch_timeout=0\.5"):
        get(f"http://127.0.0.1:{server.port}/", timeout=0.5)
    assert server.connections == 3


def test_the_deadline_includes_name_resolution(monkeypatch: pytest.MonkeyPatch):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(5))
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"slow\.test.*fetch_timeout=0\.2"):
        get("http://slow.test/", timeout=0.2)
    done.set()
    assert time.monotonic() - began < 1


def test_endless_headers_raise(serve):
    server = serve(lambda c, _: [c.sendall(b"HTTP/1.1 200 OK\r\n"), *iter(lambda: c.sendall(b"X: " + b"x" * 60000), 1)])
    with pytest.raises(FetchError, match=r"127\.0\.0\.1.*\(.*header"):
        get(f"http://127.0.0.1:{server.port}/")


def test_a_content_length_above_max_bytes_is_refused_without_reading(serve):
    server = serve(response(b"x" * 1000, Content_Length=str(10 * 10**9)))
    into = io.BytesIO()
    with pytest.raises(LimitError, match=r"10000000000 .*max_bytes=5000\b"):
        fetch(f"http://127.0.0.1:{server.port}/", into, 5000, 5.0, LOOPBACK)
    assert into.getvalue() == b""


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"x" * 65536),
    ],
)
def test_an_endless_body_is_read_up_to_max_bytes(serve, start: bytes, piece: bytes):
    server = serve(lambda c, _: [c.sendall(start), *iter(lambda: c.sendall(piece), 1)])
    into = io.BytesIO()
    with pytest.raises((LimitError, FetchError)):
        fetch(f"http://127.0.0.1:{server.port}/", into, 1_000_000, 5.0, LOOPBACK)
    assert len(into.getvalue()) <= 1_000_000


def test_a_body_of_exactly_max_bytes_is_allowed(serve):
    server = serve(response())
    assert get(f"http://127.0.0.1:{server.port}/", max_bytes=len(BODY)) == BODY
    with pytest.raises(LimitError, match=f"max_bytes={len(BODY) - 1}"):
        get(f"http://127.0.0.1:{server.port}/", max_bytes=len(BODY) - 1)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Encoding": "gzip"},
        {"Content_Encoding": "identity, br"},
        {"Transfer_Encoding": "gzip, chunked", "Content_Length": ""},
    ],
)
def test_a_compressed_body_is_refused(serve, headers: dict[str, str]):
    server = serve(response(**headers))
    with pytest.raises(RefusedSourceError, match=r"(gzip|br).*identity"):
        get(f"http://127.0.0.1:{server.port}/")


@pytest.mark.parametrize(
    "answer",
    [
        response(Content_Length=str(len(BODY) + 1)),
        response(b"fffff\r\n" + BODY[:1000], Content_Length="", Transfer_Encoding="chunked"),
        response(b"5\r\nhello\r\n", Content_Length="", Transfer_Encoding="chunked"),
        b"",
        b"nonsense\r\n\r\n",
        response(status="404 Not Found"),
        response(b"", "204 No Content"),
        response(b"", "302 Found"),
    ],
)
def test_incomplete_responses_raise(serve, answer: bytes):
    server = serve(answer)
    with pytest.raises(FetchError):
        get(f"http://127.0.0.1:{server.port}/")


def test_an_unreachable_server_raises(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(FetchError, match=rf"127\.0\.0\.1:{port}/ could not be fetched"):
        get(f"http://127.0.0.1:{port}/")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror("unknown")))
    with pytest.raises(FetchError, match=r"nowhere\.test/.*resolve.*unknown"):
        get("http://nowhere.test/")


def test_the_next_address_of_a_name_is_tried(serve, monkeypatch: pytest.MonkeyPatch):
    server = serve(response())
    names(monkeypatch, {"two.test": ["127.0.0.3 127.0.0.1"]})
    assert get(f"http://two.test:{server.port}/", networks=("127.0.0.0/24",)) == BODY


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    pem = tmp_path / "server.pem"
    pem.write_text(CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def test_tls_verifies_the_host_name(serve, secure: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch):
    server = serve(response(), secure)
    names(monkeypatch, {"videos.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]})
    assert get(f"https://videos.test:{server.port}/") == BODY
    with pytest.raises(FetchError, match="certificate"):
        get(f"https://other.test:{server.port}/")
    with pytest.raises(FetchError, match="certificate"):
        get(f"https://127.0.0.1:{server.port}/")
    monkeypatch.delenv("SSL_CERT_FILE")
    names(monkeypatch, {"videos.test": ["127.0.0.1"]})
    with pytest.raises(FetchError, match="certificate"):
        get(f"https://videos.test:{server.port}/")
    assert len(server.requests) == 1


def test_a_redirect_from_https_to_http_is_refused(serve, secure: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch):
    plain = serve(response())
    server = serve(response(b"", "302 Found", Location=f"http://127.0.0.1:{plain.port}/"), secure)
    names(monkeypatch, {"videos.test": ["127.0.0.1"]})
    with pytest.raises(
        RefusedSourceError, match=rf"https://videos\.test:{server.port}/.*http://127\.0\.0\.1:{plain.port}/"
    ):
        get(f"https://videos.test:{server.port}/")
    assert plain.connections == 0


def test_the_deadline_includes_the_tls_handshake(serve, monkeypatch: pytest.MonkeyPatch):
    server = serve(lambda *_: time.sleep(1))  # plain HTTP: waits for an empty line
    names(monkeypatch, {"videos.test": ["127.0.0.1"]})
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"fetch_timeout=0\.3"):
        get(f"https://videos.test:{server.port}/", timeout=0.3)
    assert time.monotonic() - began < 1


def test_invalid_networks_raise():
    assert [str(network) for network in parse_networks(("10.0.0.0/8", "fd00::/8"))] == ["10.0.0.0/8", "fd00::/8"]
    for block in ("10.0.0.1/8", "intranet", ""):
        with pytest.raises(ValueError, match=rf"allowed_networks=\('{block}',\)"):
            parse_networks((block,))
    with pytest.raises(ValueError, match=r"allowed_networks=.*everything"):
        get("http://8.8.8.8/", networks=("everything",))


MP4 = b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64)


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (MP4, "mov"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "mov"),
        (b"\x1aE\xdf\xa3" + bytes(40), "matroska"),
        (b"RIFF\x24\x10\0\0AVI LIST", "avi"),
        (b"GIF89a" + bytes(20), "gif"),
        ((b"G" + bytes(187)) * 3, "mpegts"),
        ((bytes(4) + b"G" + bytes(187)) * 3, "mpegts"),
        ((b"G" + bytes(203)) * 3, "mpegts"),
        (b"OggS\0\2" + bytes(20), "ogg"),
        (b"\0\0\x01\xba" + bytes(20), "mpeg"),
        (b"\0\0\x01\xb3" + bytes(20), "elementary"),
        (b"\0\0\0\x01\x67\x42" + bytes(20), "elementary"),
        (b"ID3\x04\0\0\0\0\0\x05hello" + b"\xff\xfb\x90\x00" + bytes(413) + b"\xff\xfb\x90\x00", "mp3"),
        (b"ID3\x04\0\0\0\0\0\0fLaC\0\0\0\x22", "flac"),
        (b"\xff\xfb\x90\x00" + bytes(413) + b"\xff\xfb\x90\x00", "mp3"),
    ],
)
def test_the_container_is_detected_from_the_first_bytes(tmp_path: Path, content: bytes, container: str):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sniff(path, "it") == container


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts",
        b"\xef\xbb\xbf \r\n#extm3u\n",
        b"#EXT-X-VERSION:3\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'",
        b"<?xml version='1.0'?><MPD/>",
        b"\n<MPD xmlns='urn:mpeg:dash:schema:mpd:2011'>",
        b"<ASX version='3'>",
        b"<svg><image href='/etc/passwd'/></svg>",
        b"[playlist]\nFile1=/etc/passwd",
        b"[Reference]\nRef1=http://127.0.0.1/",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n",
        b"GIF89a \nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        b"RIFFAAAAAVI \n#EXTM3U\n/etc/passwd",
        b"AAAAfree dash:profile:isoff-live:2011",
        b"ID3\x04\0\0\0\0\0\x05hello#EXTM3U\n/etc/passwd\n",
        b"ID3\x04\0\0\x10\0\0\x05helloffconcat version 1.0\nfile x".replace(b"\x10\0\0\x05", b"\0\0\0\x05"),
    ],
)
def test_playlists_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "renamed.mp4"
    path.write_bytes(content)
    with pytest.raises(RefusedSourceError, match=r"the clip .*playlist"):
        sniff(path, "the clip")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"hello, this is no video\n", "but text"),
        ("ünïcode".encode(), "but text"),
        ("text".encode("utf-16"), "but text"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04" + bytes(30), "archive"),
        (b"\x1f\x8b\x08" + bytes(30), "archive"),
        (b"name" + bytes(253) + b"ustar\0" + bytes(100), "archive"),
        (b"RIFF\0\0\0\0WAVEfmt ", "audio"),
        (bytes(range(1, 200)), "unknown container"),
        (bytes(1000), "unknown container"),
        (b"ID3\x04\0\0\0\0\0\0" + MP4, "unknown container"),
        (b"ID3\x04\0\0\0\0\0\0" * 1000, "unknown container"),
        (b"ID3\x04\0\0\x7f\x7f\x7f\x7f", "empty"),
        (b"\xff\xfb\x90\x00" + bytes(3000), "unknown container"),
    ],
)
def test_the_message_names_the_type_of_a_file_that_is_no_video(tmp_path: Path, content: bytes, expected: str):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(BrokenVideoError, match=f"clip.*{expected}"):
        sniff(path, "clip")
