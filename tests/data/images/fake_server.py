"""A local HTTP server with answers that tests choose, and helpers to download from it."""

import collections
import contextlib
import http.server
import itertools
import pathlib
import threading
import time

from vixml_jax.data.images import download
from vixml_jax.data.images.download import DownloadSettings

PUBLIC = "93.184.216.34"  # A public address; no test connects to it.
LOCAL = DownloadSettings(allow_private=True, retries=2, timeout=2.0, max_bytes=100_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the route of the path, and records the requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with self.server.lock:
            self.server.seen.append((self.path, self.headers, time.monotonic()))
            self.server.open_now += 1
            self.server.most_open = max(self.server.most_open, self.server.open_now)
        self.close_connection = True
        with contextlib.suppress(OSError):  # Some clients disconnect early.
            route = self.server.routes.get(self.path.partition("?")[0])
            if route is None:
                self.reply(404)
            elif isinstance(route, bytes):
                self.reply(200, route)
            else:
                route(self)
        self.leave()

    def leave(self):
        """Counts the connection as closed, before the client can see the end of the answer."""
        with self.server.lock:
            self.server.open_now -= not self.left
        self.left = True

    left = False

    def reply(self, status, body=b"", **headers):
        """Sends a response; a header of None is left out."""
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
    """A server on this machine.

    Attributes:
      routes: For each path a body, or a function that is called with the handler.
      seen: Path, headers and time of each request.
      open_now, most_open: Open connections, now and at most.
    """

    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.routes, self.seen = threading.Lock(), {}, []
        self.open_now = self.most_open = 0

    def url(self, path, host="127.0.0.1", scheme="http"):
        return f"{scheme}://{host}:{self.server_port}{path}"

    def count(self, path):
        """Number of requests for a path."""
        return sum(seen[0] == path for seen in self.seen)

    def gaps(self, path):
        """Seconds between the requests for a path."""
        times = [seen[2] for seen in self.seen if seen[0] == path]
        return [after - before for before, after in itertools.pairwise(times)]

    def handle_error(self, *unused):
        pass  # Some handshakes fail on purpose.


class Network:
    """A fake network.

    Attributes:
      names: The addresses of each host name: a list for each lookup, the last one for later ones.
      lookups: Number of lookups of each name.
      connected: Addresses that were connected to.
    """

    def __init__(self):
        self.names, self.lookups, self.connected = {}, collections.Counter(), []


def files_in(directory):
    """Relative paths of all files in the directory except the list of failures."""
    paths = [path for path in pathlib.Path(directory).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(directory)) for path in paths if path.suffix != ".tsv")


def fault_of(url, directory, settings=LOCAL, others=()):
    """Downloads a URL that fails, and returns the reason; checks that no file of it is left."""
    paths, faults = download.download([url, *others], str(directory), settings=settings)
    assert url not in paths and url in faults
    assert len(files_in(directory)) == len(paths)
    return faults[url]


def until(condition):
    """Whether a condition becomes true within two seconds."""
    latest = time.monotonic() + 2
    while not condition() and time.monotonic() < latest:
        time.sleep(0.01)
    return condition()


def failures(directory):
    """Contents of `failures.tsv`."""
    return (pathlib.Path(directory) / "failures.tsv").read_text(encoding="utf-8")
