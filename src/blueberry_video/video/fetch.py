"""HTTP(S) downloads from untrusted URLs, protected against server-side request forgery.

A host name can resolve to a private network, change its address between the check and the connection, or redirect to
one. Therefore each URL is parsed and each name resolved once, every returned IP address is checked, the connection is
made to a checked address and never to the name, and each redirect repeats all checks. Proxies of the environment are
ignored. One deadline covers name resolution, connections, headers, redirects and body.
"""

import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import string
import threading
import time
from typing import BinaryIO, cast
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from blueberry_video.video.errors import FetchError, LimitError, RefusedSourceError, one_line

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 18  # bytes per read
_PORTS = {"http": 80, "https": 443}

_AMBIGUOUS = re.compile(r"[\x00-\x20\x7f\\]")  # parsers disagree on these: some drop them, some read \ as /
_LABEL = r"[A-Za-z0-9_-]{1,63}"
_AUTHORITY = re.compile(rf"(?P<host>{_LABEL}(?:\.{_LABEL})*\.?|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[1-9][0-9]{{0,4}}))?")

_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")  # excludes mapped IPv4, NAT64, link-local, unique local, multicast
_SPECIAL = tuple(
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays from IPv6 to IPv4 (6to4)
        "2001::/23",  # protocol assignments, including Teredo, which embeds an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which embeds an IPv4 address
        "3fff::/20",  # documentation
    )
)
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_SocketAddress = tuple[int, tuple]  # family and argument of connect()


def fetch(url: str, into: BinaryIO, max_bytes: int, timeout: float, allowed_networks: tuple[str, ...] = ()) -> None:
    """Downloads an http(s) URL into ``into``.

    Args:
        url: ASCII up to the path; no user name, whitespace or backslashes. At most five redirects are followed, never
            from https to http.
        into: an open binary file; holds a part of the body if an error is raised.
        max_bytes: maximum size of the body.
        timeout: seconds for the whole download.
        allowed_networks: CIDR blocks (``"10.0.0.0/8"``) that may be called in addition to public addresses.

    Raises:
        RefusedSourceError: the URL is ambiguous, or resolves to an IP address that is neither public nor allowed, or
            the body is compressed. Nothing was sent to the refused address.
        LimitError: the body is longer than ``max_bytes``.
        FetchError: the network or the server failed, or the timeout has expired.
    """
    networks = parse_networks(allowed_networks)
    deadline = _Deadline(timeout)
    parts = _parsed(url)
    for _ in range(MAX_REDIRECTS + 1):
        try:
            location = _one_hop(parts, into, max_bytes, networks, deadline)
        except TimeoutError as error:
            raise FetchError(f"{_shown(parts)} did not finish within fetch_timeout={timeout:g} s: raise it.") from error
        except (OSError, http.client.HTTPException) as error:
            reason = f"{_shown(parts)} could not be fetched ({one_line(error)})"
            raise FetchError(f"{reason}: check the URL and the network.") from error
        if location is None:
            return
        target = _parsed(location, base=parts.geturl())
        if (parts.scheme, target.scheme) == ("https", "http"):
            hop = f"{_shown(parts)} redirects from https to http ({_shown(target)})"
            raise RefusedSourceError(f"{hop}: use a URL that stays on https.")
        parts = target
    raise FetchError(f"{_shown(parts)} redirects again after {MAX_REDIRECTS} redirects: use the final URL.")


def public_name(url: str) -> str:
    """Returns scheme, host and path of a URL for messages, without the query, which may hold a key. Raises
    RefusedSourceError for an ambiguous URL."""
    return _shown(_parsed(url))


def parse_networks(blocks: tuple[str, ...]) -> tuple[_Network, ...]:
    """Parses CIDR blocks; raises ValueError for anything else."""
    try:
        return tuple(ipaddress.ip_network(block) for block in blocks)
    except ValueError as error:
        raise ValueError(f"allowed_networks={blocks} must list CIDR blocks such as '10.0.0.0/8': {error}.") from error


def is_public(address: str) -> bool:
    """Checks whether a numeric IP address is globally reachable and embeds no other address."""
    ip = ipaddress.ip_address(address)
    if any(ip in block for block in _SPECIAL):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        return ip in _PUBLIC_V6 and ip.is_global
    return ip.is_global and not ip.is_multicast


class _Deadline:
    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Returns the remaining seconds, greater than 0; raises TimeoutError otherwise."""
        if (seconds := self._end - time.monotonic()) <= 0:
            raise TimeoutError
        return seconds


class _TimedReader(io.RawIOBase):
    """Raw reader of a socket, with each wait bounded by the deadline. ``http.client`` reads headers through it."""

    def __init__(self, connection: socket.socket, deadline: _Deadline):
        self._connection, self._deadline = connection, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._connection.settimeout(self._deadline.left())
        return self._connection.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, 1 << 16)


def _parsed(url: str, base: str = "") -> SplitResult:
    """Parses a URL relative to ``base``. Refuses URLs in which parsers could find different hosts."""
    if found := _AMBIGUOUS.search(url):
        raise RefusedSourceError(
            f"The URL (not shown: it may hold a password) contains {found.group()!r}, which parsers read differently: "
            "percent-encode it."
        )
    try:
        parts = urlsplit(urljoin(base, quote(url, safe=string.punctuation)))
    except ValueError as error:  # unbalanced brackets
        raise RefusedSourceError("The URL has no valid host: write http(s)://host/path.") from error
    if parts.scheme not in _PORTS:
        raise RefusedSourceError(f"A URL with the scheme {parts.scheme!r} is not fetched: use http or https.")
    if "@" in parts.netloc:
        raise RefusedSourceError("The URL contains a user name or password before '@': remove it.")
    authority = _AUTHORITY.fullmatch(parts.netloc)
    if not authority or len(authority["host"]) > 253 or int(authority["port"] or 1) > 65535:
        fix = "write http(s)://host/path or http(s)://host:port/path, with international names in xn-- form"
        raise RefusedSourceError(f"The URL has no valid host: {fix}.")
    if not parts.path and (parts.query or parts.fragment):
        raise RefusedSourceError("The URL has no '/' before '?' or '#', which parsers read differently: add the '/'.")
    return parts


def _shown(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def _one_hop(
    parts: SplitResult, into: BinaryIO, max_bytes: int, networks: tuple[_Network, ...], deadline: _Deadline
) -> str | None:
    """Sends one request. Writes the body, or returns the location of a redirect."""
    host = (parts.hostname or "").removesuffix(".")
    addresses = _checked_addresses(parts, host, networks, deadline)
    request = (
        f"GET {parts.path or '/'}{'?' if parts.query else ''}{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "User-Agent: blueberry-video\r\nAccept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    with _connected(addresses, deadline) as plain:
        connection = plain
        if parts.scheme == "https":
            plain.settimeout(deadline.left())
            # a broken connection must not pass for the end of a body without a length
            tls = ssl.create_default_context()
            connection = tls.wrap_socket(plain, server_hostname=host, suppress_ragged_eofs=False)
        with connection:
            connection.settimeout(deadline.left())
            connection.sendall(request.encode("ascii"))
            reader = cast(socket.socket, _TimedReader(connection, deadline))  # only makefile() is used
            response = http.client.HTTPResponse(reader, method="GET")
            response.begin()
            if response.status in _REDIRECTS and (location := response.headers.get("Location")):
                # http.client decodes headers as latin-1
                return str(location).encode("latin-1").decode("utf-8", "replace")
            _copy_body(_shown(parts), response, into, max_bytes)
            return None


def _checked_addresses(
    parts: SplitResult, host: str, networks: tuple[_Network, ...], deadline: _Deadline
) -> list[_SocketAddress]:
    """Resolves a host name once and returns its addresses. A single refused address refuses all of them."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def resolve() -> None:
        try:
            answers.put(socket.getaddrinfo(host, parts.port or _PORTS[parts.scheme], type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=resolve, daemon=True).start()  # getaddrinfo has no timeout, so the thread is abandoned
    try:
        answer = answers.get(timeout=deadline.left())
    except queue.Empty as error:
        raise TimeoutError from error
    if isinstance(answer, Exception):
        raise OSError(f"the host name does not resolve: {answer}") from answer
    for *_, address in answer:
        ip = ipaddress.ip_address(address[0])
        if not is_public(address[0]) and not any(ip in network for network in networks):
            raise RefusedSourceError(
                f"{_shown(parts)} resolves to {ip}, which is not a public address: nothing was sent. Add its network "
                "to allowed_networks to use this server."
            )
    return list(dict.fromkeys((family, address) for family, *_, address in answer))


def _connected(addresses: list[_SocketAddress], deadline: _Deadline) -> socket.socket:
    """Connects to the first address that answers. Each address gets an equal share of the remaining time."""
    failure: OSError = OSError("the host name has no address")
    for tried, (family, address) in enumerate(addresses):
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(deadline.left() / (len(addresses) - tried))
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure


def _copy_body(name: str, response: http.client.HTTPResponse, into: BinaryIO, max_bytes: int) -> None:
    if response.status != 200:
        raise FetchError(f"{name} returns status {response.status} instead of a file: check the URL.")
    encodings = {
        "Content-Encoding": response.headers.get_all("Content-Encoding", []),
        "Transfer-Encoding": [] if response.chunked else response.headers.get_all("Transfer-Encoding", []),
    }
    for header, values in encodings.items():
        if any(value.strip().lower() not in ("", "identity") for value in values):
            found = f"{name} returns {header}: {', '.join(values)[:60]}, although only identity was accepted"
            raise RefusedSourceError(f"{found}: serve the file uncompressed, since a compressed body has no bound.")
    expected = response.length
    too_long = f"more than max_bytes={max_bytes}: raise max_bytes, or shorten the video"
    if expected is not None and expected > max_bytes:
        raise LimitError(f"{name} has {expected} bytes, {too_long}.")
    buffer = bytearray(_PIECE)
    view, received = memoryview(buffer), 0
    while count := response.readinto(buffer):
        received += count
        if received > max_bytes:
            raise LimitError(f"{name} has {received} bytes or more, {too_long}.")
        into.write(view[:count])
    if expected is not None and received < expected:
        raise FetchError(f"{name} ended after {received} of {expected} bytes: download it again.")
