"""Fixtures of the download tests: a local server, and host names that lead to it."""

import socket
import threading

import pytest

from tests.data.images import fake_server
from vixml_jax.data.images import download


@pytest.fixture
def server():
    """A running `Server`."""
    with fake_server.Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Makes waits before retries short."""
    monkeypatch.setattr(download, "_BACK_OFF_S", 0.01)


@pytest.fixture
def network(monkeypatch, server):
    """Fake host names and addresses; all connections lead to `server`, whatever the address."""
    net = fake_server.Network()
    connect = socket.socket.connect

    def getaddrinfo(host, port, *unused, **unused_too):
        answers = net.names[host]
        addresses = answers[min(net.lookups[host], len(answers) - 1)]
        net.lookups[host] += 1
        return [
            (
                socket.AF_INET6 if ":" in ip else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (ip, port),
            )
            for ip in addresses
        ]

    def rerouted(self, address):
        net.connected.append(address)
        return connect(self, server.server_address)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", rerouted)
    return net
