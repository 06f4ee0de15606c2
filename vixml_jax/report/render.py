"""The report: one page of HTML on an evaluation, which needs no network and no script."""

import base64
import hashlib

from vixml_jax.report import sections, svg
from vixml_jax.report.page import Page
from vixml_jax.report.sections import escape
from vixml_jax.report.style import style

_SECTIONS = {
    "Metrics": sections.metrics,
    "By label frequency": sections.by_frequency,
    "By query": sections.by_query,
    "Learning curves": sections.curves,
    "Recall and speed of the index": sections.recall_curve,
    "Queries": sections.examples,
    "Label neighbours": sections.neighbours,
    "Data": sections.card,
    "How this was made": sections.made,
}


def render(page: Page) -> str:
    """The whole file."""
    written = {title: section(page) for title, section in _SECTIONS.items()}
    written = {title: body for title, body in written.items() if body}
    links = "".join(
        f'<li><a href="#{_anchor(title)}">{escape(title)}</a></li>' for title in written
    )
    bodies = "".join(
        f'<section aria-labelledby="{_anchor(title)}"><h2 id="{_anchor(title)}">{escape(title)}'
        f"</h2>{body}</section>"
        for title, body in written.items()
    )
    title = f"{page.dataset}, {page.split}"
    sheet = style()
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{sheet}</style></head><body>{svg.patterns()}"
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="muted">{page.queries:,} queries, {page.labels:,} labels, '
        f"{escape(page.search)} search. Values in percent; in brackets, 95 % intervals of the "
        f'bootstrap over queries.</p><nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{bodies}</main></body></html>\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
