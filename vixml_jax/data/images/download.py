"""Downloads image URLs into a directory, with limits, and from public addresses only.

The URLs come from a data set that somebody else may have made, and the servers may be anybody's.
Host names are therefore resolved here, all addresses of a host are checked, and the connection goes
to an address that was checked. Redirects are followed only to hosts of URLs in the data set.
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

from vixml_jax.data.images import failure_list, url_safety
from vixml_jax.errors import InputError
from vixml_jax.runtime import progress
from vixml_jax.storage import atomic

_BLOCK = 1 << 16  # Bytes read at a time.
_BACK_OFF_S = 1.0  # Wait before the first retry; doubled for each later one.
_LONGEST_WAIT_S = 60.0  # Maximum wait before a retry, also if Retry-After asks for more.
_PATIENCE = 10  # Maximum time for one file, in multiples of the timeout.
_REDIRECTS = 5
_FAILURES_EVERY_S = 60.0  # Interval between updates of `failures.tsv`.
_PARTIAL = "partial"  # Begins the name of the directory of files that are not complete.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """Limits of downloads.

    Attributes:
      connections: Simultaneous connections, over all hosts.
      retries: Retries after a timeout, a failed or interrupted connection, or a status of 408, 429
        or 5xx. Each waits twice as long as the one before, or as long as Retry-After asks for, but
        at most a minute.
      timeout: Seconds to connect, and between two packets from the server. One file may take ten
        times as long, redirects included.
      max_bytes: Maximum size of a file.
      allow_private: Also connect to private, loopback, link-local, reserved and multicast
        addresses.

    Raises:
      InputError: If a value is out of range.
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
                f"{self}: expected connections and max_bytes of at least 1, retries of at least 0, "
                "and a timeout above 0 and at most 3600 s"
            )


def is_url(text: str) -> bool:
    """Whether a text is an http or https URL, rather than a path."""
    return text[:8].lower().startswith(("http://", "https://"))


def download(
    urls: Sequence[str],
    directory: str,
    *,
    others: Sequence[str] = (),
    settings: DownloadSettings = DownloadSettings(),
) -> tuple[dict[str, str], dict[str, str]]:
    """Downloads URLs; returns the path of each file, and the reason of each failure.

    Files that exist already are not downloaded again; URLs that failed in an earlier run are tried
    again. `failures.tsv` in the directory lists URL and reason of all failures, those of other
    calls included, which may run at the same time in other processes. Whether a file is an image is
    not checked.

    Args:
      urls: Any texts; those that are not http or https URLs fail. Redirects are followed only to
        the hosts of these URLs.
      directory: Created if it does not exist. The name of a file is the SHA-256 of its URL, in a
        subdirectory: `ab/ab12...`.
      others: URLs of a data set that several processes download, in order; `urls` may be among
        them. Redirects may lead to their hosts, too, and failures are listed in their order.
      settings: Limits of the downloads.

    Returns:
      Two mappings, URL -> path and URL -> reason. Each URL is in one of them, in the order of
      `urls`.

    Raises:
      InputError: If the directory cannot be written to, or its file system has no locks.
      OSError: If a file cannot be written. Files downloaded before are kept.
    """
    faults: dict[str, str] = {}
    hosts, path_of = set(), {}
    for url in others:
        with contextlib.suppress(ValueError):
            hosts.add(url_safety.parse(url).host)
    for url in dict.fromkeys(urls):
        try:
            hosts.add(url_safety.parse(url).host)
            path_of[url] = _path(directory, url)
        except ValueError as fault:
            faults[url] = failure_list.printable(str(fault))
    pending = [url for url, path in path_of.items() if not _exists(path)]
    failures = failure_list.FailureList(directory, urls, others)
    with (
        atomic.scratch(os.path.join(directory, _PARTIAL)) as partial,
        progress.track("image URLs", len(pending)) as done,
        contextlib.closing(
            _Fetcher(settings, frozenset(hosts), partial).fetch(pending, path_of)
        ) as outcomes,
    ):
        written = time.monotonic()
        for url, fault in outcomes:
            done(1)
            if fault is not None:
                faults[url] = fault
            if time.monotonic() > written + _FAILURES_EVERY_S:
                failures.write(faults, in_order=False)
                written = time.monotonic()
    # Downloads finished in any order; the result is in the order of `urls`.
    faults = {url: faults[url] for url in dict.fromkeys(urls) if url in faults}
    failures.write(faults, in_order=True)
    return {url: path for url, path in path_of.items() if url not in faults}, faults


class _Fault(Exception):
    """A failed download.

    Attributes:
      reason: One line for the user.
      again: Whether to try again.
      wait: Seconds to wait before the next try, as the server asked for.
    """

    def __init__(self, reason: str, *, again: bool = False, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.again, self.wait = failure_list.printable(reason), again, wait


class _Fetcher:
    """Downloads URLs in several threads."""

    def __init__(self, settings: DownloadSettings, hosts: frozenset[str], partial: str):
        self._settings, self._hosts, self._partial = settings, hosts, partial
        self._stop = threading.Event()

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def fetch(
        self, urls: Sequence[str], path_of: dict[str, str]
    ) -> Iterator[tuple[str, str | None]]:
        """Yields each URL when it is done, with the reason if it failed, else None.

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
                except BaseException as error:  # Raised again in the thread of the caller.
                    done.put((url, error))
                    return

        # Daemon threads, since one that waits for a server must not keep a program alive.
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
        """Downloads a URL, with retries; returns the reason if it failed, else None."""
        tries, wait = 0, _BACK_OFF_S
        while True:
            try:
                self._try(url, path)
                return None
            except _Fault as fault:
                if tries == self._settings.retries or not fault.again:
                    return fault.reason
                seconds, reason = min(max(wait, fault.wait), _LONGEST_WAIT_S), fault.reason
            if self._stop.wait(seconds):
                return reason
            tries, wait = tries + 1, min(2 * wait, _LONGEST_WAIT_S)

    def _try(self, url: str, path: str) -> None:
        deadline = time.monotonic() + _PATIENCE * self._settings.timeout
        for _ in range(_REDIRECTS + 1):
            with self._request(url_safety.parse(url), deadline) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    self._check(response)
                    self._write(path, self._blocks(response, deadline))
                    return
                url = self._redirected(url, response.getheader("Location", ""))
        raise _Fault(f"more than {_REDIRECTS} redirects")

    @contextlib.contextmanager
    def _request(
        self, target: url_safety.Target, deadline: float
    ) -> Iterator[http.client.HTTPResponse]:
        """Yields the response of the server, its headers read; closes the connection afterwards."""
        with contextlib.ExitStack() as stack:
            with self._network(deadline):
                connection = stack.enter_context(self._connect(target, deadline))
                connection.sendall(target.request)
                reader = _Reader(
                    connection,
                    timeout=self._settings.timeout,
                    deadline=deadline,
                    # Headers and the framing of chunks add to the size of the file.
                    max_bytes=2 * self._settings.max_bytes + (1 << 20),
                )
                response = http.client.HTTPResponse(reader, method="GET")
                stack.callback(response.close)
                response.begin()
            yield response

    def _connect(self, target: url_safety.Target, deadline: float) -> socket.socket:
        """Connects to one of the addresses of the host, if all of them are allowed."""
        addresses = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        for *_, address in addresses:
            if not self._settings.allow_private and not url_safety.is_public(address[0]):
                raise _Fault(
                    f"refused: {target.host} has the address {address[0]}, which is not public"
                )
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, address in addresses:
            connection = socket.socket(family, kind, protocol)
            try:
                seconds = min(self._settings.timeout, deadline - time.monotonic())
                if seconds <= 0:
                    raise TimeoutError
                connection.settimeout(seconds)
                connection.connect(address)  # An IP address: no name is resolved a second time.
                if not target.secure:
                    return connection
                return self._context.wrap_socket(connection, server_hostname=target.host)
            except OSError as error:
                connection.close()
                failure = error
        raise failure

    @contextlib.contextmanager
    def _network(self, deadline: float) -> Iterator[None]:
        """Turns errors in the communication with a server into a `_Fault`.

        Files are written outside of it, since a full disk must stop the program.
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
            raise _Fault(f"TLS: {error.reason or 'connection closed'}") from None
        except socket.gaierror as error:
            again = error.errno == socket.EAI_AGAIN
            raise _Fault(f"host not found: {error.strerror}", again=again) from None
        except OSError as error:
            raise _Fault(f"connection: {error.strerror or error}", again=True) from None
        except http.client.IncompleteRead:
            raise _Fault("connection closed within a chunk", again=True) from None
        except (http.client.HTTPException, ValueError) as error:
            raise _Fault(f"not a valid HTTP response ({type(error).__name__})") from None

    def _redirected(self, url: str, location: str) -> str:
        """The URL that a redirect leads to.

        Raises:
          _Fault: If the redirect must not be followed.
        """
        # http.client decodes headers as latin-1, whatever their encoding is.
        location = urllib.parse.quote(location, safe=string.punctuation, encoding="latin-1")
        try:
            url = urllib.parse.urljoin(url, location)
            target = url_safety.parse(url)
        except ValueError as fault:
            raise _Fault(f"redirected to {location[:100]!r}: {fault}") from None
        if not location:
            raise _Fault("redirected without a location")
        if target.host not in self._hosts:
            raise _Fault(f"redirected to {target.host}, a host of none of the URLs")
        return url

    def _check(self, response: http.client.HTTPResponse) -> None:
        """Refuses a response that has no file, or too large a one, according to its headers."""
        status = response.status
        if status != 200:
            raise _Fault(
                f"status {status} {http.client.responses.get(status, '')}".rstrip(),
                again=status in (408, 429) or status >= 500,
                wait=_seconds(response.getheader("Retry-After", "")),
            )
        kind = response.getheader("Content-Type", "").partition(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml"):
            raise _Fault(f"found {kind} instead of an image, such as a login or an error page")
        coding = response.getheader("Content-Encoding", "").strip().lower()
        if coding in ("gzip", "x-gzip", "deflate", "br", "zstd", "compress"):
            raise _Fault(f"compressed ({coding}), although the request excludes compression")
        if response.length is not None and response.length > self._settings.max_bytes:
            raise self._too_large(f" ({response.length:,})")

    def _too_large(self, size: str = "") -> _Fault:
        return _Fault(f"larger than {self._settings.max_bytes:,} bytes{size}")

    def _blocks(self, response: http.client.HTTPResponse, deadline: float) -> Iterator[bytes]:
        """Yields the file that the server sends; raises a `_Fault` if it is incomplete."""
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
            raise _Fault(f"connection closed after {count:,} of {expected:,} bytes", again=True)
        if not count:
            raise _Fault("empty file")

    def _write(self, path: str, blocks: Iterable[bytes]) -> None:
        """Writes a file atomically: beside the others of this run, until it is complete."""
        temporary = os.path.join(self._partial, uuid.uuid4().hex)
        try:
            with open(temporary, "xb") as file:
                for block in blocks:
                    file.write(block)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


class _Reader(io.RawIOBase):
    """A connection for http.client to read from, with a deadline and a limit of bytes.

    The timeout of a socket alone is not enough: it starts again with every byte.
    """

    def __init__(
        self, connection: socket.socket, *, timeout: float, deadline: float, max_bytes: int
    ):
        self._connection, self._timeout = connection, timeout
        self._deadline, self._left = deadline, max_bytes

    def makefile(self, mode: str) -> BinaryIO:
        """Called by http.client to read the response."""
        return io.BufferedReader(self, _BLOCK)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Reads what has arrived; 0 at the end."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._connection.settimeout(min(self._timeout, seconds))
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise _Fault("the response is too long")
        return count


def _path(directory: str, url: str) -> str:
    """Path of the file of a URL."""
    name = hashlib.sha256(url.encode()).hexdigest()
    return os.path.join(directory, name[:2], name)


def _exists(path: str) -> bool:
    """Whether a file exists and is not empty; a crash of the machine may leave empty files."""
    try:
        return os.path.getsize(path) > 0
    except OSError:
        return False


def _seconds(retry_after: str) -> float:
    """The wait that a Retry-After header asks for, in seconds or as a date; 0 if it is invalid."""
    try:
        if retry_after.strip().isdecimal():
            return float(retry_after)
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0
