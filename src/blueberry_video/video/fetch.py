"""Downloads from addresses that strangers may have written.

The danger of an address is where the request goes (server-side request forgery): a name can lead into our own
network, change its meaning between the check and the connection, or redirect there. So there is one parser, each name
is resolved once and every address of the answer checked, the connection is made to a checked address and never to the
name, and each redirect goes through all of it again. The environment's proxies are not used. One deadline spans
names, connections, headers, redirects and body: a server that sends a byte a second gains nothing.
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

from blueberry_video.video.errors import FetchError, LimitError, RefusedSourceError

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 18  # bytes read at a time
_PORTS = {"http": 80, "https": 443}

_AMBIGUOUS = re.compile(r"[\x00-\x20\x7f\\]")  # parsers disagree on these: some drop them, some take \ for /
_LABEL = r"[A-Za-z0-9_-]{1,63}"
_AUTHORITY = re.compile(rf"(?P<host>{_LABEL}(?:\.{_LABEL})*\.?|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[1-9][0-9]{{0,4}}))?")

_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")  # mapped IPv4, NAT64, link-local, unique local, multicast lie outside
_SPECIAL = tuple(
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays from IPv6 to IPv4 (6to4)
        "2001::/23",  # protocol assignments, Teredo among them: they carry an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries an IPv4 address
        "3fff::/20",  # documentation
    )
)
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_SocketAddress = tuple[int, tuple]  # family, and what connect() takes


def fetch(url: str, into: BinaryIO, max_bytes: int, timeout: float, allowed_networks: tuple[str, ...] = ()) -> None:
    """Writes what an http(s) address serves to ``into``.

    Args:
        url: in ASCII up to the path; no user name, blanks or backslashes. Up to five redirects are followed, never from
            https to http.
        into: an open binary file; holds a part of the body where an error is raised.
        max_bytes: of the body.
        timeout: seconds for everything together.
        allowed_networks: CIDR blocks (``"10.0.0.0/8"``) that may be called besides public addresses.

    Raises:
        RefusedSourceError: the address is ambiguous, or leads to an address that is neither public nor allowed, or the
            body is compressed. Nothing was sent to the refused address.
        LimitError: the body is longer than ``max_bytes``.
        FetchError: the network or the server failed, or the time is up.
    """
    networks = parse_networks(allowed_networks)
    deadline = _Deadline(timeout)
    parts = _parsed(url)
    for _ in range(MAX_REDIRECTS + 1):
        try:
            location = _one_hop(parts, into, max_bytes, networks, deadline)
        except TimeoutError as error:
            raise FetchError(f"{_shown(parts)} did not arrive within fetch_timeout={timeout:g} s: raise it.") from error
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise FetchError(f"{_shown(parts)} could not be fetched: {reason}.") from error
        if location is None:
            return
        target = _parsed(location, base=parts.geturl())
        if (parts.scheme, target.scheme) == ("https", "http"):
            raise RefusedSourceError(
                f"{_shown(parts)} redirects from https to http ({_shown(target)}): use an address that stays on https."
            )
        parts = target
    raise FetchError(f"{_shown(parts)} was reached after {MAX_REDIRECTS} redirects and redirects again: use its end.")


def public_name(url: str) -> str:
    """Scheme, host and path of an address: what messages show of it, as the query may hold a key.

    Raises:
        RefusedSourceError: the address is ambiguous.
    """
    return _shown(_parsed(url))


def parse_networks(blocks: tuple[str, ...]) -> tuple[_Network, ...]:
    """CIDR blocks as networks.

    Raises:
        ValueError: one is no CIDR block.
    """
    try:
        return tuple(ipaddress.ip_network(block) for block in blocks)
    except ValueError as error:
        raise ValueError(f"allowed_networks={blocks} must name networks such as '10.0.0.0/8': {error}.") from error


def is_public(address: str) -> bool:
    """Whether a numeric IP address is one that anyone on the internet could serve from, and carries no other in it."""
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
        """Seconds left, more than 0; raises TimeoutError otherwise."""
        if (seconds := self._end - time.monotonic()) <= 0:
            raise TimeoutError
        return seconds


class _TimedReader(io.RawIOBase):
    """A socket's bytes, each wait bounded by what is left of the deadline; ``http.client`` reads headers through it."""

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
    """The address, taken relative to ``base``; refused unless every parser reads the same host in it."""
    if found := _AMBIGUOUS.search(url):
        raise RefusedSourceError(
            f"The address (not shown: it may hold a password) contains {found.group()!r}, which programs read "
            "differently: percent-encode it."
        )
    try:
        parts = urlsplit(urljoin(base, quote(url, safe=string.punctuation)))
    except ValueError as error:  # brackets that do not match
        raise RefusedSourceError("The address has no valid host: write http(s)://host/path.") from error
    if parts.scheme not in _PORTS:
        raise RefusedSourceError(f"An address with the scheme {parts.scheme!r} is never fetched: use http or https.")
    if "@" in parts.netloc:
        raise RefusedSourceError("The address carries a user name or password before '@': remove it.")
    authority = _AUTHORITY.fullmatch(parts.netloc)
    if not authority or len(authority["host"]) > 253 or int(authority["port"] or 1) > 65535:
        raise RefusedSourceError(
            "The address has no valid host: write http(s)://host/path or http(s)://host:port/path, international "
            "names in their xn-- form."
        )
    if not parts.path and (parts.query or parts.fragment):
        raise RefusedSourceError(
            "The address goes from its host to '?' or '#' without a '/', which programs read differently: add the '/'."
        )
    return parts


def _shown(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def _one_hop(
    parts: SplitResult, into: BinaryIO, max_bytes: int, networks: tuple[_Network, ...], deadline: _Deadline
) -> str | None:
    """Asks one server; writes its body, or returns where it redirects to."""
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
            # a connection cut short must not look like the end of a body without a length
            connection = ssl.create_default_context().wrap_socket(
                plain, server_hostname=host, suppress_ragged_eofs=False
            )
        with connection:
            connection.settimeout(deadline.left())
            connection.sendall(request.encode("ascii"))
            reader = cast(socket.socket, _TimedReader(connection, deadline))  # its makefile() is all that is used
            response = http.client.HTTPResponse(reader, method="GET")
            response.begin()
            if response.status in _REDIRECTS and (location := response.headers.get("Location")):
                return (
                    str(location).encode("latin-1").decode("utf-8", "replace")
                )  # http.client reads headers as latin-1
            _copy_body(_shown(parts), response, into, max_bytes)
            return None


def _checked_addresses(
    parts: SplitResult, host: str, networks: tuple[_Network, ...], deadline: _Deadline
) -> list[_SocketAddress]:
    """The one resolution of a name: what may be dialled. One bad address among several refuses them all."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def resolve() -> None:
        try:
            answers.put(socket.getaddrinfo(host, parts.port or _PORTS[parts.scheme], type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=resolve, daemon=True).start()  # a resolver cannot be told to hurry: it is left behind
    try:
        answer = answers.get(timeout=deadline.left())
    except queue.Empty as error:
        raise TimeoutError from error
    if isinstance(answer, Exception):
        raise OSError(f"its host name does not resolve ({answer})") from answer
    for *_, address in answer:
        ip = ipaddress.ip_address(address[0])
        if not is_public(address[0]) and not any(ip in network for network in networks):
            raise RefusedSourceError(
                f"{_shown(parts)} leads to {ip}, which is no public address: nothing was sent there. List its network "
                "in allowed_networks if this server is meant to be used."
            )
    return list(dict.fromkeys((family, address) for family, *_, address in answer))


def _connected(addresses: list[_SocketAddress], deadline: _Deadline) -> socket.socket:
    """A connection to the first address that answers; each gets an equal share of the time left."""
    failure: OSError = OSError("its host name has no address")
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
        raise FetchError(f"{name} answers with status {response.status}, not with a file: check the address.")
    encodings = {
        "Content-Encoding": response.headers.get_all("Content-Encoding", []),
        "Transfer-Encoding": [] if response.chunked else response.headers.get_all("Transfer-Encoding", []),
    }
    for header, values in encodings.items():
        if any(value.strip().lower() not in ("", "identity") for value in values):
            raise RefusedSourceError(
                f"{name} answers with {header}: {', '.join(values)[:60]}, though only identity was accepted: a "
                "compressed body can grow without bound. Serve the file as it is."
            )
    expected = response.length
    if expected is not None and expected > max_bytes:
        raise LimitError(f"{name} has {expected} bytes, more than max_bytes={max_bytes}: raise it, or cut the file.")
    buffer = bytearray(_PIECE)
    view, received = memoryview(buffer), 0
    while count := response.readinto(buffer):
        received += count
        if received > max_bytes:
            raise LimitError(f"{name} is longer than max_bytes={max_bytes}: raise it, or cut the file.")
        into.write(view[:count])
    if expected is not None and received < expected:
        raise FetchError(f"{name} ended after {received} of {expected} bytes: fetch it again.")
