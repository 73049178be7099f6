"""HTTP(S) downloads from untrusted URLs, protected against server-side request forgery.

A host name can resolve to a private network, change its address between the check and the connection, or redirect to
one. Therefore each URL is parsed and each name resolved once, every returned IP address is checked, the connection is
made to a checked address and never to the name, and each redirect repeats all checks. Proxies of the environment are
ignored. One deadline covers name resolution, connections, headers, redirects, waits between attempts and body.

Request headers and tokens are sent only to hosts that are named for them, after a redirect as before it, and in plain
text only to networks that are allowed explicitly.
"""

import http.client
import io
import ipaddress
import queue
import random
import re
import socket
import ssl
import string
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import BinaryIO, cast
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from blueberry_video.video.errors import FetchError, LimitError, RefusedSourceError, one_line

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (429, 503)  # too many requests; temporarily unavailable
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before the first retry, doubled each time; an upper limit
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
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[\x20-\x7e\t]*")
_OWN_HEADERS = (  # set here: a different value would change where or how a body is read
    *("host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect"),
    *("accept-encoding", "range", "if-range", "proxy-authorization"),
)
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_SocketAddress = tuple[int, tuple]  # family and argument of connect()


@dataclass(frozen=True)
class Access:
    """Request headers for hosts that ask for a login.

    Attributes:
        headers: header → value; never in a message or a ``repr``.
        hosts: the hosts that receive them, ``name`` (its default port) or ``name:port``.

    Raises:
        ValueError: a name or value that is no header, a header that is set by the download itself, or no hosts.
    """

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.headers.items():
            if not _HEADER.fullmatch(name) or not _VALUE.fullmatch(value) or name.lower() in _OWN_HEADERS:
                raise ValueError(
                    f"request_headers has {name!r}, which is not a header that can be added, or a value with other "
                    f"than printable ASCII characters: remove it; {', '.join(_OWN_HEADERS)} are set by the download."
                )
        if self.headers and not self.hosts:
            raise ValueError(
                "token and request_headers are sent only to the hosts of token_hosts, which is empty: set it, as in "
                "token_hosts=['videos.example.com']."
            )
        for host in self.hosts:
            if not (match := _AUTHORITY.fullmatch(host)) or int(match["port"] or 1) > 65535:
                raise ValueError(f"token_hosts has {host!r}: write a host name, or name:port, without a scheme.")

    def lines(self, parts: SplitResult, secure: bool) -> str:
        """Returns the header lines of a request; empty for other hosts. Raises RefusedSourceError if they would be
        sent in plain text."""
        port = parts.port or _PORTS[parts.scheme]
        name = (parts.hostname or "").removesuffix(".")
        name = f"[{name}]" if ":" in name else name
        names = {f"{name}:{port}", *([name] if port == _PORTS[parts.scheme] else [])}
        if not self.headers or not names & {host.lower().removesuffix(".") for host in self.hosts}:
            return ""
        if not secure:
            raise RefusedSourceError(
                f"{_shown(parts)} would receive the token or request_headers in plain text: use https, or add its "
                "network to allowed_networks."
            )
        return "".join(f"{key}: {value}\r\n" for key, value in self.headers.items())


class Deadline:
    """Time limit shared by the steps of one download, or by several downloads.

    Args:
        seconds: time from now on.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Returns the remaining seconds, greater than 0; raises TimeoutError otherwise."""
        if (seconds := self._end - time.monotonic()) <= 0:
            raise TimeoutError
        return seconds


class _BusyError(Exception):
    """A server that asks to be called again later.

    Attributes:
        status: the status of its response.
        seconds: of its Retry-After header; None without one.
    """

    def __init__(self, status: int, seconds: float | None):
        super().__init__(status, seconds)
        self.status, self.seconds = status, seconds


def fetch(
    url: str,
    into: BinaryIO,
    max_bytes: int,
    timeout: float | Deadline,
    allowed_networks: tuple[str, ...] = (),
    access: Access | None = None,
    retries: int = 3,
) -> None:
    """Downloads an http(s) URL into ``into``.

    Args:
        url: ASCII up to the path; no user name, whitespace or backslashes. At most five redirects are followed, never
            from https to http.
        into: an open binary file; holds a part of the body if an error is raised.
        max_bytes: maximum size of the body.
        timeout: seconds for the whole download, or a deadline that other downloads share.
        allowed_networks: CIDR blocks (``"10.0.0.0/8"``) that may be called in addition to public addresses.
        access: request headers, and the hosts that receive them.
        retries: further attempts if the server answers 429 or 503, after the seconds of its Retry-After header, else
            after 0.5, 1, 2 … s with up to a quarter added at random.

    Raises:
        RefusedSourceError: the URL is ambiguous, or resolves to an IP address that is neither public nor allowed, or
            the body is compressed. Nothing was sent to the refused address.
        LimitError: the body is longer than ``max_bytes``.
        FetchError: the network or the server failed, or the timeout has expired.
    """
    networks = parse_networks(allowed_networks)
    deadline = timeout if isinstance(timeout, Deadline) else Deadline(timeout)
    limits = (into, max_bytes, networks, deadline, access or Access())
    parts, attempts = _parsed(url), 0
    for _ in range(MAX_REDIRECTS + 1):
        try:
            while True:
                try:
                    location = _one_hop(parts, *limits)
                    break
                except _BusyError as busy:
                    _wait(parts, busy, attempts, retries, deadline)
                    attempts += 1
        except TimeoutError as error:
            seconds = f"fetch_timeout={deadline.seconds:g} s"
            raise FetchError(f"{_shown(parts)} did not finish within {seconds}: raise it.") from error
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


class _TimedReader(io.RawIOBase):
    """Raw reader of a socket, with each wait bounded by the deadline. ``http.client`` reads headers through it."""

    def __init__(self, connection: socket.socket, deadline: Deadline):
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
    parts: SplitResult,
    into: BinaryIO,
    max_bytes: int,
    networks: tuple[_Network, ...],
    deadline: Deadline,
    access: Access,
) -> str | None:
    """Sends one request. Writes the body, or returns the location of a redirect."""
    host = (parts.hostname or "").removesuffix(".")
    addresses = _checked_addresses(parts, host, networks, deadline)
    allowed = all(_inside(address[0], networks) for _, address in addresses)
    added = access.lines(parts, secure=parts.scheme == "https" or allowed)
    own = "".join(
        f"{name}: {value}\r\n"
        for name, value in (("User-Agent", "blueberry-video"), ("Accept", "*/*"))
        if f"\n{name.lower()}:" not in "\n" + added.lower()
    )
    request = (
        f"GET {parts.path or '/'}{'?' if parts.query else ''}{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"{own}{added}Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
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
            if response.status in _BUSY:
                raise _BusyError(response.status, _retry_after(response.headers.get("Retry-After")))
            _copy_body(_shown(parts), response, into, max_bytes)
            return None


def _retry_after(value: str | None) -> float | None:
    """Returns the seconds of a Retry-After header, at least 0: a number, or the time until a date."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}\s*", value, re.ASCII):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _wait(parts: SplitResult, busy: _BusyError, attempts: int, retries: int, deadline: Deadline) -> None:
    """Waits before another attempt; raises FetchError if there is none left, or no time for it."""
    if busy.seconds is None:  # random, so that clients that failed together do not come back together
        seconds = min(_FIRST_WAIT * 2**attempts, _LONGEST_WAIT) * (1 + random.Random().random() / 4)
    else:
        seconds = busy.seconds
    found = f"{_shown(parts)} returns status {busy.status}, try again later"
    if attempts >= retries:
        raise FetchError(f"{found}, to {attempts + 1} attempts: wait, or raise fetch_retries={retries}.") from busy
    if seconds >= deadline.left():
        limit = f"fetch_timeout={deadline.seconds:g} s"
        raise FetchError(f"{found}, in {seconds:.1f} s, which is after {limit}: wait, or raise it.") from busy
    time.sleep(seconds)


def _inside(address: str, networks: tuple[_Network, ...]) -> bool:
    return any(ipaddress.ip_address(address) in network for network in networks)


def _checked_addresses(
    parts: SplitResult, host: str, networks: tuple[_Network, ...], deadline: Deadline
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
        if not is_public(address[0]) and not _inside(address[0], networks):
            raise RefusedSourceError(
                f"{_shown(parts)} resolves to {ip}, which is not a public address: nothing was sent. Add its network "
                "to allowed_networks to use this server."
            )
    return list(dict.fromkeys((family, address) for family, *_, address in answer))


def _connected(addresses: list[_SocketAddress], deadline: Deadline) -> socket.socket:
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
