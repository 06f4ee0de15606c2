"""The HTTP endpoints of the service: a Starlette application over `backend.Backend`."""

import asyncio
import functools
import hmac
import importlib.resources
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio
import msgspec
import prometheus_client
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from vixml_jax.errors import InputError
from vixml_jax.service import openapi, schema
from vixml_jax.service.backend import Backend, Unavailable

_THREADS = 256  # Requests that are worked on; most of them wait for the batch of others.
_LIMIT, _MAX_LIMIT = 100, 10_000  # Labels of a page.
_MAX_FILES = 16  # Of a form.
# Bytes of all requests that arrive or are answered, in requests of the largest size: values of JSON
# take up to thirty times as much memory as their text.
_MAX_HELD = 8
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)
_STATIC = {"style.css": "text/css", "app.js": "text/javascript"}

Scope = MutableMapping[str, Any]
Handler = Callable[[Request], Awaitable[Response]]


class Metrics:
    """Counters of the service, in a registry of its own."""

    def __init__(self, backend: Backend):
        prometheus_client.disable_created_metrics()
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        more = {"registry": self.registry}
        self.requests = prometheus_client.Counter(
            "vixml_requests", "Requests that were answered.", ["path", "status"], **more
        )
        self.seconds = prometheus_client.Histogram(
            "vixml_request_seconds",
            "Seconds from the first byte of a request to the last byte of its answer.",
            ["path"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            **more,
        )
        self.queries = prometheus_client.Counter("vixml_queries", "Queries answered.", **more)
        gauges = {
            "vixml_pending_queries": (
                "Queries that are answered or wait.", lambda: backend.pending,
            ),
            "vixml_ready": ("Whether queries are answered.", lambda: backend.state().ready),
            "vixml_labels": (
                "Labels that can be found.", lambda: backend.state().num_labels or 0,
            ),
        }  # fmt: skip
        for name, (about, value) in gauges.items():
            prometheus_client.Gauge(name, about, **more).set_function(value)


class _Guard:
    """Bounds the sizes of bodies, adds headers, and counts what is answered."""

    def __init__(self, app: Any, metrics: Metrics, paths: frozenset[str], max_body: int):
        self._app, self._metrics, self._max_body = app, metrics, max_body
        self._paths, self._held = paths, 0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, size, status = time.monotonic(), 0, 500

        async def bounded() -> Any:
            nonlocal size
            message = await receive()
            more = len(message.get("body", b""))
            size, self._held = size + more, self._held + more
            if size > self._max_body:
                raise HTTPException(
                    413, f"the body is larger than {self._max_body >> 20} MiB (--max_body_mib)"
                )
            if self._held > _MAX_HELD * self._max_body:
                raise HTTPException(503, "too many large requests at a time", {"retry-after": "1"})
            return message

        async def secured(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        try:
            await self._app(scope, bounded, secured)
        finally:
            self._held -= size
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - started)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(value),
        status,
        {"cache-control": "no-store", **(headers or {})},
        "application/json",
    )


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return _json(schema.Error(error=message), status, headers)


async def _failed(request: Request, error: Exception) -> Response:
    """The response to a request that raised; uvicorn logs what is not expected."""
    del request
    if isinstance(error, HTTPException):
        return _error(error.detail, error.status_code, dict(error.headers or {}))
    if isinstance(error, ClientDisconnect):  # For the metrics: nobody reads it.
        return _error("the client has gone", 499)
    if isinstance(error, Unavailable):
        wait = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
        return _error(str(error), error.status, wait)
    if isinstance(error, (InputError, msgspec.ValidationError, msgspec.DecodeError)):
        return _error(str(error), 400)
    return _error("an error of the service, which its log describes", 500)


def make(backend: Backend, *, token: str, origins: tuple[str, ...], max_body: int) -> Starlette:
    """Returns the application.

    Args:
      backend: Answers the requests.
      token: Needed to list and change labels; empty: nobody can.
      origins: Of web pages that may use the service from a browser; empty: its own alone.
      max_body: Bytes of a request.
    """
    metrics, threads = Metrics(backend), anyio.CapacityLimiter(_THREADS)

    async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
        return await anyio.to_thread.run_sync(
            functools.partial(function, *arguments), limiter=threads
        )

    async def body(request: Request) -> bytes:
        """The body of a request, which must arrive in time."""
        try:
            async with asyncio.timeout(backend.settings.timeout_s):
                return await request.body()
        except TimeoutError:
            raise HTTPException(408, "the body did not arrive in time") from None

    async def decoded(request: Request, kind: type) -> Any:
        found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if found != "application/json":
            raise HTTPException(
                415, f"found content type {found[:60]!r}, expected application/json"
            )
        try:
            return msgspec.json.decode(await body(request), type=kind)
        except UnicodeDecodeError as error:
            raise InputError(f"byte {error.start} of a text is not UTF-8") from None

    async def form(request: Request) -> schema.PredictRequest:
        """A query that was sent as a form."""
        try:
            async with asyncio.timeout(backend.settings.timeout_s):
                fields = await request.form(
                    max_files=_MAX_FILES, max_fields=1000, max_part_size=max_body
                )
        except TimeoutError:
            raise HTTPException(408, "the body did not arrive in time") from None
        query: dict[str, Any] = {"images": [], "never": []}
        more = {}
        try:
            for name, value in fields.multi_items():
                if isinstance(value, UploadFile):
                    if name != "image":
                        raise InputError(f"found a file {name[:60]!r}, expected image")
                    query["images"].append(await value.read())
                elif name == "text":
                    query["text"] = value
                elif name == "never":
                    query["never"].append(value)
                elif name in ("k", "min_score", "timeout_s"):
                    more[name] = value
                else:
                    raise InputError(
                        f"found a field {name[:60]!r}, expected text, image, never, k, min_score "
                        "or timeout_s"
                    )
        finally:
            await fields.close()
        return msgspec.convert({"queries": [query], **more}, schema.PredictRequest, strict=False)

    async def predict(request: Request) -> Response:
        arrived = time.monotonic()
        is_form = request.headers.get("content-type", "").startswith("multipart/form-data")
        asked = await (form(request) if is_form else decoded(request, schema.PredictRequest))
        with backend.admitted(len(asked.queries)):
            response = await in_thread(backend.predict, asked, arrived)
        metrics.queries.inc(len(asked.queries))
        return _json(response)

    async def explain(request: Request) -> Response:
        arrived = time.monotonic()
        asked = await decoded(request, schema.ExplainRequest)
        with backend.admitted(1):
            return _json(await in_thread(backend.explain, asked, arrived))

    def allowed(endpoint: Handler) -> Handler:
        """The endpoint, for requests with the token."""

        @functools.wraps(endpoint)
        async def checked(request: Request) -> Response:
            if not token:
                raise HTTPException(
                    403, "labels cannot be listed or changed: the service has no token; start it "
                    "with --token_file=FILE"
                )  # fmt: skip
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                raise HTTPException(
                    401, "the token is missing or wrong; expected the header Authorization: "
                    "Bearer TOKEN", {"www-authenticate": "Bearer"}
                )  # fmt: skip
            return await endpoint(request)

        return checked

    async def list_labels(request: Request) -> Response:
        def number(name: str, default: int, largest: int) -> int:
            value = request.query_params.get(name, str(default))
            is_number = value.isascii() and value.isdigit() and len(value) <= 12
            if not (is_number and int(value) <= largest):
                raise InputError(f"{name}={value[:20]}: expected from 0 to {largest}")
            return int(value)

        return _json(
            await in_thread(
                backend.labels,
                number("after", 0, 2**31 - 1),
                max(1, number("limit", _LIMIT, _MAX_LIMIT)),
                request.query_params.get("contains", ""),
            )
        )

    async def add_labels(request: Request) -> Response:
        return _json(await in_thread(backend.add_labels, await decoded(request, schema.AddRequest)))

    async def remove_labels(request: Request) -> Response:
        return _json(
            await in_thread(backend.remove_labels, await decoded(request, schema.RemoveRequest))
        )

    async def undo(request: Request) -> Response:
        del request
        return _json(await in_thread(backend.undo))

    async def health(request: Request) -> Response:
        del request
        return _json(backend.state())

    async def ready(request: Request) -> Response:
        del request
        state = backend.state()
        return _json(state, 200 if state.ready else 503)

    async def show_metrics(request: Request) -> Response:
        del request
        return Response(
            prometheus_client.generate_latest(metrics.registry),
            media_type=prometheus_client.CONTENT_TYPE_PLAIN_0_0_4,
        )

    async def document(request: Request) -> Response:
        del request
        return _json(openapi.document())

    async def documentation(request: Request) -> Response:
        del request
        return Response(openapi.page(), media_type="text/html")

    async def page(request: Request) -> Response:
        del request
        return Response(_file("index.html"), media_type="text/html")

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _STATIC:
            raise HTTPException(404, "Not Found")
        return Response(_file(name), media_type=_STATIC[name])

    routes = [
        Route("/", page, methods=["GET"]),
        Route("/static/{name}", static, methods=["GET"]),
        Route("/predict", predict, methods=["POST"]),
        Route("/explain", explain, methods=["POST"]),
        Route("/labels", allowed(list_labels), methods=["GET"]),
        Route("/labels", allowed(add_labels), methods=["POST"]),
        Route("/labels/remove", allowed(remove_labels), methods=["POST"]),
        Route("/labels/undo", allowed(undo), methods=["POST"]),
        Route("/healthz", health, methods=["GET"]),
        Route("/readyz", ready, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
        Route("/openapi.json", document, methods=["GET"]),
        Route("/docs", documentation, methods=["GET"]),
    ]
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(_Guard, metrics=metrics, paths=paths, max_body=max_body)]
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    known = (HTTPException, ClientDisconnect, Unavailable, InputError, msgspec.MsgspecError)
    handlers = dict.fromkeys((*known, Exception), _failed)
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


@functools.cache
def _file(name: str) -> bytes:
    return (importlib.resources.files("vixml_jax.service") / "templates" / name).read_bytes()
