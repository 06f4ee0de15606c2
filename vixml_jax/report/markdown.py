"""The data card's Markdown as HTML for the report.

CommonMark with tables. Raw HTML and links are shown as text. In place of an image stands the HTML
that the caller has for it, so that the page loads nothing.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import markdown_it
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

_DISABLED = ["autolink", "html_block", "html_inline", "link", "reference"]


def to_html(text: str, *, figures: Mapping[str, str], level: int = 3) -> str:
    """Returns the HTML of a Markdown text.

    Args:
      text: CommonMark, with tables.
      figures: HTML by file name of an image. It takes the place of a paragraph with that image
        alone; other images are left out.
      level: Level of top headings in the HTML, 1 to 6.
    """
    parser = markdown_it.MarkdownIt("commonmark", {"html": False, "xhtmlOut": False})
    parser.enable("table").disable(_DISABLED)
    parser.add_render_rule("image", lambda *_: "")
    parser.add_render_rule("figure", _render_figure)
    parser.add_render_rule("softbreak", lambda *_: " ")
    parser.add_render_rule("table_open", _render_table_open)
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = _with_figures(parser.parse(text))
    _shift_headings(tokens, level - 1)
    _keep_lines_of_lists(tokens)
    _mark_table_headings(tokens)
    return parser.renderer.render(tokens, parser.options, {"figures": figures})


def _with_figures(tokens: Sequence[Token]) -> list[Token]:
    """Returns the tokens with a figure for each paragraph that has only an image."""
    result: list[Token] = []
    for token in tokens:
        children = token.children or []
        if [child.type for child in children] == ["image"] and result[-1].type == "paragraph_open":
            result[-1] = Token("figure", "", 0, content=str(children[0].attrs["src"]))
        elif not (token.type == "paragraph_close" and result[-1].type == "figure"):
            result.append(token)
    return result


def _shift_headings(tokens: Sequence[Token], by: int) -> None:
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + by, 6)}"


def _keep_lines_of_lists(tokens: Sequence[Token]) -> None:
    """Turns line breaks in list items, where the card puts a query and its labels, into <br>."""
    depth = 0
    for token in tokens:
        depth += token.nesting if token.type.startswith("list_item") else 0
        if depth and token.children:
            for child in token.children:
                child.type = "hardbreak" if child.type == "softbreak" else child.type


def _mark_table_headings(tokens: Sequence[Token]) -> None:
    """Makes the first cell of each row a heading and names each table by the heading above it."""
    title, first = "table", False
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            title = tokens[i + 1].content
        elif token.type == "table_open":
            token.meta["title"] = title
        elif token.type == "tr_open":
            first = True
        elif token.type in ("th_open", "td_open"):
            token.attrs = {}  # Alignment is an inline style, which the report's policy blocks.
            if token.type == "th_open":
                token.attrs["scope"] = "col"
            elif first:
                token.tag, token.attrs["scope"] = "th", "row"
                tokens[i + 2].tag = "th"  # After the cell's text comes its closing token.
            first = False


def _render_figure(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any
) -> str:
    return env["figures"].get(tokens[index].content, "")


def _render_table_open(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any
) -> str:
    label = html.escape(tokens[index].meta["title"])
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>\n'
