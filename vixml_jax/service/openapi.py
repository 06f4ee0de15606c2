"""The OpenAPI document of the service, and a page that shows it."""

import functools
import html
import json
from typing import Any, NamedTuple

import msgspec

import vixml_jax
from vixml_jax.service import schema


class Endpoint(NamedTuple):
    """What an endpoint takes and returns.

    Attributes:
      method, path: As in HTTP.
      summary: What it does, in a line.
      response: Type of the response; None: text.
      request: Type of the JSON body; None: there is none.
      needs_token: Whether a token is needed.
      query: Parameters of the URL with their meaning.
    """

    method: str
    path: str
    summary: str
    response: type | None
    request: type | None = None
    needs_token: bool = False
    query: tuple[tuple[str, str, str], ...] = ()


ENDPOINTS = (
    Endpoint(
        "POST",
        "/predict",
        "Returns the best labels of queries. One query may also be sent as a form: fields text, k, "
        "min_score and never, and image files named image.",
        schema.PredictResponse,
        schema.PredictRequest,
    ),
    Endpoint(
        "POST",
        "/explain",
        "Returns the labels of a query, the parts of their scores, and the nearest training "
        "queries.",
        schema.ExplainResponse,
        schema.ExplainRequest,
    ),
    Endpoint(
        "GET",
        "/labels",
        "Lists the labels that can be found.",
        schema.LabelList,
        needs_token=True,
        query=(
            ("after", "integer", "Where to go on: `next` of the page before."),
            ("limit", "integer", "Labels of a page, 100 if not given."),
            ("contains", "string", "What the id or text of a label must contain."),
        ),
    ),
    Endpoint(
        "POST",
        "/labels",
        "Adds labels, which are found at once, without training.",
        schema.Changed,
        schema.AddRequest,
        needs_token=True,
    ),
    Endpoint(
        "POST",
        "/labels/remove",
        "Removes labels.",
        schema.Changed,
        schema.RemoveRequest,
        needs_token=True,
    ),
    Endpoint(
        "POST",
        "/labels/undo",
        "Takes back the last addition or removal.",
        schema.Changed,
        needs_token=True,
    ),
    Endpoint("GET", "/healthz", "Answers as long as the process works.", schema.State),
    Endpoint(
        "GET",
        "/readyz",
        "Answers 200 once queries are answered, and 503 before and while the service ends.",
        schema.State,
    ),
    Endpoint("GET", "/metrics", "Metrics in the text format of Prometheus.", None),
)
_ERRORS = {
    "400": "The request is malformed; the message names the field.",
    "401": "The token is missing or wrong.",
    "403": "The service was started without a token.",
    "413": "The body is too large.",
    "415": "The content type is not that of JSON.",
    "429": "Too many queries are waiting; try again after the seconds in Retry-After.",
    "503": "The run is being opened, or there was no answer in time.",
}


def _errors(endpoint: Endpoint) -> set[str]:
    """The statuses of errors of an endpoint."""
    statuses = {"401", "403"} if endpoint.needs_token else set()
    if endpoint.request is not None:
        statuses |= {"400", "413", "415"}
    if endpoint.path in ("/predict", "/explain"):
        statuses.add("429")
    if endpoint.needs_token or endpoint.path in ("/predict", "/explain", "/readyz"):
        statuses.add("503")
    return statuses


@functools.cache
def document() -> dict[str, Any]:
    """Returns the OpenAPI document."""
    types = [t for e in ENDPOINTS for t in (e.request, e.response) if t] + [schema.Error]
    types = [*dict.fromkeys(types)]
    references, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    reference = dict(zip(types, references, strict=True))
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        content = {"text/plain": {}}
        if endpoint.response is not None:
            content = {"application/json": {"schema": reference[endpoint.response]}}
        operation: dict[str, Any] = {
            "summary": endpoint.summary,
            "responses": {"200": {"description": "Done.", "content": content}}
            | {
                status: {
                    "description": about,
                    "content": {"application/json": {"schema": reference[schema.Error]}},
                }
                for status, about in _ERRORS.items()
                if status in _errors(endpoint)
            },
        }
        if endpoint.request is not None:
            body = {"application/json": {"schema": reference[endpoint.request]}}
            operation["requestBody"] = {"required": True, "content": body}
        if endpoint.needs_token:
            operation["security"] = [{"token": []}]
        if endpoint.query:
            operation["parameters"] = [
                {"name": name, "in": "query", "description": about, "schema": {"type": kind}}
                for name, kind, about in endpoint.query
            ]
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "vixml_jax", "version": vixml_jax.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def page() -> str:
    """Returns the document as a page without scripts."""
    parts = []
    for endpoint in ENDPOINTS:
        token = " Needs a token." if endpoint.needs_token else ""
        parts.append(
            f"<h2>{endpoint.method} {endpoint.path}</h2>"
            f"<p>{html.escape(endpoint.summary)}{token}</p>"
        )
        operation = document()["paths"][endpoint.path][endpoint.method.lower()]
        shown = {key: operation[key] for key in ("parameters", "requestBody") if key in operation}
        if shown:
            parts.append(f"<pre>{html.escape(json.dumps(shown, indent=2))}</pre>")
    schemas = json.dumps(document()["components"]["schemas"], indent=2)
    parts.append(f"<h2>Schemas</h2><pre>{html.escape(schemas)}</pre>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vixml_jax API</title>'
        '<link rel="stylesheet" href="/static/style.css"></head><body><main><h1>API</h1>'
        '<p>As <a href="/openapi.json">OpenAPI</a>. <a href="/">Try a query</a>.</p>'
        f"{''.join(parts)}</main></body></html>"
    )
