"""Fetching pictures: what is refused, against a real server on this machine."""

from __future__ import annotations

import http.server
import io
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from llava_uhd.errors import UserError
from llava_uhd.serve import fetch as module
from llava_uhd.serve.fetch import FetchLimits, fetch, is_public, is_url

LOCAL = FetchLimits(allow_private=True, seconds=5)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers of every kind, by path."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path == "/picture.png":
            self.reply(200, png(), {"Content-Length": str(len(png()))})
        elif path == "/to":
            self.reply(302, b"", {"Location": self.path.partition("?")[2]})
        elif path == "/loop":
            self.reply(301, b"", {"Location": "/loop"})
        elif path == "/announced":
            self.reply(200, b"x", {"Content-Length": "99999999999"})
        elif path == "/endless":
            self.reply(200, b"x" * 300_000)
        elif path == "/short":
            self.reply(200, b"only this", {"Content-Length": "1000"})
        elif path == "/drip":
            self.drip()
        else:
            self.reply(404, b"")

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            return  # the other side has heard enough

    def drip(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            return

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_address[1]}"
    serving.shutdown()
    serving.server_close()


def test_fetches(server: str) -> None:
    assert fetch(f"{server}/picture.png", LOCAL) == png()
    assert fetch(f"{server}/picture.png?a=b", LOCAL) == png()
    assert Handler.asked[-1] == "/picture.png?a=b"
    assert fetch(f"{server}/to?{server}/to?/picture.png", LOCAL) == png()  # absolute and relative


def test_this_machine_is_refused(server: str) -> None:
    before = len(Handler.asked)
    port = server.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::1]", "[::ffff:7f00:1]"):
        with pytest.raises(UserError, match="not a public address|cannot be found"):
            fetch(f"http://{host}:{port}/picture.png")
    assert len(Handler.asked) == before


def test_redirects_are_checked_too(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address counts as public here, the one it redirects to does not."""
    port = server.rpartition(":")[2]
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    target = f"http://127.0.0.2:{port}/picture.png"
    assert fetch(f"{server}/picture.png") == png()
    with pytest.raises(UserError, match=r"127\.0\.0\.2 is not a public address"):
        fetch(f"{server}/to?{target}")
    with pytest.raises(UserError, match="only http and https"):
        fetch(f"{server}/to?file:///etc/passwd")


def test_the_checked_address_is_the_one_used(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers differently the second time does not get a second time."""
    port, asked = int(server.rpartition(":")[2]), []
    lookup = socket.getaddrinfo

    def once(host: str, *args: object, **options: object) -> object:
        if host == "pictures.example":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.9"
        return lookup(host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", once)
    assert fetch(f"http://pictures.example:{port}/picture.png", LOCAL) == png()
    assert asked == ["pictures.example"]


def test_one_private_address_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(2, 1, 6, "", ("8.8.8.8", 0)), (2, 1, 6, "", ("10.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: entries)
    with pytest.raises(UserError, match=r"10\.0\.0\.1 is not a public address"):
        fetch("http://both.example/x.png")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/loop", "redirects more than 5 times"),
        ("/announced", "larger than the limit of 200000 bytes"),
        ("/endless", "larger than the limit of 200000 bytes"),
        ("/short", "cannot be fetched .*IncompleteRead"),
        ("/nothing", "status 404"),
    ],
)
def test_bad_answers(server: str, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fetch(server + path, FetchLimits(max_bytes=200_000, seconds=5, allow_private=True))
    assert "\n" not in str(caught.value)


def test_a_slow_server_is_left(server: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"took longer than 0\.4 s"):
        fetch(f"{server}/drip", FetchLimits(seconds=0.4, allow_private=True))
    assert time.monotonic() - start < 3


def test_a_silent_server_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(UserError, match="took longer"):
            fetch(url, FetchLimits(seconds=0.3, allow_private=True))


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch(f"http://127.0.0.1:{port}/", LOCAL)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "only http and https"),
        ("ftp://example.com/a.png", "only http and https"),
        ("http://", "needs a host"),
        ("http:///a.png", "needs a host"),
        ("http://user@example.com/a.png", "no user name"),
        ("http://user:word@example.com/a.png", "no user name"),
        ("http://example.com:99999/a.png", "not a valid URL"),
        ("http://[::1/a.png", "not a valid URL"),
        ("http://example.com/a b.png", "%XX"),
        ("http://example.com/\r\nHost: x", "%XX|refused|not a valid"),
    ],
)
def test_bad_urls(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch(url, LOCAL)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
        "::", "::1", "fe80::1", "fc00::1", "ff02::1", "fec0::1", "::ffff:10.0.0.1", "2001:db8::1",
        "64:ff9b::a00:1", "2002:a00:1::", "2001:0:a00:1::",
    ],
)  # fmt: skip
def test_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "2a00::1"])
def test_public(address: str) -> None:
    assert is_public(address)


def test_is_url() -> None:
    assert is_url("https://a/b.png") and is_url("file:///a")
    assert not is_url("a/b.png") and not is_url("C:\\a.png") and not is_url("odd://"[:3])
