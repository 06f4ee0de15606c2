"""A service of a tiny run that reads texts and images, on a port of its own."""

import contextlib
import json
import pathlib
import tarfile
import threading
import urllib.error
import urllib.request

import pytest

from tests import tiny
from vixml_jax.image_encoding.encoder import ImageEncoder
from vixml_jax.service import app, backend, server
from vixml_jax.serving import label_updates
from vixml_jax.serving.predictor import Predictor

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "run_0_1.tar.gz"
TOKEN = "0123456789abcdef-token"


class Client:
    """Sends requests to a service; returns status, headers and body."""

    def __init__(self, address):
        self.address = address

    def __call__(self, path, body=None, *, method=None, token="", kind="application/json"):
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, body, method=method)
        if body is not None:
            request.add_header("content-type", kind)
        if token:
            request.add_header("authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()

    def ask(self, *queries, **more):
        """The labels of queries: (id, text, score) each."""
        status, _, body = self("/predict", {"queries": [*queries], **more})
        assert status == 200, body
        return [
            [(x["id"], x["text"], x["score"]) for x in result["labels"]]
            for result in json.loads(body)["results"]
        ]


def unpack(directory):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(directory, filter="data")
    workdir = str(directory / "run")
    for _ in label_updates.steps(workdir):
        label_updates.undo(workdir)
    return workdir


@contextlib.contextmanager
def serving(open_run, *, token=TOKEN, origins=(), max_body=1 << 20, **settings):
    """Yields a client and the backend of a service in a thread."""
    settings = {
        "max_queries": 50, "max_pending": 200, "timeout_s": 60.0, "refresh_s": 0.05, **settings,
    }  # fmt: skip
    service = backend.Backend(backend.Settings(**settings), open_run)
    application = app.make(service, token=token, origins=origins, max_body=max_body)
    bound = server.bind("127.0.0.1", 0)
    running = server.make(application, 10.0)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        yield Client(server.address_of(bound)), service
    finally:
        running.should_exit = True
        thread.join(60)
        service.close()
        bound.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A vision model whose embeddings have the width that the run reads."""
    model = tiny.make_siglip(tmp_path_factory.mktemp("siglip"), 16, 8, width=12)
    return ImageEncoder(model, keep_aspect=False, dtype="float32")


@pytest.fixture
def workdir(tmp_path):
    return unpack(tmp_path)


@pytest.fixture
def service(workdir, images):
    """A client, the backend and the predictor of a service of its own."""
    predictor = Predictor.load(workdir, warm=False)
    with serving(lambda: backend.Opened(predictor, images)) as (client, service):
        service.wait_until_loaded()
        yield client, service, predictor
