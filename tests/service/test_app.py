"""Requests of the service: right answers, limits, tokens, and an error that says what is wrong."""

import base64
import io
import json
import threading
import time
import uuid
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from tests.service.conftest import TOKEN, serving
from vixml_jax.service import backend, openapi
from vixml_jax.serving import explaining, label_updates
from vixml_jax.serving.predictor import Predictor

TEXTS = ["a3 b4", "b7 a1", "a9 b0"]


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def form(fields, files=()):
    """A body of multipart/form-data, and its content type."""
    boundary, parts = uuid.uuid4().hex, []
    for name, value in fields:
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
    for name, content in files:
        head = f'Content-Disposition: form-data; name="{name}"; filename="x.png"\r\n'
        parts.append(f"{head}Content-Type: image/png\r\n\r\n".encode() + content)
    body = b"".join(f"--{boundary}\r\n".encode() + part + b"\r\n" for part in parts)
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def as_rows(found):
    return [[tuple(label) for label in row] for row in found]


def assert_same(found, expected):
    assert [[x[:2] for x in row] for row in found] == [[x[:2] for x in row] for row in expected]
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_allclose([x[2] for x in row], [x[2] for x in other], atol=1e-5)


def test_predictions_are_those_of_the_predictor(service):
    client, _, predictor = service
    queries = [{"text": text} for text in TEXTS]
    assert_same(client.ask(*queries), as_rows(predictor(TEXTS)))
    assert_same(client.ask(*queries, k=3), as_rows(predictor(TEXTS, k=3)))
    least = predictor(TEXTS[:1])[0][2].score - 1e-6
    found = client.ask(queries[0], min_score=least)
    assert_same(found, as_rows(predictor(TEXTS[:1], k=3)))
    never = [x.id for x in predictor(TEXTS[:1])[0][:2]]
    expected = predictor(TEXTS[:2], never=[never, []])
    assert_same(client.ask({**queries[0], "never": never}, queries[1]), as_rows(expected))
    rng = np.random.default_rng()
    images = rng.normal(size=(2, 12)).astype(np.float32)
    found = client.ask({"text": TEXTS[0], "embeddings": images.tolist()})
    assert_same(found, as_rows(predictor(TEXTS[:1], [images])))


def test_explanations_are_those_of_explain(service):
    client, _, predictor = service
    never = [predictor(["a3 b4"])[0][0].id]
    query = {"text": "a3 b4", "never": never}
    status, _, answer = client("/explain", {"query": query, "k": 3})
    assert status == 200
    answer, expected = json.loads(answer), explaining.explain(predictor, "a3 b4", k=3, never=never)
    assert [x["id"] for x in answer["labels"]] == [x.label.id for x in expected.labels]
    for found, other in zip(answer["labels"], expected.labels, strict=True):
        assert found["score"] == pytest.approx(other.label.score, abs=1e-5)
        assert found["prototype"] == pytest.approx(other.prototype, abs=1e-5)
    near = [(x["text"], x["labels"]) for x in answer["neighbours"]]
    assert near == [(None, x.labels) for x in expected.neighbours] and len(near) == 5
    for body in ({}, {"query": {}}, {"query": {"text": "a1"}, "k": 0}):
        assert client("/explain", body)[0] == 400


def test_image_files_as_json_and_as_a_form(service, images):
    client, _, predictor = service
    contents = [png(seed) for seed in range(3)]
    pixels = [images.pixels(content) for content in contents]
    vectors, _ = images.start(pixels, images.batch_size(3))()
    expected = as_rows(predictor(["a3 b4"], [vectors], k=4))
    encoded = [base64.b64encode(content).decode() for content in contents]
    assert_same(client.ask({"text": "a3 b4", "images": encoded}, k=4), expected)
    body, kind = form([("text", "a3 b4"), ("k", 4)], [("image", c) for c in contents])
    status, _, answer = client("/predict", body, kind=kind)
    assert status == 200
    found = [(x["id"], x["text"], x["score"]) for x in json.loads(answer)["results"][0]["labels"]]
    assert_same([found], expected)
    # An image alone, a broken one beside a text, and a broken one alone.
    alone = client.ask({"images": encoded[:1]}, k=4)
    assert_same(alone, as_rows(predictor([""], [vectors[:1]], k=4)))
    broken = base64.b64encode(contents[0][:50]).decode()
    _, _, answer = client("/predict", {"queries": [{"text": "a3 b4", "images": [broken]}]})
    assert json.loads(answer)["results"][0]["note"].startswith("an image is ignored: ")
    status, _, answer = client("/predict", {"queries": [{"images": [broken]}]})
    assert (status, json.loads(answer)["error"][:28]) == (400, "query 0: an image is ignored")


@pytest.mark.parametrize(
    "body,message",
    [
        (b"", "Input data was truncated"),
        (b"{", "Input data was truncated"),
        (b"\xff\xfe", "JSON is malformed"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `queries`"),
        ({"queries": []}, "Expected `array` of length >= 1 - at `$.queries`"),
        ({"queries": [{}]}, "query 0: neither text nor image; expected one of them"),
        ({"queries": [{"text": "a1"}, {"text": " "}]}, "query 1: neither text nor image"),
        ({"queries": [{"text": 3}]}, "Expected `str`, got `int` - at `$.queries[0].text`"),
        ({"queries": [{"text": "\ud800"}]}, "Input data was truncated"),
        ({"queries": [{"words": "a"}]}, "unknown field `words` - at `$.queries[0]`"),
        ({"queries": [{"text": "a1"}], "k": 0}, "Expected `int` >= 1 - at `$.k`"),
        ({"queries": [{"text": "a1"}], "k": 10**30}, "at `$.k`"),
        ({"queries": [{"text": "a1"}], "k": 1.5}, "Expected `int`, got `float` - at `$.k`"),
        ({"queries": [{"text": "a1"}], "timeout_s": 0}, "Expected `float` > 0.0"),
        ({"queries": [{"text": "a1", "never": ["nobody"]}]}, "unknown label 'nobody'"),
        ({"queries": [{"images": ["!"]}]}, "base64"),
        ({"queries": [{"embeddings": [[]]}]}, "length >= 1"),
        ({"queries": [{"embeddings": [[1.0], [1.0, 2.0]]}]}, "widths [1, 2]"),
        ({"queries": [{"embeddings": [[1.0, 2.0]]}]}, "width 2, expected 12"),
        ({"queries": [{"text": "a", "embeddings": [[1e9] * 12]}]}, "not finite in float16"),
        (b'{"queries": [{"text": "a1"}], "min_score": NaN}', "malformed"),
        ({"queries": [{"text": "a1"}] * 51}, "found 51 queries, expected at most 50"),
        (b"[" * 100_000, "Expected `object`, got `array`"),
    ],
)  # fmt: skip
def test_malformed_bodies_are_refused(service, body, message):
    client, _, _ = service
    status, headers, answer = client("/predict", body)
    assert status == 400
    assert message in json.loads(answer)["error"]
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "fields,files,message",
    [
        ([("text", "a1"), ("k", "x")], [], "Expected `int`, got `str` - at `$.k`"),
        ([("text", "a1"), ("color", "x")], [], "found a field 'color'"),
        ([("text", "a1")], [("file", b"x")], "found a file 'file', expected image"),
        ([], [], "query 0: neither text nor image"),
    ],
)
def test_malformed_forms_are_refused(service, fields, files, message):
    client, _, _ = service
    body, kind = form(fields, files)
    status, _, answer = client("/predict", body, kind=kind)
    assert status == 400
    assert message in json.loads(answer)["error"]


def test_other_requests_have_an_error_that_says_why(service):
    client, _, _ = service
    for path, body, kind, expected in (
        ("/predict", b"{}", "text/plain", 415),
        ("/predict", None, "", 405),
        ("/nothing", None, "", 404),
        ("/static/../app.py", None, "", 404),
        ("/static/index.html", None, "", 404),
        ("/predict", b"x" * ((1 << 20) + 1000), "application/json", 413),
        ("/predict", b"x", "multipart/form-data; boundary=y", 400),
        ("/predict", b"x", "multipart/form-data", 400),
    ):
        status, headers, answer = client(path, body, kind=kind)
        assert status == expected, (path, answer)
        assert json.loads(answer)["error"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


def test_labels_need_the_token(service, workdir):
    client, _, _ = service
    calls = [("/labels", None), ("/labels", {"labels": [{"id": "x", "text": "a1"}]}),
             ("/labels/remove", {"ids": ["1"]}), ("/labels/undo", {})]  # fmt: skip
    for path, body in calls:
        for token in ("", "wrong", TOKEN[:-1], TOKEN + "x"):
            status, headers, _ = client(path, body, token=token)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert label_updates.steps(workdir) == []
    predictor = Predictor.load(workdir, warm=False)
    with serving(lambda: backend.Opened(predictor, None), token="") as (other, _):
        for path, body in calls:
            assert other(path, body, token=TOKEN)[0] == 403
            assert other(path, body)[0] == 403


def test_labels_are_added_removed_listed_and_taken_back(service, workdir):
    client, _, predictor = service

    def change(path, body=None):
        status, _, answer = client(path, body, token=TOKEN, method="POST")
        return status, json.loads(answer)

    before = client.ask({"text": "a3 b4"})
    new = {"id": "new", "text": "a3 b4", "examples": ["a3", "b4 a3"]}
    assert change("/labels", {"labels": [new]}) == (200, {"changed": ["new"], "num_labels": 21})
    assert "new" in [x[0] for x in client.ask({"text": "a3 b4"}, k=21)[0]]
    status, answer = change("/labels", {"labels": [{"id": "other", "text": "a1"}, new]})
    assert status == 400 and "label 'new' exists already" in answer["error"]
    assert change("/labels", {"labels": [{"id": "empty"}]})[0] == 400
    listed = json.loads(client("/labels?limit=3&after=18", token=TOKEN)[2])
    assert [x["id"] for x in listed["labels"]] == ["18", "19", "new"]
    assert listed["num_labels"] == 21
    for wrong in ("limit=" + "0" * 20 + "99999", "after=" + "0" * 5000, "limit=10001", "limit=-1"):
        assert client(f"/labels?{wrong}", token=TOKEN)[0] == 400
    listed = json.loads(client("/labels?limit=1", token=TOKEN)[2])
    assert (listed["labels"][0]["id"], listed["next"]) == ("0", 1)
    listed = json.loads(client("/labels?contains=LABEL%20b", token=TOKEN)[2])
    assert {x["text"] for x in listed["labels"]} == {f"label b{i}" for i in range(10)}
    assert client("/labels?after=-1", token=TOKEN)[0] == 400
    assert change("/labels/remove", {"ids": ["3", "3"]})[1]["num_labels"] == 20
    assert "3" not in [x[0] for x in client.ask({"text": "a3 b4"}, k=21)[0]]
    assert change("/labels/remove", {"ids": ["3"]})[0] == 400
    assert change("/labels/undo")[1] == {"changed": ["3"], "num_labels": 21}
    assert change("/labels/undo")[1]["num_labels"] == 20
    assert change("/labels/undo")[0] == 400
    assert_same(client.ask({"text": "a3 b4"}), before)
    # What another process writes is taken up.
    vectors = predictor.encode(["b7"])
    label_updates.add(workdir, predictor.artifacts, ["outside"], ["b7"], vectors)
    end = time.monotonic() + 30
    while "outside" not in [x[0] for x in client.ask({"text": "b7"}, k=30)[0]]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_queries_beside_changes_of_labels(service):
    """No wrong answer in between: with the label or without it, and no change is lost."""
    client, _, _ = service
    stop = threading.Event()
    best = [x[0] for x in client.ask({"text": "a3 b4"}, k=5)[0]]

    def ask(text):
        answers = 0
        while not stop.is_set():
            found = [x[0] for x in client.ask({"text": text}, k=12)[0]]
            if text == "a3 b4":
                assert [x for x in found if not x.startswith("new")][:4] == best[:4]
            answers += 1
        return answers

    def change(i):
        body = {"labels": [{"id": f"new {i}", "text": "a3 b4"}]}
        return client("/labels", body, token=TOKEN)[0]

    with futures.ThreadPoolExecutor(12) as pool:
        asking = [pool.submit(ask, text) for text in [*TEXTS, "a3 b4", "a3 b4"]]
        try:
            assert list(pool.map(change, range(6))) == [200] * 6
        finally:
            stop.set()
        assert all(one.result() for one in asking)
    listed = json.loads(client("/labels?after=20", token=TOKEN)[2])
    assert {x["id"] for x in listed["labels"]} == {f"new {i}" for i in range(6)}


def test_too_many_queries_wait_or_too_long(workdir):
    predictor = Predictor.load(workdir, warm=False)
    with serving(lambda: backend.Opened(predictor, None), max_pending=3, timeout_s=3.0) as (
        client,
        service,
    ):
        service.wait_until_loaded()
        predictor(["a1"])
        begun, go_on, original = threading.Event(), threading.Event(), predictor._encoder.queries

        def slow(items):
            begun.set()
            assert go_on.wait(60)
            return original(items)

        predictor._encoder.queries = slow
        with futures.ThreadPoolExecutor(4) as pool:
            first = pool.submit(client, "/predict", {"queries": [{"text": "a1"}]})
            assert begun.wait(60)
            late = pool.submit(client, "/predict", {"queries": [{"text": "a1"}] * 2})
            while service.pending < 3:
                time.sleep(0.001)
            status, headers, answer = client("/predict", {"queries": [{"text": "a1"}]})
            assert (status, headers["retry-after"]) == (429, "1")
            assert "3 queries are waiting already" in json.loads(answer)["error"]
            status, headers, answer = late.result()
            assert (status, headers["retry-after"]) == (503, "1")
            assert "no answer within 3 s" in json.loads(answer)["error"]
            go_on.set()
            assert first.result()[0] == 200
        assert service.pending == 0
        # A request that is larger than what may wait is answered where nothing waits.
        assert client("/predict", {"queries": [{"text": "a1"}] * 9})[0] == 200


def test_ready_only_once_the_run_is_open(workdir):
    go_on = threading.Event()

    def open_run():
        assert go_on.wait(60)
        return backend.Opened(Predictor.load(workdir, warm=False), None)

    with serving(open_run) as (client, service):
        assert client("/healthz")[0] == 200
        status, _, answer = client("/readyz")
        assert (status, json.loads(answer)["reason"]) == (503, "the run is being opened")
        status, headers, _ = client("/predict", {"queries": [{"text": "a1"}]})
        assert (status, headers["retry-after"]) == (503, "1")
        assert client("/labels", token=TOKEN)[0] == 503
        go_on.set()
        service.wait_until_loaded()
        end = time.monotonic() + 30
        while client("/readyz")[0] != 200:
            assert time.monotonic() < end
        state = json.loads(client("/readyz")[2])
        assert state == {"ready": True, "workdir": "run", "step": state["step"], "num_labels": 20}
        service.is_draining = True
        assert client("/readyz")[0] == 503
        assert client("/predict", {"queries": [{"text": "a1"}]})[0] == 200


def test_labels_that_change_while_the_run_is_opened_are_found(workdir):
    def open_run():
        predictor = Predictor.load(workdir, warm=False)
        label_updates.remove(workdir, predictor.artifacts, ["3"])  # By another process.
        return backend.Opened(predictor, None)

    with serving(open_run) as (client, service):
        service.wait_until_loaded()
        end = time.monotonic() + 30
        while json.loads(client("/readyz")[2])["num_labels"] != 19:
            assert time.monotonic() < end


def test_a_disk_that_is_away_for_a_while(workdir, monkeypatch):
    """Changes of labels are noticed again once it is back."""
    predictor = Predictor.load(workdir, warm=False)
    state, looks = label_updates.state, []

    def away(directory):
        looks.append(directory)
        if len(looks) < 5:
            raise OSError(116, "Stale file handle")
        return state(directory)

    monkeypatch.setattr(label_updates, "state", away)
    with serving(lambda: backend.Opened(predictor, None)) as (client, _):
        end = time.monotonic() + 30
        while len(looks) < 5:
            assert time.monotonic() < end
        label_updates.remove(workdir, predictor.artifacts, ["3"])
        while json.loads(client("/readyz")[2])["num_labels"] != 19:
            assert time.monotonic() < end


def test_a_run_that_cannot_be_opened(tmp_path):
    def open_run():
        raise ValueError("no such run")

    with serving(open_run) as (client, service):
        service.wait_until_loaded()
        assert "no such run" in json.loads(client("/readyz")[2])["reason"]
        assert isinstance(service.failure, ValueError)


def test_metrics_count_requests_and_queries(service):
    client, _, _ = service
    client.ask({"text": "a1"}, {"text": "b2"})
    client("/predict", {})
    client("/nothing")
    text = client("/metrics")[2].decode()
    assert 'vixml_requests_total{path="/predict",status="200"} 1.0' in text
    assert 'vixml_requests_total{path="/predict",status="400"} 1.0' in text
    assert 'vixml_requests_total{path="other",status="404"} 1.0' in text
    for line in (
        "vixml_queries_total 2.0",
        "vixml_labels 20.0",
        "vixml_ready 1.0",
        "vixml_pending_queries 0.0",
        'vixml_request_seconds_count{path="/predict"} 2.0',
    ):
        assert f"{line}\n" in text  # fmt: skip
    assert "process_resident_memory_bytes" in text


def test_other_origins_only_if_they_are_named(workdir):
    predictor = Predictor.load(workdir, warm=False)
    origin = "https://shop.example"
    opened = backend.Opened(predictor, None)
    with serving(lambda: opened, origins=(origin,)) as (client, _):
        import urllib.request

        for name, allowed in ((origin, origin), ("https://other.example", None)):
            request = urllib.request.Request(client.address + "/healthz", headers={"origin": name})
            with urllib.request.urlopen(request, timeout=60) as response:
                assert response.headers["access-control-allow-origin"] == allowed


def test_document_describes_every_endpoint(service):
    client, _, _ = service
    document = json.loads(client("/openapi.json")[2])
    assert {(e.path, e.method.lower()) for e in openapi.ENDPOINTS} == {
        (path, method) for path, methods in document["paths"].items() for method in methods
    }
    schemas = document["components"]["schemas"]

    def references(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "$ref":
                    yield inner
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas
    for endpoint in openapi.ENDPOINTS:  # Each exists, and asks for a token where it says so.
        status, _, _ = client(endpoint.path, method=endpoint.method, body=b"{}"
                              if endpoint.method == "POST" else None)  # fmt: skip
        assert status == (401 if endpoint.needs_token else 400 if endpoint.request else 200)
    assert client("/docs")[0] == 200
