"""Fetching a picture from a URL without being led to places that the outside must not see.

Only http and https; every address that a host name stands for must be public, and the connection
goes to the very address that was checked, at each redirect anew; size and time are bounded.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from llava_uhd.errors import UserError

REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16

# IPv6 ranges that carry an IPv4 address inside: a gateway may lead to a private one.
_CARRIERS = ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
_TUNNELS = tuple(ipaddress.IPv6Network(text) for text in _CARRIERS)


@dataclass(frozen=True)
class FetchLimits:
    """Bounds of one fetch.

    Attributes:
        max_bytes: largest body.
        seconds: for everything after the host name is resolved, redirects included.
        max_redirects: followed at most.
        allow_private: also reach private, loopback and link-local addresses (tests, own networks).
    """

    max_bytes: int = 32 << 20
    seconds: float = 20.0
    max_redirects: int = 5
    allow_private: bool = False


def is_url(text: str) -> bool:
    """Whether a text is meant as a URL rather than a path: it has a scheme and ``://``."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme.isalnum()


def fetch(url: str, limits: FetchLimits | None = None) -> bytes:
    """Downloads a URL.

    Args:
        url: http or https.
        limits: bounds; None takes the defaults.

    Returns:
        The body; its content is not looked at.

    Raises:
        UserError: a refused or unreachable address, a bad status, or a limit reached.
    """
    limits = limits or FetchLimits()
    deadline = time.monotonic() + limits.seconds
    here = url
    for _ in range(limits.max_redirects + 1):
        answer = _request(here, limits, deadline)
        if isinstance(answer, bytes):
            return answer
        here = urljoin(here, answer)
    raise UserError(f"{url} redirects more than {limits.max_redirects} times")


def _request(url: str, limits: FetchLimits, deadline: float) -> bytes | str:
    """One request: the body, or where a redirect leads."""
    parts = _check_url(url)
    host = parts.hostname or ""
    address = _public_address(host, limits.allow_private)
    left = deadline - time.monotonic()
    if left <= 0:
        raise _too_slow(url, limits)
    connection = _connection(parts, address, left)
    # A timeout of the socket bounds each read, not their sum: closing it from outside does.
    expired = threading.Event()
    timer = threading.Timer(left, _abort, (connection, expired))
    timer.daemon = True
    timer.start()
    try:
        answer = _exchange(connection, parts, url, limits)
    except (OSError, http.client.HTTPException) as error:
        if expired.is_set() or isinstance(error, TimeoutError):
            raise _too_slow(url, limits) from error
        reason = str(error) or type(error).__name__
        raise UserError(f"{url} cannot be fetched ({reason})") from error
    finally:
        timer.cancel()
        connection.close()
    if expired.is_set():  # a body without a length just seems to end
        raise _too_slow(url, limits)
    return answer


def _exchange(
    connection: http.client.HTTPConnection, parts: SplitResult, url: str, limits: FetchLimits
) -> bytes | str:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "llava_uhd"}
    connection.request("GET", target, headers=headers)
    response = connection.getresponse()
    place = response.getheader("Location")
    if response.status in REDIRECTS and place:
        return place
    if response.status != 200:
        raise UserError(f"{url} answers with status {response.status} {response.reason[:80]}")
    return _read(response, url, limits)


def _check_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"{url!r} is not a valid URL ({error})") from error
    if parts.scheme not in ("http", "https"):
        raise UserError(f"{url!r} is refused: only http and https are fetched")
    if not parts.hostname or parts.username is not None or parts.password is not None or port == 0:
        raise UserError(f"{url!r} is refused: it needs a host, and no user name in front of it")
    if any(character <= " " or character > "~" for character in url):
        raise UserError(f"{url!r} is refused: write blanks and other signs in it as %XX")
    return parts


def _public_address(host: str, allow_private: bool) -> str:
    """First address of a host; all of them must be public unless private ones are allowed."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"host {host!r} cannot be found ({error})") from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    for address in addresses:
        if not allow_private and not is_public(address):
            raise UserError(f"host {host!r} is refused: {address} is not a public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet.

    False for private, loopback, link-local, shared, multicast, reserved and unspecified addresses,
    and for IPv6 forms that carry an IPv4 address.
    """
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if any(parsed in network for network in _TUNNELS) or parsed.is_site_local:
            return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _connection(parts: SplitResult, address: str, seconds: float) -> _Pinned:
    host = parts.hostname or ""
    if parts.scheme == "https":
        return _PinnedTLS(address, host, parts.port or 443, seconds)
    return _Pinned(address, host, parts.port or 80, seconds)


class _Pinned(http.client.HTTPConnection):
    """Connects to a checked address instead of looking the name up again."""

    def __init__(self, address: str, host: str, port: int, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self._address = address
        # The base class forgets its socket while the response is still read from it.
        self.kept: socket.socket | None = None

    def connect(self) -> None:
        self.kept = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self.kept


class _PinnedTLS(_Pinned):
    """The same with TLS: the certificate must be that of the host name."""

    default_port = 443

    def connect(self) -> None:
        super().connect()
        context = ssl.create_default_context()
        self.kept = context.wrap_socket(self.sock, server_hostname=self.host)
        self.sock = self.kept


def _abort(connection: _Pinned, expired: threading.Event) -> None:
    expired.set()
    if connection.kept is not None:
        try:
            connection.kept.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed in the meantime


def _read(response: http.client.HTTPResponse, url: str, limits: FetchLimits) -> bytes:
    announced = response.getheader("Content-Length")
    too_large = UserError(f"{url} is larger than the limit of {limits.max_bytes} bytes")
    if announced and announced.isdigit() and int(announced) > limits.max_bytes:
        raise too_large
    parts, size = [], 0
    while chunk := response.read(_CHUNK):
        size += len(chunk)
        if size > limits.max_bytes:
            raise too_large
        parts.append(chunk)
    if announced and announced.isdigit() and size < int(announced):
        raise http.client.IncompleteRead(b"", int(announced) - size)
    return b"".join(parts)


def _too_slow(url: str, limits: FetchLimits) -> UserError:
    return UserError(f"{url} took longer than {limits.seconds:g} s")
