"""Runs the application with uvicorn until a signal ends it."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from vixml_jax.errors import InputError
from vixml_jax.runtime import signals
from vixml_jax.service.backend import Backend

_BACKLOG = 2048  # Connections that wait to be accepted.


class _Server(uvicorn.Server):
    """Leaves signals to `run`; uvicorn would raise them again at its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, so that a port in use is told before the run is opened.

    Args:
      host: Name or address.
      port: Of TCP; 0: any that is free.

    Raises:
      InputError: If the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--host={host} --port={port}: {reason}; choose another port") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """Returns the URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make(app: Starlette, grace_s: float) -> uvicorn.Server:
    """Returns a server that runs until its attribute `should_exit` is set.

    Args:
      app: The application.
      grace_s: Seconds that requests which have begun may still take then.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(grace_s) + 1,
    )
    return _Server(config)


def run(
    app: Starlette,
    backend: Backend,
    bound: socket.socket,
    grace_s: float,
    announce: Callable[[], None],
) -> str:
    """Answers requests until a signal arrives, then those that have begun.

    Args:
      app, backend: Of the service.
      bound: Socket to listen on.
      grace_s: Seconds that requests which have begun may still take.
      announce: Called once queries are answered.

    Returns:
      Name of the signal; empty if the run cannot be opened.
    """
    server, received = make(app, grace_s), []

    def stop(number: int) -> None:
        received.append(signal.Signals(number).name)
        backend.is_draining = True
        server.should_exit = True

    def end_late(number: int, over: threading.Event) -> None:
        if not over.wait(grace_s + signals.GRACE_S):
            signals.leave(*signals.ending(number, resumable=False))

    def wait() -> None:
        backend.wait_until_loaded()
        if backend.failure is None:
            announce()
        else:
            server.should_exit = True

    threading.Thread(target=wait, daemon=True).start()
    with signals.handling(stop, end_late), bound:
        server.run(sockets=[bound])
    return received[0] if received else ""
