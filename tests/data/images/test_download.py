"""Downloads against a server on this machine; names are made up, addresses never left."""

import collections
import contextlib
import email.utils
import errno
import hashlib
import http.server
import itertools
import os
import pathlib
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from vixml_jax.data.images import download, url_safety
from vixml_jax.data.images.download import DownloadSettings
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[3]
PUBLIC = "93.184.216.34"
LOCAL = DownloadSettings(allow_private=True, retries=2, timeout=2.0, max_bytes=100_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the route of the path says; writes down what was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with self.server.lock:
            self.server.seen.append((self.path, self.headers, time.monotonic()))
            self.server.open_now += 1
            self.server.most_open = max(self.server.most_open, self.server.open_now)
        self.close_connection = True
        with contextlib.suppress(OSError):  # Clients that go away are what is tested.
            route = self.server.routes.get(self.path.partition("?")[0])
            if route is None:
                self.reply(404)
            elif isinstance(route, bytes):
                self.reply(200, route)
            else:
                route(self)
        self.leave()

    def leave(self):
        """Counts the connection as closed: before the client can know the answer is whole."""
        with self.server.lock:
            self.server.open_now -= not self.left
        self.left = True

    left = False

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.leave()
        self.wfile.write(body)

    def log_message(self, *unused):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.routes, self.seen = threading.Lock(), {}, []
        self.open_now = self.most_open = 0

    def url(self, path, host="127.0.0.1", scheme="http"):
        return f"{scheme}://{host}:{self.server_port}{path}"

    def count(self, path):
        return sum(seen[0] == path for seen in self.seen)

    def gaps(self, path):
        """Seconds between the requests for a path."""
        times = [seen[2] for seen in self.seen if seen[0] == path]
        return [after - before for before, after in itertools.pairwise(times)]

    def handle_error(self, *unused):
        pass  # Refused handshakes are what is tested.


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(download, "_BACK_OFF", 0.01)


class Network:
    """Attributes: names, the addresses that each has, answer by answer; how often each was asked
    for; the addresses that were connected to."""

    def __init__(self):
        self.names, self.asked, self.connected = {}, collections.Counter(), []


@pytest.fixture
def network(monkeypatch, server):
    """Made-up names; every connection ends at the server, whatever its address was."""

    net = Network()
    connect = socket.socket.connect

    def getaddrinfo(host, port, *unused, **unused_too):
        answers = net.names[host]
        found = answers[min(net.asked[host], len(answers) - 1)]
        net.asked[host] += 1
        return [
            (
                socket.AF_INET6 if ":" in ip else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (ip, port),
            )
            for ip in found
        ]

    def rerouted(self, address):
        net.connected.append(address)
        return connect(self, server.server_address)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", rerouted)
    return net


def files_in(directory):
    """Paths, relative to the directory, of all that is in it but the list of failures."""
    found = [path for path in pathlib.Path(directory).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(directory)) for path in found if path.suffix != ".tsv")


def fault_of(url, directory, settings=LOCAL, others=()):
    """What is wrong with the one url; nothing of it may be left."""
    paths, faults = download.download([url, *others], str(directory), settings=settings)
    assert url not in paths and url in faults
    assert len(files_in(directory)) == len(paths)
    return faults[url]


def until(condition):
    """Whether a condition comes true within two seconds."""
    latest = time.monotonic() + 2
    while not condition() and time.monotonic() < latest:
        time.sleep(0.01)
    return condition()


def failures(directory):
    return (pathlib.Path(directory) / "failures.tsv").read_text(encoding="utf-8")


# What comes out.


def test_files_hold_what_the_server_sent(server, tmp_path):
    bodies = {f"/{i}?size=é": os.urandom(1 + 997 * i) for i in range(40)}
    server.routes = {f"/{i}": body for i, body in enumerate(bodies.values())}
    urls = [server.url(path) for path in bodies]
    paths, faults = download.download(urls * 2, str(tmp_path), settings=LOCAL)
    assert faults == {} and list(paths) == urls
    for url, body in zip(urls, bodies.values(), strict=True):
        name = hashlib.sha256(url.encode()).hexdigest()
        assert paths[url] == str(tmp_path / name[:2] / name)
        assert pathlib.Path(paths[url]).read_bytes() == body
    assert len(server.seen) == 40  # Each once, though named twice.
    assert len(files_in(tmp_path)) == 40
    path, headers, _ = server.seen[0]
    assert path.endswith("?size=%C3%A9")
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert failures(tmp_path) == ""


def test_order_is_that_of_the_urls_however_late_they_come(server, tmp_path):
    def late(handler):
        time.sleep(0.3)
        handler.reply(200, b"late")

    def late_fault(handler):
        time.sleep(0.2)
        handler.reply(410)

    server.routes = {"/a": late, "/c": b"c", "/d": late_fault}
    urls = [server.url(path) for path in ("/a", "/d", "/c", "/b")]
    paths, faults = download.download(["ftp://x/y", *urls], str(tmp_path), settings=LOCAL)
    assert [url[-2:] for url in paths] == ["/a", "/c"]
    assert [url[-2:] for url in faults] == ["/y", "/d", "/b"]
    assert [line.split("\t")[1] for line in failures(tmp_path).splitlines()] == [
        "neither http nor https, but ftp",
        "status 410 Gone",
        "status 404 Not Found",
    ]


def test_connections_are_bounded_and_used(server, tmp_path):
    def slow(handler):
        time.sleep(0.05)
        handler.reply(200, b"x")

    server.routes = {f"/{i}": slow for i in range(30)}
    settings = DownloadSettings(allow_private=True, connections=3)
    before, most = threading.active_count(), 0

    def watch():
        nonlocal most
        while not done.wait(0.01):
            names = [thread.name for thread in threading.enumerate()]
            most = max(most, sum("(work)" in name for name in names))

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    paths, _ = download.download(
        [server.url(path) for path in server.routes], str(tmp_path), settings=settings
    )
    done.set()
    watcher.join()
    assert len(paths) == 30
    assert server.most_open == 3
    assert most == 3  # Threads of the downloads.
    assert until(lambda: threading.active_count() == before)


@pytest.mark.parametrize("text,expected", [
    ("http://a/b", True), ("HTTPS://a", True), ("http:/a", False), ("a/http://b", False),
    ("ftp://a", False), ("httpx://a", False), ("", False),
])  # fmt: skip
def test_is_url(text, expected):
    assert download.is_url(text) == expected


@pytest.mark.parametrize("bad", [
    {"connections": 0}, {"retries": -1}, {"timeout": 0.0}, {"timeout": float("nan")},
    {"timeout": float("inf")}, {"max_bytes": 0},
])  # fmt: skip
def test_settings_out_of_range(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        DownloadSettings(**bad)


# Trying again.


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_transient_statuses_are_tried_again(server, tmp_path, status):
    def twice(handler):
        handler.reply(status) if server.count("/x") < 3 else handler.reply(200, b"there")

    server.routes["/x"] = twice
    url = server.url("/x")
    paths, faults = download.download([url], str(tmp_path), settings=LOCAL)
    assert faults == {} and pathlib.Path(paths[url]).read_bytes() == b"there"
    assert server.count("/x") == 3


@pytest.mark.parametrize("retries", [0, 3])
def test_retries_end(server, tmp_path, retries):
    server.routes["/x"] = lambda handler: handler.reply(503)
    settings = DownloadSettings(allow_private=True, retries=retries)
    fault = fault_of(server.url("/x"), tmp_path, settings)
    assert fault == "status 503 Service Unavailable"
    assert server.count("/x") == retries + 1


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 404, 410])
def test_other_statuses_are_final(server, tmp_path, status):
    server.routes["/x"] = lambda handler: handler.reply(status)
    assert fault_of(server.url("/x"), tmp_path).startswith(f"status {status} ")
    assert server.count("/x") == 1


def test_waits_double(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_BACK_OFF", 0.1)
    server.routes["/x"] = lambda handler: handler.reply(503)
    fault_of(server.url("/x"), tmp_path, DownloadSettings(allow_private=True, retries=3))
    assert all(a >= b for a, b in zip(server.gaps("/x"), [0.1, 0.2, 0.4], strict=True))


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(server, tmp_path, form):
    def busy(handler):
        if server.count("/x") > 1:
            return handler.reply(200, b"x")
        # A date has whole seconds only: up to one of them is lost.
        told = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
        handler.reply(429, Retry_After=told)

    server.routes["/x"] = busy
    _, faults = download.download([server.url("/x")], str(tmp_path), settings=LOCAL)
    assert faults == {}
    assert 0.95 < server.gaps("/x")[0] < 5


@pytest.mark.parametrize(
    "told", ["86400", "Fri, 31 Dec 9999 23:59:59 GMT", "-5", "soon", "9" * 5000]
)
def test_retry_after_is_bounded(server, tmp_path, monkeypatch, told):
    monkeypatch.setattr(download, "_LONGEST_WAIT", 0.1)
    server.routes["/x"] = lambda handler: handler.reply(503, Retry_After=told)
    fault_of(server.url("/x"), tmp_path)
    assert server.count("/x") == 3
    assert max(server.gaps("/x")) < 3


def test_time_outs_are_tried_again(server, tmp_path):
    def silent_once(handler):
        if server.count("/x") == 1:
            time.sleep(1)
        handler.reply(200, b"x")

    server.routes["/x"] = silent_once
    settings = DownloadSettings(allow_private=True, timeout=0.4)
    _, faults = download.download([server.url("/x")], str(tmp_path), settings=settings)
    assert faults == {} and server.count("/x") == 2


def test_a_silent_server_is_a_fault(server, tmp_path):
    server.routes["/x"] = lambda handler: time.sleep(1)
    settings = DownloadSettings(allow_private=True, timeout=0.3, retries=1)
    assert fault_of(server.url("/x"), tmp_path, settings) == "timed out after 0.3 s"
    assert until(lambda: server.count("/x") == 2)


def test_nobody_listens(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # And does not listen.
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x"
        assert fault_of(url, tmp_path) == "connection: Connection refused"


@pytest.mark.parametrize("code,tries", [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 3)])
def test_names_that_are_not_found(tmp_path, monkeypatch, code, tries):
    calls = []

    def getaddrinfo(*names, **unused):
        calls.append(names[0])
        raise socket.gaierror(code, "said so")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert fault_of("http://nowhere.example/x", tmp_path) == "host not found: said so"
    assert calls == ["nowhere.example"] * tries


# Bounds of one file.


def test_too_large_by_its_head(server, tmp_path):
    done = threading.Event()

    def large(handler):
        handler.reply(200, Content_Length="100001")
        done.wait(5)  # The head suffices: nobody waits for the file.

    server.routes["/x"] = large
    start = time.monotonic()
    assert fault_of(server.url("/x"), tmp_path) == "larger than 100,000 bytes: 100,001"
    assert time.monotonic() - start < 1.5  # Less than the time-out.
    assert server.count("/x") == 1
    done.set()


def test_as_large_as_allowed(server, tmp_path):
    server.routes["/x"] = bytes(100_000)
    paths, _ = download.download([server.url("/x")], str(tmp_path), settings=LOCAL)
    assert os.path.getsize(paths[server.url("/x")]) == 100_000


def endless(handler, first, part):
    """Sends until the client goes away; how many bytes it took is in `server.sent`."""
    handler.wfile.write(first)
    handler.server.sent = 0
    with contextlib.suppress(OSError):
        while handler.server.sent < 100 << 20:
            handler.wfile.write(part)
            handler.server.sent += len(part)


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("first,part,fault", [
    (HEAD + b"\r\n", bytes(10_000), "larger than 100,000 bytes"),
    (CHUNKED, b"2710\r\n" + bytes(10_000) + b"\r\n", "larger than 100,000 bytes"),
    (CHUNKED, b"1\r\nx\r\n" * 1000, "larger than 100,000 bytes"),
    (CHUNKED + b"-1\r\n", bytes(10_000), "sends without end"),  # Python's reader reads to the end.
    (CHUNKED + b"1\r\nx\r\n0\r\n", b"more: headers\r\n" * 1000, "sends without end"),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, None),
], ids=["no length", "chunks", "small chunks", "negative chunk", "trailers", "100s"])  # fmt: skip
def test_endless_answers_end(server, tmp_path, first, part, fault):
    server.routes["/x"] = lambda handler: endless(handler, first, part)
    found = fault_of(server.url("/x"), tmp_path)
    assert found == fault or (fault is None and found)
    assert until(lambda: not server.open_now)
    assert server.sent < 30 << 20  # Buffers of the system included.


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_slow_drip_ends(server, tmp_path, monkeypatch, where):
    monkeypatch.setattr(download, "_PATIENCE", 2)

    def drip(handler):
        handler.wfile.write(HEAD + (b"X-Long: " if where == "head" else b"\r\n"))
        for _ in range(200):
            handler.wfile.write(b"x")
            time.sleep(0.02)

    server.routes["/x"] = drip
    settings = DownloadSettings(allow_private=True, timeout=0.5)
    start = time.monotonic()
    assert fault_of(server.url("/x"), tmp_path, settings) == "took longer than 1 s"
    assert 0.9 < time.monotonic() - start < 3
    assert server.count("/x") == 1  # Another try would take as long.


@pytest.mark.parametrize("answer,fault", [
    (HEAD + b"Content-Length: 10\r\n\r\nhalf", "broke off after 4 of 10 bytes"),
    (CHUNKED + b"a\r\nhalf", "broke off within a chunk"),
    (CHUNKED + b"4\r\nhalf\r\n", "broke off within a chunk"),
], ids=["length", "in a chunk", "after a chunk"])  # fmt: skip
def test_truncated_files_are_faults(server, tmp_path, answer, fault):
    server.routes["/x"] = lambda handler: handler.wfile.write(answer)
    assert fault_of(server.url("/x"), tmp_path) == fault
    assert server.count("/x") == 3


@pytest.mark.parametrize("answer,fault", [
    (HEAD + b"Content-Length: 0\r\n\r\n", "empty"),
    (CHUNKED + b"0\r\n\r\n", "empty"),
    (HEAD + b"Content-Type: Text/HTML; charset=utf-8\r\n\r\nlog in", "text/html, not a picture"),
    (HEAD + b"Content-Encoding: gzip\r\n\r\nx", "sent packed"),
    (b"\x00\x01 no http\r\n\r\n", "not an answer in HTTP"),
    (b"HTTP/1.1 abc\r\n\r\n", "not an answer in HTTP"),
    (HEAD + b"X: " + b"x" * 70_000 + b"\r\n\r\n", "not an answer in HTTP"),
    (HEAD + b"X: x\r\n" * 200 + b"\r\n", "not an answer in HTTP"),
])  # fmt: skip
def test_answers_without_a_file(server, tmp_path, answer, fault):
    server.routes["/x"] = lambda handler: handler.wfile.write(answer)
    assert fault_of(server.url("/x"), tmp_path).startswith(fault)
    assert server.count("/x") == 1


# Once.


def test_what_is_there_is_not_asked_for_again(server, tmp_path):
    server.routes = {"/a": b"a", "/b": b"b"}
    urls = [server.url("/a"), server.url("/b"), server.url("/c")]
    first, _ = download.download(urls[:1], str(tmp_path), settings=LOCAL)
    second, faults = download.download(urls, str(tmp_path), settings=LOCAL)
    assert [server.count(path) for path in ("/a", "/b", "/c")] == [1, 1, 1]
    assert second[urls[0]] == first[urls[0]] and list(second) == urls[:2]
    server.routes["/c"] = b"c"
    third, faults = download.download(urls, str(tmp_path), settings=LOCAL)
    assert list(third) == urls and faults == {} and failures(tmp_path) == ""
    assert [server.count(path) for path in ("/a", "/b", "/c")] == [1, 1, 2]
    server.seen.clear()
    assert download.download(urls, str(tmp_path), settings=LOCAL) == (third, {})
    assert server.seen == []


def test_an_empty_file_is_not_there(server, tmp_path):
    server.routes["/a"] = b"a"
    paths, _ = download.download([server.url("/a")], str(tmp_path), settings=LOCAL)
    path = pathlib.Path(paths[server.url("/a")])
    path.write_bytes(b"")
    download.download([server.url("/a")], str(tmp_path), settings=LOCAL)
    assert path.read_bytes() == b"a"


def test_what_killed_runs_left_is_removed(server, tmp_path):
    server.routes["/a"] = b"a"
    (tmp_path / "partial").mkdir()
    for name, age in (("killed", 2 * 86400), ("running", 60)):
        (tmp_path / "partial" / name).write_bytes(b"half")
        os.utime(tmp_path / "partial" / name, (time.time() - age,) * 2)
    download.download([server.url("/a")], str(tmp_path), settings=LOCAL)
    assert [path for path in files_in(tmp_path) if "partial" in path] == ["partial/running"]


def test_failures_of_other_calls_stay_listed(server, tmp_path):
    a, b, c = (server.url(path) for path in ("/a", "/b", "/c"))
    download.download([a, b], str(tmp_path), settings=LOCAL)
    server.routes["/b"] = b"b"
    download.download([c, b, "http://a b\n\t\x1b[31m"], str(tmp_path), settings=LOCAL)
    assert failures(tmp_path).splitlines() == [
        f"{a}\tstatus 404 Not Found",
        f"{c}\tstatus 404 Not Found",
        "http://a b\\n\\t\\x1b[31m\ta space or a control character in the url",
    ]


def test_failures_are_written_on_the_way(server, tmp_path, monkeypatch):
    seen = []

    def last(handler):
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not seen:
            with contextlib.suppress(OSError):
                seen.extend(failures(tmp_path).splitlines())
            time.sleep(0.01)
        handler.reply(200, b"x")

    monkeypatch.setattr(download, "_REMEMBER", 0.0)
    server.routes["/last"] = last
    download.download([server.url("/gone"), server.url("/last")], str(tmp_path), settings=LOCAL)
    assert seen == [f"{server.url('/gone')}\tstatus 404 Not Found"]


# Redirects.


def redirect(to, status=302):
    return lambda handler: handler.reply(status, Location=to)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_between_named_hosts(server, network, tmp_path, status):
    network.names = {"a.example": [[PUBLIC]], "b.example": [[PUBLIC]]}
    server.routes = {
        "/a": redirect(server.url("/dir/b", "b.example"), status),
        "/dir/b": redirect("ü c", status),
        "/dir/%C3%BC%20c": b"found",
        "/x": b"x",
    }
    server.routes["/dir/b"] = lambda handler: handler.wfile.write(
        b"HTTP/1.1 %d Go\r\nLocation: \xc3\xbc c\r\n\r\n" % status
    )
    urls = [server.url("/a", "a.example"), server.url("/x", "b.example")]
    paths, faults = download.download(urls, str(tmp_path))
    assert faults == {}
    assert pathlib.Path(paths[urls[0]]).read_bytes() == b"found"
    hosts = {path: headers["Host"].partition(":")[0] for path, headers, _ in server.seen}
    assert hosts["/a"] == "a.example" and hosts["/dir/%C3%BC%20c"] == "b.example"


def test_redirect_to_a_host_that_no_url_names(server, network, tmp_path):
    network.names = {"a.example": [[PUBLIC]], "b.example": [[PUBLIC]]}
    server.routes = {"/a": redirect(server.url("/b", "b.example")), "/b": b"b"}
    fault = fault_of(server.url("/a", "a.example"), tmp_path, DownloadSettings())
    assert fault == "redirected to b.example, a host that no url names"
    assert network.asked["b.example"] == 0 and server.count("/b") == 0


def test_redirect_to_a_private_address(server, network, tmp_path):
    """A named host that is private is refused also where a public one leads to it."""
    network.names = {"a.example": [[PUBLIC]], "inside.example": [["10.0.0.7"]]}
    server.routes = {"/a": redirect(server.url("/b", "inside.example")), "/b": b"b"}
    urls = [server.url("/a", "a.example"), server.url("/b", "inside.example")]
    paths, faults = download.download(urls, str(tmp_path))
    assert paths == {}
    assert set(faults.values()) == {"refused: inside.example is at 10.0.0.7, not a public address"}
    assert server.count("/b") == 0


@pytest.mark.parametrize("to,fault", [
    ("file:///etc/passwd", "redirected to 'file:///etc/passwd': neither http nor https, but file"),
    ("ftp://127.0.0.1/x", "redirected to 'ftp://127.0.0.1/x': neither http nor https, but ftp"),
    ("http://me:pw@127.0.0.1/", "redirected to 'http://me:pw@127.0.0.1/': user name or password"),
    ("http://[::1/", "redirected to 'http://[::1/': "),
    ("http://127.0.0.1:99999/", "redirected to 'http://127.0.0.1:99999/': not a url"),
    ("", "redirected to nowhere"),
    (None, "redirected to nowhere"),
])  # fmt: skip
def test_redirects_that_are_not_followed(server, tmp_path, to, fault):
    server.routes["/a"] = redirect(to)
    assert fault_of(server.url("/a"), tmp_path).startswith(fault)
    assert len(server.seen) == 1


def test_redirects_are_counted(server, tmp_path):
    server.routes = {f"/{i}": redirect(f"/{i + 1}") for i in range(6)}
    server.routes |= {"/6": b"x", "/loop": redirect("/loop")}
    assert fault_of(server.url("/loop"), tmp_path) == "more than 5 redirects"
    assert server.count("/loop") == 6
    paths, faults = download.download(
        [server.url("/0"), server.url("/1")], str(tmp_path), settings=LOCAL
    )
    assert list(faults) == [server.url("/0")] and list(paths) == [server.url("/1")]


# Whom it talks to.


@pytest.mark.parametrize("host", [
    "127.0.0.1", "localhost", "localhost.", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433",
    "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "\uff11\uff12\uff17.0.0.1",
])  # fmt: skip
def test_this_machine_is_refused_by_default(server, tmp_path, host):
    server.routes["/x"] = b"secret"
    fault = fault_of(server.url("/x", host), tmp_path, DownloadSettings(timeout=1.0, retries=0))
    assert fault.startswith("refused: ") and fault.endswith(", not a public address")
    assert server.seen == []


@pytest.mark.parametrize("host", [
    "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "192.0.0.192", "168.63.129.16", "198.18.0.1",
    "[fe80::1]", "[fd00:ec2::254]", "[ff02::1]", "[fec0::1]", "[::]", "[::7f00:1]",
    "[2002:7f00:1::]", "[64:ff9b::7f00:1]", "[64:ff9b::a00:1]", "[64:ff9b:1::808:808]",
    "[2001:0:1::1]", "[2001:db8::1]", "[::ffff:10.0.0.1]",
])  # fmt: skip
def test_other_machines_inside_are_refused_by_default(tmp_path, monkeypatch, host):
    def connect(self, address):
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    fault = fault_of(f"http://{host}/x", tmp_path, DownloadSettings())
    assert fault.startswith("refused: ") and fault.endswith(", not a public address")


@pytest.mark.parametrize("address", [
    PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808",
])  # fmt: skip
def test_public_addresses(address):
    assert url_safety.is_public(address)


def test_public_hosts_are_reached(server, network, tmp_path):
    network.names["a.example"] = [[PUBLIC]]
    server.routes["/x"] = b"x"
    url = server.url("/x", "A.Example.")
    paths, faults = download.download([url], str(tmp_path))
    assert faults == {} and pathlib.Path(paths[url]).read_bytes() == b"x"
    assert network.connected == [(PUBLIC, server.server_port)]
    assert server.seen[0][1]["Host"] == f"a.example:{server.server_port}"


def test_names_of_private_addresses_are_refused(server, network, tmp_path):
    network.names["a.example"] = [["192.168.0.1"]]
    fault = fault_of(server.url("/x", "a.example"), tmp_path, DownloadSettings())
    assert fault == "refused: a.example is at 192.168.0.1, not a public address"
    assert network.connected == []


@pytest.mark.parametrize("found", [[PUBLIC, "10.0.0.1"], ["10.0.0.1", PUBLIC]])
def test_one_private_address_is_enough(server, network, tmp_path, found):
    network.names["a.example"] = [found]
    fault = fault_of(server.url("/x", "a.example"), tmp_path, DownloadSettings())
    assert "10.0.0.1" in fault and network.connected == []


def test_a_name_that_changes_its_address(server, network, tmp_path):
    """Public when it is checked, private when it is asked again: it is not asked again."""
    network.names["a.example"] = [[PUBLIC], ["127.0.0.1"]]
    server.routes["/x"] = b"x"
    _, faults = download.download([server.url("/x", "a.example")], str(tmp_path))
    assert faults == {}
    assert network.asked["a.example"] == 1
    assert network.connected == [(PUBLIC, server.server_port)]


def test_every_try_checks_anew(server, network, tmp_path):
    network.names["a.example"] = [[PUBLIC], ["127.0.0.1"]]
    server.routes["/x"] = lambda handler: handler.reply(503)
    fault = fault_of(server.url("/x", "a.example"), tmp_path, DownloadSettings())
    assert fault == "refused: a.example is at 127.0.0.1, not a public address"
    assert network.connected == [(PUBLIC, server.server_port)]


def test_the_next_address_where_one_does_not_answer(server, network, tmp_path, monkeypatch):
    network.names["a.example"] = [["8.8.8.8", PUBLIC]]
    server.routes["/x"] = b"x"
    rerouted = socket.socket.connect

    def connect(self, address):
        if address[0] == "8.8.8.8":
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        return rerouted(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    _, faults = download.download([server.url("/x", "a.example")], str(tmp_path))
    assert faults == {} and server.count("/x") == 1


def test_proxies_of_the_environment_are_not_used(server, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server.routes["/x"] = b"x"
    _, faults = download.download([server.url("/x")], str(tmp_path), settings=LOCAL)
    assert faults == {}


@pytest.mark.parametrize("url,fault", [
    ("http://me:pw@a.example/x", "user name or password in the url"),
    ("http://me@a.example/x", "user name or password in the url"),
    ("ftp://a.example/x", "neither http nor https, but ftp"),
    ("file:///etc/passwd", "neither http nor https, but file"),
    ("images/1.jpg", "neither http nor https, but no scheme"),
    ("", "neither http nor https, but no scheme"),
    ("http:///x", "no host in the url"),
    ("http://", "no host in the url"),
    ("http://a.example/a b", "a space or a control character in the url"),
    (" http://a.example/", "a space or a control character in the url"),
    ("http://a.example/\r\nHost: b", "a space or a control character in the url"),
    ("http://a.example/\x00", "a space or a control character in the url"),
    ("http://a.example/\ud800", "a space or a control character in the url"),
    ("http://a.example\\@b.example/", "user name or password in the url"),
    ("http://a.example\\.b.example/", "not a url: its host is none"),
    ("http://%31%32%37.0.0.1/", "not a url: its host is none"),
    ("http://[fe80::1%25eth0]/", "not a url: its host is none"),
    ("http://a.example:0/", "not a url: its host is none"),
    ("http://a.example:x/", "not a url"),
    ("http://a..example/", "not a url"),
    ("http://[::1/", "not a url"),
    (f"http://{'a.' * 200}example/", "not a url"),
])  # fmt: skip
def test_urls_that_are_refused(tmp_path, monkeypatch, url, fault):
    def getaddrinfo(*names, **unused):
        raise AssertionError(f"asked for {names}")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert fault_of(url, tmp_path) == fault


# Certificates.


@pytest.fixture
def secure(server, network, tmp_path_factory, monkeypatch):
    """The server with a certificate of images.example; `server.names` are those asked for."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    directory = tmp_path_factory.mktemp("certificate")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", "/CN=test", "-addext",
         "subjectAltName=DNS:images.example", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.names = []
    context.sni_callback = lambda _, name, __: server.names.append(name)
    accept = server.get_request

    def get_request():
        connection, address = accept()
        # The handshake is the handler's: here it would hold up the other connections.
        return context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        ), address

    monkeypatch.setattr(server, "get_request", get_request)
    network.names = {"images.example": [[PUBLIC]], "other.example": [[PUBLIC]]}
    server.certificate = str(certificate)
    server.routes["/x"] = b"secret"
    return server


def test_certificates_are_checked_against_the_name(secure, network, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", secure.certificate)
    urls = [secure.url("/x", host, "https") for host in ("images.example", "other.example")]
    paths, faults = download.download(urls, str(tmp_path))
    assert list(paths) == urls[:1]
    assert pathlib.Path(paths[urls[0]]).read_bytes() == b"secret"
    assert "Hostname mismatch" in faults[urls[1]] and "other.example" in faults[urls[1]]
    assert sorted(secure.names) == ["images.example", "other.example"]  # One try each.
    assert len(secure.seen) == 1
    assert secure.seen[0][1]["Host"] == f"images.example:{secure.server_port}"
    assert {address for address, _ in network.connected} == {PUBLIC}


def test_certificates_of_nobody_are_refused(secure, tmp_path):
    fault = fault_of(secure.url("/x", "images.example", "https"), tmp_path, DownloadSettings())
    assert fault.startswith("certificate: self")
    assert secure.seen == []


def test_a_server_without_tls(server, tmp_path):
    server.routes["/x"] = b"x"
    assert fault_of(server.url("/x", scheme="https"), tmp_path).startswith("TLS: ")


def test_the_name_is_what_the_certificate_is_checked_for(server, network, tmp_path, monkeypatch):
    """The same without openssl: the name goes to a context that checks."""
    network.names["a.example"] = [[PUBLIC]]
    asked = []

    def wrap_socket(self, connection, **settings):
        asked.append((self.check_hostname, self.verify_mode, settings))
        return connection

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_socket)
    server.routes["/x"] = b"x"
    _, faults = download.download([server.url("/x", "a.example", "https")], str(tmp_path))
    assert faults == {}
    assert asked == [(True, ssl.CERT_REQUIRED, {"server_hostname": "a.example"})]


# Ends that are no fault of a url.


def test_a_full_disk_is_raised(server, tmp_path, monkeypatch):
    server.routes = {f"/{i}": bytes(50_000) for i in range(20)} | {"/small": b"x"}
    kept, _ = download.download([server.url("/small")], str(tmp_path), settings=LOCAL)

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *unused):
            self.file.close()

        def write(self, block):
            self.file.write(block[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(path, mode="r", **settings):
        file = open(path, mode, **settings)
        return Full(file) if mode == "xb" else file

    monkeypatch.setattr(download, "open", full, raising=False)
    urls = [server.url(path) for path in server.routes]
    with pytest.raises(OSError, match="No space left") as caught:
        download.download(urls, str(tmp_path), settings=LOCAL)
    assert caught.value.errno == errno.ENOSPC
    assert files_in(tmp_path) == [os.path.relpath(path, tmp_path) for path in kept.values()]
    assert failures(tmp_path) == ""  # As it was: the urls are not to blame.
    assert "/small" not in [path for path, _, _ in server.seen[1:]]


def test_a_full_disk_at_the_end_of_a_file_is_raised(server, tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    server.routes["/x"] = b"x"
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="quota"):
        download.download([server.url("/x")], str(tmp_path), settings=LOCAL)
    assert files_in(tmp_path) == []


def test_an_error_stops_the_other_downloads(server, tmp_path, monkeypatch):
    def slow(handler):
        time.sleep(0.02)
        handler.reply(200, b"x")

    def replace(source, target, replace=os.replace):
        if failed:
            return replace(source, target)
        failed.append(target)
        raise OSError(errno.ENOSPC, "No space left on device")

    failed = []
    server.routes = {f"/{i}": slow for i in range(300)}
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        download.download(list(map(server.url, server.routes)), str(tmp_path), settings=LOCAL)
    there = files_in(tmp_path)
    assert len(server.seen) < 100
    time.sleep(0.2)
    assert files_in(tmp_path) == there


def test_an_interrupt_leaves_promptly(server, tmp_path):
    silent = threading.Event()
    server.routes["/x"] = lambda handler: silent.wait(10)
    code = f"""
        import signal
        from vixml_jax.data import download
        # A shell ignores it for what runs in the background, and so would this.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        settings = download.DownloadSettings(allow_private=True, timeout=30.0)
        download.download([{server.url("/x")!r}], {str(tmp_path)!r}, settings=settings)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        assert any(until(lambda: server.seen) for _ in range(10))
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=8)
        assert time.monotonic() - start < 5
        assert errors.rstrip().endswith("KeyboardInterrupt")
    finally:
        silent.set()
        child.kill()
        child.wait()
