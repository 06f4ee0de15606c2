"""Reports as a single HTML file, which loads nothing from the network and has no script."""

import base64
import functools
import hashlib
import importlib.resources
from collections.abc import Sequence
from typing import Any

import jinja2

from vixml_jax.report import sections, svg
from vixml_jax.report.page import Page
from vixml_jax.report.sections import Section
from vixml_jax.runtime import console


def render(page: Page) -> str:
    """Returns the HTML of the report of an evaluation."""
    return document(
        f"{page.dataset}, {page.split}", sections.summary(page), sections.all_sections(page)
    )


def document(title: str, summary: str, shown: Sequence[Section]) -> str:
    """Returns a page as HTML.

    Args:
      title: Title and main heading of the page.
      summary: What the page shows, in a few sentences.
      shown: Its sections.
    """
    templates = environment()
    written = [
        {
            "title": section.title,
            "anchor": section.title.lower().replace(" ", "-"),
            "html": templates.get_template(section.template).render(section.data),
        }
        for section in shown
    ]
    style = stylesheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return templates.get_template("page.html.j2").render(
        title=title,
        summary=summary,
        sections=written,
        policy=policy,
        style=style,
        patterns=svg.patterns(),
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Returns the templates, which escape all text unless it is marked as safe."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("vixml_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["figure"] = _figure
    templates.filters["interval"] = "[{0[0]:.2f}, {0[1]:.2f}]".format
    return templates


def _finalize(value: Any) -> Any:
    """Returns a value without control characters, which HTML does not allow."""
    return type(value)(console.printable(value)) if isinstance(value, str) else value


def stylesheet() -> str:
    """Returns the style sheet of the report."""
    path = importlib.resources.files("vixml_jax.report") / "templates" / "style.css"
    return path.read_text(encoding="utf-8")


def _figure(value: Any) -> str:
    """Returns a number as shown: integers with separators, floats with two decimals."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value
