"""Signals that stop a command: noticed in a thread at once, in the main thread when it runs Python.

A Python signal handler runs between two bytecodes of the main thread, so a long compilation delays
it. The thread here reads the signals from a socket that the interpreter's C handler writes to.

A command imports this module before all others, so it imports little itself.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from vixml_jax import errors

# SIGHUP comes when the terminal is closed. SIGTERM is the last one: once it is handled, all are.
NUMBERS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
GRACE_S = 5.0  # Time of the main thread to clean up, before the process ends all the same.
# Schedulers signal a process and then its process group: within this time it is one signal.
SAME_SIGNAL_S = 1.0
_FLUSH_S = 1.0  # Time to flush a stream, which may be a pipe that nobody reads.

Watch = Callable[[int, threading.Event], None]
_watching: tuple[Watch, threading.Event] | None = None  # Of the innermost `handling`.
_first_at: float | None = None  # When the first signal arrived within it.
_descriptor = -1  # The end of the socket that the interpreter writes to.


def ending(number: int, *, resumable: bool) -> tuple[str, int]:
    """Returns the last line and the exit status of a command that has nothing to save.

    Args:
      number: Of the signal that ends the command.
      resumable: Whether the same command, run again, goes on where this one was stopped.
    """
    name = signal.Signals(number).name
    if resumable:
        return errors.last_line(errors.stopped_by(name)), errors.PREEMPTED
    return "interrupted" if number == signal.SIGINT else f"stopped by {name}", 128 + number


def end_at_once(*, resumable: bool) -> None:
    """From here until `handling`, a signal ends the process with one line.

    For a command that is still being imported, which takes seconds.

    Args:
      resumable: As for `ending`.
    """

    def end(number: int, frame: object) -> NoReturn:
        line, status = ending(number, resumable=resumable)
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode(errors="backslashreplace"))
        os._exit(status)

    _handle(end)


def _handle(handler: Callable[[int, object], object]) -> None:
    """Sets the handler of all signals; a command started with `nohup` goes on ignoring SIGHUP."""
    for number in NUMBERS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def handling(handle: Callable[[int], None], watch: Watch) -> Iterator[None]:
    """Handles the signals within the context; for the main thread.

    After the context they are ignored: the process is about to end, and its exit status is settled.
    What `handle` raises leaves the context even where a library turns it into an error of its own,
    as compiled code may that calls Python.

    Args:
      handle: Called with the number of a signal in the main thread; may raise.
      watch: Called in a thread, whatever the main thread does, with the number of the first signal
        and an event that is set when the context ends.
    """
    global _watching, _first_at
    _start()
    over, before = threading.Event(), _watching
    _watching, _first_at = (watch, over), None
    raised: list[BaseException] = []

    def noted(number: int, frame: object) -> None:
        try:
            handle(number)
        except BaseException as error:
            raised.append(error)
            raise

    _handle(noted)
    try:
        yield
    except Exception as error:
        if raised and error is not raised[0]:
            raise raised[0] from error
        raise
    finally:
        for number in NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        _watching = before
        over.set()


def leave(line: str, status: int) -> NoReturn:
    """Ends the process at once, from any thread, with a last line on standard error.

    No destructors run: beside threads of XLA and of checkpoints that still work they may crash.
    """
    import multiprocessing

    flusher = threading.Thread(target=_flush, args=(line,), daemon=True)
    with contextlib.suppress(RuntimeError):  # No thread can be started any more.
        flusher.start()
        flusher.join(_FLUSH_S)
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


def _flush(line: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def _start() -> None:
    """Starts the thread, once in a process."""
    global _descriptor
    if _descriptor >= 0:
        signal.set_wakeup_fd(_descriptor, warn_on_full_buffer=False)
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _descriptor = writer.detach()
    threading.Thread(target=_read, args=(reader,), daemon=True, name="signals").start()
    signal.set_wakeup_fd(_descriptor, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)


def _read(reader: socket.socket) -> None:
    """Passes the first signal on; another one after `SAME_SIGNAL_S` ends the process."""
    global _first_at
    while numbers := reader.recv(64):
        for number in numbers:
            watching, now = _watching, time.monotonic()
            if number not in NUMBERS or watching is None:
                continue
            if _first_at is None:
                _first_at, (watch, over) = now, watching
                threading.Thread(target=watch, args=(number, over), daemon=True).start()
            elif now - _first_at > SAME_SIGNAL_S:
                os._exit(128 + number)


def _forget() -> None:
    """A forked child writes nothing to the socket of its parent, and ends by a signal."""
    global _descriptor, _watching
    if _watching is not None:
        _handle(signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    _descriptor, _watching = -1, None
