"""What requests and responses of the service hold; bodies that differ are refused.

Structures are read from JSON by msgspec, whose messages name the field that is wrong. The OpenAPI
document (`openapi`) is made from them.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

MAX_K = 1000
_MAX_LIST = 1000  # Images, filters or examples of an item.

Image = Annotated[bytes, Meta(description="Content of an image file, in base64.")]
Embedding = Annotated[list[float], Meta(description="An image embedding.", min_length=1)]
K = Annotated[int, Meta(ge=1, le=MAX_K, description="Maximum number of labels per query.")]
Name = Annotated[str, Meta(min_length=1, description="Id of a label.")]


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A part of a request."""


class Query(_Body):
    """A query: a text, images, or both."""

    text: Annotated[str, Meta(description="Its text.")] = ""
    images: Annotated[list[Image], Meta(max_length=_MAX_LIST)] = []
    embeddings: Annotated[list[Embedding], Meta(max_length=_MAX_LIST)] = []
    never: Annotated[
        list[str], Meta(max_length=_MAX_LIST, description="Ids of labels not to be predicted.")
    ] = []


class PredictRequest(_Body):
    """Queries whose best labels are wanted."""

    queries: Annotated[list[Query], Meta(min_length=1)]
    k: K = 10
    min_score: Annotated[
        float | None, Meta(description="Labels with a lower score are left out.")
    ] = None
    timeout_s: (
        Annotated[float, Meta(gt=0, description="Seconds to wait, if the service allows as many.")]
        | None
    ) = None


class Label(msgspec.Struct, kw_only=True):
    """A label that was found."""

    id: str
    text: str
    score: float


class Result(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The labels of a query, best first."""

    labels: list[Label]
    note: Annotated[str, Meta(description="What was ignored of the query, and why.")] = ""


class PredictResponse(msgspec.Struct, kw_only=True):
    """A result for each query, in order."""

    results: list[Result]


class ExplainRequest(_Body):
    """A query whose labels are to be explained."""

    query: Query
    k: K = 10


class ExplainedLabel(Label, kw_only=True):
    """A label that was found, and the parts of its score."""

    prototype: Annotated[float, Meta(description="Part of the prototype in the logit, or cosine.")]
    head: Annotated[
        float | None,
        Meta(description="Part of head and frequency in the logit; null without a head."),
    ] = None
    neighbours: Annotated[
        float | None, Meta(description="What training neighbours add to the score.")
    ] = None


class NearQuery(msgspec.Struct, kw_only=True):
    """A training query near the query."""

    text: Annotated[str | None, Meta(description="Null where the data of the run are not there.")]
    similarity: Annotated[float, Meta(description="Cosine of both vectors.")]
    labels: list[str]


class ExplainResponse(msgspec.Struct, kw_only=True):
    """Why a query has its labels."""

    labels: list[ExplainedLabel]
    neighbours: list[NearQuery]
    note: Annotated[str, Meta(description="What was ignored of the query, and why.")] = ""


class NewLabel(_Body):
    """A label to be added."""

    id: Name
    text: Annotated[str, Meta(description="Its text.")] = ""
    images: Annotated[list[Image], Meta(max_length=_MAX_LIST)] = []
    embeddings: Annotated[list[Embedding], Meta(max_length=_MAX_LIST)] = []
    examples: Annotated[
        list[str],
        Meta(max_length=_MAX_LIST, description="Texts of queries that the label is relevant for."),
    ] = []


class AddRequest(_Body):
    """Labels to be added, all or none."""

    labels: Annotated[list[NewLabel], Meta(min_length=1)]


class RemoveRequest(_Body):
    """Labels to be removed, all or none."""

    ids: Annotated[list[Name], Meta(min_length=1)]


class Changed(msgspec.Struct, kw_only=True):
    """What became of the labels."""

    changed: Annotated[list[str], Meta(description="Ids of labels added, removed or put back.")]
    num_labels: Annotated[int, Meta(description="Labels that can be found now.")]


class ListedLabel(msgspec.Struct, kw_only=True):
    """A label of the run."""

    id: str
    text: str


class LabelList(msgspec.Struct, kw_only=True):
    """A page of the labels that can be found."""

    labels: list[ListedLabel]
    num_labels: Annotated[int, Meta(description="Labels that can be found.")]
    next: Annotated[int | None, Meta(description="Value of `after` for the next page.")] = None


class State(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Whether the service answers queries."""

    ready: bool
    workdir: str = ""
    step: int | None = None
    num_labels: int | None = None
    reason: str = ""


class Error(msgspec.Struct, kw_only=True):
    """Why a request was not answered."""

    error: str
