"""Downloads from a local server: files, retries, limits, repeated calls and disk errors."""

import contextlib
import email.utils
import errno
import hashlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent import futures

import pytest

from tests.data.images.fake_server import LOCAL, failures, fault_of, files_in, until
from vixml_jax.data.images import download
from vixml_jax.data.images.download import DownloadSettings
from vixml_jax.errors import InputError
from vixml_jax.storage import atomic

ROOT = pathlib.Path(__file__).parents[3]

# Results.


def test_files_have_the_contents_sent_by_the_server(server, tmp_path):
    bodies = {f"/{i}?size=é": os.urandom(1 + 997 * i) for i in range(40)}
    server.routes = {f"/{i}": body for i, body in enumerate(bodies.values())}
    urls = [server.url(path) for path in bodies]
    paths, faults = download.download(urls * 2, str(tmp_path), settings=LOCAL)
    assert faults == {} and list(paths) == urls
    for url, body in zip(urls, bodies.values(), strict=True):
        name = hashlib.sha256(url.encode()).hexdigest()
        assert paths[url] == str(tmp_path / name[:2] / name)
        assert pathlib.Path(paths[url]).read_bytes() == body
    assert len(server.seen) == 40  # Each once, although listed twice.
    assert len(files_in(tmp_path)) == 40
    path, headers, _ = server.seen[0]
    assert path.endswith("?size=%C3%A9")
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert failures(tmp_path) == ""


def test_results_are_in_the_order_of_the_urls(server, tmp_path):
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
        "expected http or https, found ftp",
        "status 410 Gone",
        "status 404 Not Found",
    ]


def test_number_of_connections_is_limited(server, tmp_path):
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
    assert most == 3  # Download threads.
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


# Retries.


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_transient_statuses_are_retried(server, tmp_path, status):
    def twice(handler):
        handler.reply(status) if server.count("/x") < 3 else handler.reply(200, b"content")

    server.routes["/x"] = twice
    url = server.url("/x")
    paths, faults = download.download([url], str(tmp_path), settings=LOCAL)
    assert faults == {} and pathlib.Path(paths[url]).read_bytes() == b"content"
    assert server.count("/x") == 3


@pytest.mark.parametrize("retries", [0, 3])
def test_number_of_retries_is_limited(server, tmp_path, retries):
    server.routes["/x"] = lambda handler: handler.reply(503)
    settings = DownloadSettings(allow_private=True, retries=retries)
    fault = fault_of(server.url("/x"), tmp_path, settings)
    assert fault == "status 503 Service Unavailable"
    assert server.count("/x") == retries + 1


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 404, 410])
def test_other_statuses_are_not_retried(server, tmp_path, status):
    server.routes["/x"] = lambda handler: handler.reply(status)
    assert fault_of(server.url("/x"), tmp_path).startswith(f"status {status} ")
    assert server.count("/x") == 1


def test_wait_doubles_with_each_retry(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_BACK_OFF_S", 0.1)
    server.routes["/x"] = lambda handler: handler.reply(503)
    fault_of(server.url("/x"), tmp_path, DownloadSettings(allow_private=True, retries=3))
    assert all(a >= b for a, b in zip(server.gaps("/x"), [0.1, 0.2, 0.4], strict=True))


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(server, tmp_path, form):
    def busy(handler):
        if server.count("/x") > 1:
            return handler.reply(200, b"x")
        # A date has only whole seconds, so up to one second is lost.
        value = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
        handler.reply(429, Retry_After=value)

    server.routes["/x"] = busy
    _, faults = download.download([server.url("/x")], str(tmp_path), settings=LOCAL)
    assert faults == {}
    assert 0.95 < server.gaps("/x")[0] < 5


@pytest.mark.parametrize(
    "value", ["86400", "Fri, 31 Dec 9999 23:59:59 GMT", "-5", "soon", "9" * 5000]
)
def test_retry_after_is_limited(server, tmp_path, monkeypatch, value):
    monkeypatch.setattr(download, "_LONGEST_WAIT_S", 0.1)
    server.routes["/x"] = lambda handler: handler.reply(503, Retry_After=value)
    fault_of(server.url("/x"), tmp_path)
    assert server.count("/x") == 3
    assert max(server.gaps("/x")) < 3


def test_timeouts_are_retried(server, tmp_path):
    def silent_once(handler):
        if server.count("/x") == 1:
            time.sleep(1)
        handler.reply(200, b"x")

    server.routes["/x"] = silent_once
    settings = DownloadSettings(allow_private=True, timeout=0.4)
    _, faults = download.download([server.url("/x")], str(tmp_path), settings=settings)
    assert faults == {} and server.count("/x") == 2


def test_silent_server_times_out(server, tmp_path):
    server.routes["/x"] = lambda handler: time.sleep(1)
    settings = DownloadSettings(allow_private=True, timeout=0.3, retries=1)
    assert fault_of(server.url("/x"), tmp_path, settings) == "timed out after 0.3 s"
    assert until(lambda: server.count("/x") == 2)


def test_refused_connection(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # But does not listen.
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x"
        assert fault_of(url, tmp_path) == "connection: Connection refused"


@pytest.mark.parametrize("code,tries", [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 3)])
def test_unknown_host_names(tmp_path, monkeypatch, code, tries):
    calls = []

    def getaddrinfo(*names, **unused):
        calls.append(names[0])
        raise socket.gaierror(code, "reason")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert fault_of("http://nowhere.example/x", tmp_path) == "host not found: reason"
    assert calls == ["nowhere.example"] * tries


# Limits of one file.


def test_too_large_according_to_its_headers(server, tmp_path):
    done = threading.Event()

    def large(handler):
        handler.reply(200, Content_Length="100001")
        done.wait(5)  # The client must not wait for the file.

    server.routes["/x"] = large
    start = time.monotonic()
    assert fault_of(server.url("/x"), tmp_path) == "larger than 100,000 bytes (100,001)"
    assert time.monotonic() - start < 1.5  # Less than the timeout.
    assert server.count("/x") == 1
    done.set()


def test_file_of_the_maximum_size(server, tmp_path):
    server.routes["/x"] = bytes(100_000)
    paths, _ = download.download([server.url("/x")], str(tmp_path), settings=LOCAL)
    assert os.path.getsize(paths[server.url("/x")]) == 100_000


def endless(handler, first, part):
    """Sends until the client disconnects; `server.sent` is the number of bytes sent."""
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
    (CHUNKED + b"-1\r\n", bytes(10_000), "the response is too long"),  # http.client reads on.
    (CHUNKED + b"1\r\nx\r\n0\r\n", b"more: headers\r\n" * 1000, "the response is too long"),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, None),
], ids=["no length", "chunks", "small chunks", "negative chunk", "trailers", "100s"])  # fmt: skip
def test_endless_responses_are_stopped(server, tmp_path, first, part, fault):
    server.routes["/x"] = lambda handler: endless(handler, first, part)
    reason = fault_of(server.url("/x"), tmp_path)
    assert reason == fault or (fault is None and reason)
    assert until(lambda: not server.open_now)
    assert server.sent < 30 << 20  # Including buffers of the system.


@pytest.mark.parametrize("where", ["head", "body"])
def test_slow_responses_are_stopped(server, tmp_path, monkeypatch, where):
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
    assert server.count("/x") == 1  # A retry would take as long.


@pytest.mark.parametrize("answer,fault", [
    (HEAD + b"Content-Length: 10\r\n\r\nhalf", "connection closed after 4 of 10 bytes"),
    (CHUNKED + b"a\r\nhalf", "connection closed within a chunk"),
    (CHUNKED + b"4\r\nhalf\r\n", "connection closed within a chunk"),
], ids=["length", "in a chunk", "after a chunk"])  # fmt: skip
def test_truncated_files_fail(server, tmp_path, answer, fault):
    server.routes["/x"] = lambda handler: handler.wfile.write(answer)
    assert fault_of(server.url("/x"), tmp_path) == fault
    assert server.count("/x") == 3


@pytest.mark.parametrize("answer,fault", [
    (HEAD + b"Content-Length: 0\r\n\r\n", "empty file"),
    (CHUNKED + b"0\r\n\r\n", "empty file"),
    (HEAD + b"Content-Type: Text/HTML; charset=utf-8\r\n\r\nlog in", "found text/html instead of"),
    (HEAD + b"Content-Encoding: gzip\r\n\r\nx", "compressed (gzip), although the request"),
    (b"\x00\x01 no http\r\n\r\n", "not a valid HTTP response"),
    (b"HTTP/1.1 abc\r\n\r\n", "not a valid HTTP response"),
    (HEAD + b"X: " + b"x" * 70_000 + b"\r\n\r\n", "not a valid HTTP response"),
    (HEAD + b"X: x\r\n" * 200 + b"\r\n", "not a valid HTTP response"),
])  # fmt: skip
def test_responses_without_a_file(server, tmp_path, answer, fault):
    server.routes["/x"] = lambda handler: handler.wfile.write(answer)
    assert fault_of(server.url("/x"), tmp_path).startswith(fault)
    assert server.count("/x") == 1


# Repeated calls.


def test_existing_files_are_not_requested_again(server, tmp_path):
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


def test_empty_file_is_downloaded_again(server, tmp_path):
    server.routes["/a"] = b"a"
    paths, _ = download.download([server.url("/a")], str(tmp_path), settings=LOCAL)
    path = pathlib.Path(paths[server.url("/a")])
    path.write_bytes(b"")
    download.download([server.url("/a")], str(tmp_path), settings=LOCAL)
    assert path.read_bytes() == b"a"


def test_files_of_killed_runs_are_removed(server, tmp_path):
    server.routes["/a"] = b"a"
    (tmp_path / "partial.tmp-0123").mkdir()
    (tmp_path / "partial.tmp-0123" / "killed").write_bytes(b"half")
    with atomic.scratch(tmp_path / "partial") as running:  # Of another run.
        (pathlib.Path(running) / "file").write_bytes(b"half")
        download.download([server.url("/a")], str(tmp_path), settings=LOCAL)
        left = [path for path in files_in(tmp_path) if "partial" in path]
        assert left == [f"{os.path.basename(running)}/file"]
    assert not [path for path in files_in(tmp_path) if "partial" in path]


def test_failures_of_other_calls_are_kept(server, tmp_path):
    a, b, c = (server.url(path) for path in ("/a", "/b", "/c"))
    download.download([a, b], str(tmp_path), settings=LOCAL)
    server.routes["/b"] = b"b"
    download.download([c, b, "http://a b\n\t\x1b[31m"], str(tmp_path), settings=LOCAL)
    assert failures(tmp_path).splitlines() == [
        f"{a}\tstatus 404 Not Found",
        f"{c}\tstatus 404 Not Found",
        "http://a b\\n\\t\\x1b[31m\tthe URL contains a space or a control character",
    ]


def test_failures_are_written_during_the_download(server, tmp_path, monkeypatch):
    seen = []

    def last(handler):
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not seen:
            with contextlib.suppress(OSError):
                seen.extend(failures(tmp_path).splitlines())
            time.sleep(0.01)
        handler.reply(200, b"x")

    monkeypatch.setattr(download, "_FAILURES_EVERY_S", 0.0)
    server.routes["/last"] = last
    download.download([server.url("/gone"), server.url("/last")], str(tmp_path), settings=LOCAL)
    assert seen == [f"{server.url('/gone')}\tstatus 404 Not Found"]


def test_failures_of_calls_at_the_same_time_are_all_listed_in_order(server, tmp_path):
    began = threading.Barrier(3)

    def gone(handler):
        began.wait(5)
        handler.reply(410)

    server.routes = {f"/last{i}": gone for i in range(3)}
    urls = [server.url(f"/{i}") for i in range(9)] + [server.url(f"/last{i}") for i in range(3)]
    (tmp_path / "failures.tsv").write_text(f"http://old/\tbefore\n{urls[4]}\tbefore\n")
    server.routes["/3"] = b"x"

    def share(index):  # Ends only after all have begun.
        download.download(urls[index::3], str(tmp_path), others=urls, settings=LOCAL)

    with futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(share, range(3)))
    expected = [f"{url}\tstatus 404 Not Found" for url in urls[:9] if url != urls[3]]
    expected += [f"{url}\tstatus 410 Gone" for url in urls[9:]]
    assert failures(tmp_path).splitlines() == ["http://old/\tbefore", *expected]


# Errors that stop the program.


def test_full_disk_raises(server, tmp_path, monkeypatch):
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
    assert failures(tmp_path) == ""  # Unchanged: it is no failure of a URL.
    assert "/small" not in [path for path, _, _ in server.seen[1:]]


def test_full_disk_at_the_end_of_a_file_raises(server, tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    server.routes["/x"] = b"x"
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="quota"):
        download.download([server.url("/x")], str(tmp_path), settings=LOCAL)
    assert files_in(tmp_path) == []


def test_error_stops_the_other_downloads(server, tmp_path, monkeypatch):
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
    files = files_in(tmp_path)
    assert len(server.seen) < 100
    time.sleep(0.2)
    assert files_in(tmp_path) == files


def test_interrupt_ends_the_program_promptly(server, tmp_path):
    silent = threading.Event()
    server.routes["/x"] = lambda handler: silent.wait(10)
    code = f"""
        import signal
        from vixml_jax.data.images import download
        # A process in the background of a shell ignores the signal by default.
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
