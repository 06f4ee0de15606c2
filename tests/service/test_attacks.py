"""Hostile requests: refused in a line, never an error of the service, and others are answered."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import zlib
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tests.service.conftest import TOKEN, serving
from tests.service.test_app import form, png
from vixml_jax.service import app, backend
from vixml_jax.serving.predictor import Predictor

ODD = [
    None, True, -1, 0, 2**63, 1e308, "", " ", "a1", "\0", "\x1b[31m", "\ufeff", "é" * 300, [], {},
    [[]], [None], {"text": 1}, "a" * 100_000, ["a1"] * 2000, [[0.5] * 12], "YWJj",
]  # fmt: skip


def mutated(value, rng):
    """A JSON value with one part replaced by something odd, or under an odd name."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = str(rng.choice(sorted(value)))
        changed = dict(value)
        if rng.random() < 0.1:
            changed[str(rng.choice(["", "text", "k", "\0", "__class__", name * 9]))] = changed.pop(
                name
            )
        elif rng.random() < 0.1:
            del changed[name]
        else:
            changed[name] = mutated(value[name], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = int(rng.integers(len(value)))
        return [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    return ODD[rng.integers(len(ODD))]


def test_mutated_requests_are_answered_or_refused(service):
    client, _, _ = service
    rng = np.random.default_rng()
    image = base64.b64encode(png(0)).decode()
    query = {"text": "a3 b4", "images": [image], "embeddings": [[0.5] * 12], "never": ["3"]}
    label = {"id": "new", "text": "a1", "examples": ["a1", "b2"], "embeddings": [[0.1] * 12]}
    bodies = {
        "/predict": {"queries": [query, {"text": "b1"}], "k": 5, "min_score": 0.1, "timeout_s": 9},
        "/explain": {"query": query, "k": 3},
        "/labels": {"labels": [label, {"id": "other", "text": "b"}]},
        "/labels/remove": {"ids": ["1", "2"]},
    }
    seen = set()
    for path, body in bodies.items():
        for _ in range(60):
            changed = body
            for _ in range(rng.integers(1, 4)):
                changed = mutated(changed, rng)
            data = json.dumps(changed).encode()
            if rng.random() < 0.2:  # Bytes instead of parts.
                at = int(rng.integers(max(1, len(data))))
                data = data[:at] + rng.bytes(rng.integers(0, 4)) + data[at + rng.integers(3) :]
            status, _, answer = client(path, data, token=TOKEN)
            assert status in (200, 400), (path, data[:300], answer)
            assert status == 200 or json.loads(answer)["error"]
            assert len(answer) < 5000 or status == 200, answer[:300]
            seen.add(status)
            if status == 200 and path.startswith("/labels"):
                assert client("/labels/undo", {}, token=TOKEN)[0] == 200
    assert seen == {200, 400}
    assert client("/healthz")[0] == 200


def bomb():
    """A png of 30,000 x 30,000 pixels in a few kB, as far as its header says."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_images_that_are_none(service):
    client, _, _ = service
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    animation = io.BytesIO()
    Image.new("P", (5, 5)).save(animation, "gif")
    for content in (b"", b"x", eps, svg, bomb(), png(1)[:60], animation.getvalue()):
        body, kind = form([("text", "a1")], [("image", content)])
        status, _, answer = client("/predict", body, kind=kind)
        result = json.loads(answer)["results"][0]
        assert status == 200 and len(result["labels"]) == 10
        assert content == animation.getvalue() or "an image is ignored" in result["note"]


RAW = [
    b"", b"\r\n\r\n", b"\0" * 1000, b"GET", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0\x01",
    b"GET / HTTP/1.1\r\n\r\n", b"GET /%ff%fe HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET //../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /static/..%2fapp.py HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999\r\n"
    b"content-type: application/json\r\n\r\n{}",
    b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", b"TRACE / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /labels HTTP/1.1\r\nhost: x\r\nauthorization: Bearer \xff\xfe\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("data", RAW, ids=lambda data: repr(data[:25]))
def test_malformed_http(service, data):
    client, _, _ = service
    host, port = client.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        answer = b""
        with contextlib.suppress(OSError):
            connection.sendall(data)  # The service may close it before the end.
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                answer += part
    assert b" 500 " not in answer.split(b"\r\n")[0]
    assert b"root:" not in answer and b"Starlette" not in answer
    assert client("/healthz")[0] == 200


def test_bodies_that_never_end(workdir):
    """They end after the deadline, and hold no thread that others need."""
    predictor = Predictor.load(workdir, warm=False)
    with serving(lambda: backend.Opened(predictor, None), timeout_s=8.0) as (client, service):
        service.wait_until_loaded()
        predictor(["a1"])
        host, port = client.address.removeprefix("http://").split(":")
        head = (
            f"POST /predict HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            "content-length: 5000\r\n\r\n{"
        ).encode()
        slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(300)]
        for connection in slow:
            connection.sendall(head)
        started = time.monotonic()
        assert client("/predict", {"queries": [{"text": "a1"}]})[0] == 200
        assert time.monotonic() - started < 8.0  # It waited for none of them.
        for connection in slow[:5]:
            assert b" 408 " in connection.recv(1 << 16)
        for connection in slow:
            connection.close()


def test_a_chunked_body_is_bounded(service):
    client, _, _ = service
    host, port = client.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            f"POST /predict HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        answers = []
        reader = threading.Thread(target=lambda: answers.append(connection.recv(1 << 16)))
        reader.start()
        for _ in range(17):  # A little more than a MiB, so that nothing is sent to a closed end.
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        reader.join(30)
    assert b" 413 " in answers[0]


def test_all_bodies_together_are_bounded():
    """Of clients that each send a large body and wait, some are refused; later none is."""
    body, go_on = {"type": "http.request", "body": b" " * 900, "more_body": True}, asyncio.Event()

    async def answered(scope, receive, send):
        await receive()
        await go_on.wait()
        return "answered"

    guard = app._Guard(answered, mock.MagicMock(), frozenset(), 1000)

    async def client():
        async def receive():
            return body

        await guard({"type": "http", "path": "/predict"}, receive, mock.AsyncMock())

    async def clients():
        first = [asyncio.create_task(client()) for _ in range(20)]
        await asyncio.sleep(0)
        go_on.set()
        found = await asyncio.gather(*first, return_exceptions=True)
        refused = [error for error in found if error is not None]
        assert {(error.status_code, error.headers["retry-after"]) for error in refused} == {
            (503, "1")
        }
        assert len(refused) == 20 - app._MAX_HELD * 1000 // 900
        await client()

    asyncio.run(clients())


def test_a_client_that_goes_is_no_error(service):
    client, _, _ = service
    host, port = client.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            f"POST /predict HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            "content-length: 500\r\n\r\n{".encode()
        )
    end = time.monotonic() + 30
    line = 'vixml_requests_total{path="/predict",status="499"} 1.0'
    while line not in client("/metrics")[2].decode():
        assert time.monotonic() < end
