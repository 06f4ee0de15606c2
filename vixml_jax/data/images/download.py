"""Image urls, downloaded once into a directory: within bounds, and from public addresses only.

The urls come from a data set that somebody else may have made, and the servers may be anybody's.
So a name is resolved here, every address that it has is checked, and the connection goes to an
address that was checked; redirects lead only to hosts that the urls name.
"""

import contextlib
import dataclasses
import email.utils
import functools
import hashlib
import http.client
import io
import os
import queue
import socket
import ssl
import string
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from vixml_jax.data import progress
from vixml_jax.data.images import url_safety
from vixml_jax.errors import InputError

_BLOCK = 1 << 16  # Bytes read at a time.
_BACK_OFF = 1.0  # Seconds before the second try; doubled for each one after.
_LONGEST_WAIT = 60.0  # Seconds before a try at most, whatever Retry-After says.
_PATIENCE = 10  # Time-outs that one file may take in all.
_REDIRECTS = 5
_REMEMBER = 60.0  # Seconds after which failures are written anew.
_OLD = 24 * 3600.0  # Seconds after which no run can be writing to a partial file any more.
_PARTIAL = "partial"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """How downloads are bounded.

    Attributes:
      connections: At a time, over all hosts.
      retries: After the first try: of time-outs, connections that fail or break off, and the
        statuses 408, 429 and 5xx. Each waits twice as long as the one before, or as long as
        Retry-After says, a minute at most.
      timeout: Seconds to connect, and for the server to send anything at all. One file, redirects
        included, may take ten times as long.
      max_bytes: Of one file.
      allow_private: Also connect to private, loopback, link-local, reserved and multicast
        addresses.

    Raises:
      InputError: If one is out of its range.
    """

    connections: int = 16
    retries: int = 3
    timeout: float = 20.0
    max_bytes: int = 20 << 20
    allow_private: bool = False

    def __post_init__(self):
        least = min(self.connections, self.max_bytes, self.retries + 1)
        if least < 1 or not 0 < self.timeout <= 3600:
            raise InputError(
                f"{self}: expected connections and max_bytes of at least 1, retries of at least 0 "
                "and a timeout above 0, an hour at most"
            )


def is_url(text: str) -> bool:
    """Whether a text is an http or https url, rather than a path."""
    return text[:8].lower().startswith(("http://", "https://"))


def download(
    urls: Sequence[str], directory: str, *, settings: DownloadSettings = DownloadSettings()
) -> tuple[dict[str, str], dict[str, str]]:
    """Two mappings: url -> path of its file, and url -> what is wrong with it.

    Each url is in one of them, in the order of `urls`. Files that are there already are not
    downloaded again; what failed in an earlier run is tried again. `failures.tsv` in the directory
    lists url and reason of all that failed, other calls' urls included. Whether a file is a
    picture is not looked at.

    Args:
      urls: Any texts: what is no url of http or https is a fault. Redirects may lead to their hosts
        only.
      directory: Is made if it is not there. The file of a url is named by the SHA-256 of the url:
        `ab/ab12...`.
      settings: Bounds.

    Raises:
      OSError: If the files cannot be written. What was downloaded before is kept.
    """
    faults: dict[str, str] = {}
    hosts = set()
    path_of = {}
    for url in dict.fromkeys(urls):
        try:
            hosts.add(url_safety.parse(url).host)
            path_of[url] = _path(directory, url)
        except ValueError as fault:
            faults[url] = _printable(str(fault))
    partial = os.path.join(directory, _PARTIAL)
    os.makedirs(partial, exist_ok=True)
    _clean(partial)
    pending = [url for url, path in path_of.items() if not _is_there(path)]
    failures = _Failures(directory, urls)
    fetcher = _Fetcher(settings, frozenset(hosts), partial)
    with (
        progress.watch("image urls", len(pending)) as done,
        contextlib.closing(fetcher.fetch(pending, path_of)) as outcomes,
    ):
        written = time.monotonic()
        for url, fault in outcomes:
            done(1)
            if fault is not None:
                faults[url] = fault
            if time.monotonic() > written + _REMEMBER:
                failures.write(faults)
                written = time.monotonic()
    # Urls came back as the servers answered; what is returned is in the order of the data.
    faults = {url: faults[url] for url in dict.fromkeys(urls) if url in faults}
    failures.write(faults)
    return {url: path for url, path in path_of.items() if url not in faults}, faults


class _Fault(Exception):
    """What is wrong with a url.

    Attributes:
      reason: For the user, in one line.
      again: Whether another try may mend it.
      wait: Seconds before it, as the server wants it.
    """

    def __init__(self, reason: str, *, again: bool = False, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.again, self.wait = _printable(reason), again, wait


class _Fetcher:
    """Threads that download urls, each one at a time."""

    def __init__(self, settings: DownloadSettings, hosts: frozenset[str], partial: str):
        self._settings, self._hosts, self._partial = settings, hosts, partial
        self._stop = threading.Event()

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def fetch(
        self, urls: Sequence[str], path_of: dict[str, str]
    ) -> Iterator[tuple[str, str | None]]:
        """Yields each url as it is done, with what is wrong with it, if anything.

        Raises:
          OSError: If a file cannot be written.
        """
        todo, lock = iter(urls), threading.Lock()
        done: queue.SimpleQueue[tuple[str, str | BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            while not self._stop.is_set():
                with lock:
                    url = next(todo, None)
                if url is None:
                    return
                try:
                    done.put((url, self._fetch_one(url, path_of[url])))
                except BaseException as error:  # To be raised where it is seen.
                    done.put((url, error))
                    return

        # Daemons: a thread that waits for a server does not keep an interrupted program alive.
        count = min(self._settings.connections, len(urls))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for _ in urls:
                url, outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield url, outcome
        finally:
            self._stop.set()
            latest = time.monotonic() + 1.0
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, latest - time.monotonic()))

    def _fetch_one(self, url: str, path: str) -> str | None:
        """Downloads a url, in several tries where need be; what is wrong, None if nothing is."""
        tries, wait = 0, _BACK_OFF
        while True:
            try:
                self._try(url, path)
                return None
            except _Fault as fault:
                if tries == self._settings.retries or not fault.again:
                    return fault.reason
                seconds, reason = min(max(wait, fault.wait), _LONGEST_WAIT), fault.reason
            if self._stop.wait(seconds):
                return reason
            tries, wait = tries + 1, min(2 * wait, _LONGEST_WAIT)

    def _try(self, url: str, path: str) -> None:
        deadline = time.monotonic() + _PATIENCE * self._settings.timeout
        for _ in range(_REDIRECTS + 1):
            with self._ask(url_safety.parse(url), deadline) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    self._check(response)
                    self._write(path, self._blocks(response, deadline))
                    return
                url = self._redirected(url, response.getheader("Location", ""))
        raise _Fault(f"more than {_REDIRECTS} redirects")

    @contextlib.contextmanager
    def _ask(
        self, target: url_safety.Target, deadline: float
    ) -> Iterator[http.client.HTTPResponse]:
        """Yields what the server answers, its head read; the connection is closed afterwards."""
        with contextlib.ExitStack() as stack:
            with self._network(deadline):
                connection = stack.enter_context(self._connect(target, deadline))
                connection.sendall(target.request)
                reader = _Reader(
                    connection,
                    timeout=self._settings.timeout,
                    deadline=deadline,
                    # Heads and the frames of chunks come on top of the file.
                    max_bytes=2 * self._settings.max_bytes + (1 << 20),
                )
                response = http.client.HTTPResponse(reader, method="GET")
                stack.callback(response.close)
                response.begin()
            yield response

    def _connect(self, target: url_safety.Target, deadline: float) -> socket.socket:
        """A connection to one of the addresses of the host, if all of them are allowed."""
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        for *_, address in found:
            if not self._settings.allow_private and not url_safety.is_public(address[0]):
                raise _Fault(f"refused: {target.host} is at {address[0]}, not a public address")
        failed: OSError = OSError("no address")
        for family, kind, protocol, _, address in found:
            connection = socket.socket(family, kind, protocol)
            try:
                seconds = min(self._settings.timeout, deadline - time.monotonic())
                if seconds <= 0:
                    raise TimeoutError
                connection.settimeout(seconds)
                connection.connect(address)  # Numbers: nothing is resolved a second time.
                if not target.secure:
                    return connection
                return self._context.wrap_socket(connection, server_hostname=target.host)
            except OSError as error:
                connection.close()
                failed = error
        raise failed

    @contextlib.contextmanager
    def _network(self, deadline: float) -> Iterator[None]:
        """Turns what goes wrong in talking to a server into a `_Fault`.

        Files are written outside of it: a full disk is no fault of the url.
        """
        try:
            yield
        except TimeoutError:
            seconds = self._settings.timeout
            if time.monotonic() >= deadline:
                raise _Fault(f"took longer than {_PATIENCE * seconds:g} s") from None
            raise _Fault(f"timed out after {seconds:g} s", again=True) from None
        except ssl.SSLCertVerificationError as error:
            raise _Fault(f"certificate: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise _Fault(f"TLS: {error.reason or 'broke off'}") from None
        except socket.gaierror as error:
            again = error.errno == socket.EAI_AGAIN
            raise _Fault(f"host not found: {error.strerror}", again=again) from None
        except OSError as error:
            raise _Fault(f"connection: {error.strerror or error}", again=True) from None
        except http.client.IncompleteRead:
            raise _Fault("broke off within a chunk", again=True) from None
        except (http.client.HTTPException, ValueError) as error:
            raise _Fault(f"not an answer in HTTP ({type(error).__name__})") from None

    def _redirected(self, url: str, location: str) -> str:
        """Where a redirect leads.

        Raises:
          _Fault: If it must not be followed.
        """
        # The head was read as latin-1, whatever its bytes are meant to be.
        location = urllib.parse.quote(location, safe=string.punctuation, encoding="latin-1")
        try:
            url = urllib.parse.urljoin(url, location)
            target = url_safety.parse(url)
        except ValueError as fault:
            raise _Fault(f"redirected to {location[:100]!r}: {fault}") from None
        if not location:
            raise _Fault("redirected to nowhere")
        if target.host not in self._hosts:
            raise _Fault(f"redirected to {target.host}, a host that no url names")
        return url

    def _check(self, response: http.client.HTTPResponse) -> None:
        """Refuses, by its head, what is no file or too large a one."""
        status = response.status
        if status != 200:
            raise _Fault(
                f"status {status} {http.client.responses.get(status, '')}".rstrip(),
                again=status in (408, 429) or status >= 500,
                wait=_seconds(response.getheader("Retry-After", "")),
            )
        kind = response.getheader("Content-Type", "").partition(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml"):
            raise _Fault(f"{kind}, not a picture: a page that asks to log in, or says an error?")
        coding = response.getheader("Content-Encoding", "").strip().lower()
        if coding in ("gzip", "x-gzip", "deflate", "br", "zstd", "compress"):
            raise _Fault(f"sent packed ({coding}), though it was asked for as it is")
        if response.length is not None and response.length > self._settings.max_bytes:
            raise self._too_large(f": {response.length:,}")

    def _too_large(self, size: str = "") -> _Fault:
        return _Fault(f"larger than {self._settings.max_bytes:,} bytes{size}")

    def _blocks(self, response: http.client.HTTPResponse, deadline: float) -> Iterator[bytes]:
        """Yields the file that the server sends, whole or with a `_Fault`."""
        expected, count = response.length, 0
        while True:
            with self._network(deadline):
                block = response.read(_BLOCK)
            if self._stop.is_set():
                raise _Fault("stopped")
            if not block:
                break
            count += len(block)
            if count > self._settings.max_bytes:
                raise self._too_large()
            yield block
        if expected is not None and count < expected:
            raise _Fault(f"broke off after {count:,} of {expected:,} bytes", again=True)
        if not count:
            raise _Fault("empty")

    def _write(self, path: str, blocks: Iterable[bytes]) -> None:
        """Writes a file, to appear under its name when it is whole."""
        with _replacing(path, self._partial) as file:
            for block in blocks:
                file.write(block)


class _Reader(io.RawIOBase):
    """A connection as http.client reads it, within the time and the bytes that are left.

    A time-out of the socket alone would be none: it starts anew with every byte.
    """

    def __init__(
        self, connection: socket.socket, *, timeout: float, deadline: float, max_bytes: int
    ):
        self._connection, self._timeout = connection, timeout
        self._deadline, self._left = deadline, max_bytes

    def makefile(self, mode: str) -> BinaryIO:
        return io.BufferedReader(self, _BLOCK)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._connection.settimeout(min(self._timeout, seconds))
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise _Fault("sends without end")
        return count


class _Failures:
    """`failures.tsv`: url and reason of what failed, here and in calls with other urls."""

    def __init__(self, directory: str, urls: Iterable[str]):
        self._path = os.path.join(directory, "failures.tsv")
        self._partial = os.path.join(directory, _PARTIAL)
        self._others = []
        if os.path.exists(self._path):
            ours = {_printable(url) for url in urls}
            with open(self._path, encoding="utf-8", errors="replace", newline="\n") as file:
                self._others = [line for line in file if line.partition("\t")[0] not in ours]

    def write(self, faults: dict[str, str]) -> None:
        with _replacing(self._path, self._partial) as file:
            for line in self._others:
                file.write(line.encode())
            for url, reason in faults.items():
                file.write(f"{_printable(url)}\t{reason}\n".encode())


@contextlib.contextmanager
def _replacing(path: str, partial: str) -> Iterator[BinaryIO]:
    """Yields a file in `partial` that becomes `path` at the end; nothing is left on an error.

    Its name is its own, so that two runs into one directory do not write into each other's files.
    """
    temporary = os.path.join(partial, uuid.uuid4().hex)
    try:
        with open(temporary, "xb") as file:
            yield file
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _clean(partial: str) -> None:
    """Removes what killed runs left."""
    with os.scandir(partial) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # Another run may be cleaning, too.
                if entry.stat().st_mtime < time.time() - _OLD:
                    os.remove(entry.path)


def _path(directory: str, url: str) -> str:
    name = hashlib.sha256(url.encode()).hexdigest()
    return os.path.join(directory, name[:2], name)


def _is_there(path: str) -> bool:
    try:
        return os.path.getsize(path) > 0  # A machine that went down may leave empty files.
    except OSError:
        return False


def _seconds(retry_after: str) -> float:
    """What Retry-After says, as seconds or as a date; 0 if nothing that can be read."""
    try:
        if retry_after.strip().isdecimal():
            return float(retry_after)
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _printable(text: str) -> str:
    """A text in one line and one cell of a table, unable to steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
