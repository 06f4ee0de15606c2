"""The Markdown that the data card is written in, as HTML: no more of it than the card uses."""

import html
import re
from collections.abc import Iterable, Mapping

_BAR = re.compile(r"(?<!\\)\|")
_CODE = re.compile(r"(?<!\\)`(.+?)(?<!\\)`")
_ESCAPED = re.compile(r"\\([\\`*\[\]<>|&~$_#+=.)-])")
_PICTURE = re.compile(r"!\[(.*)\]\((.*)\)")
_RULE = re.compile(r"[|:\- ]+")


def to_html(text: str, *, pictures: Mapping[str, str], level: int = 3) -> str:
    """Headings, paragraphs, lists, tables and pictures; everything else is text.

    Args:
      text: As `data/card.py` writes it.
      pictures: Data URIs by name of the file; a picture that is not there is left out.
      level: Of the first heading.
    """
    parts = []
    for block in re.split(r"\n{2,}", text.strip()):
        lines = block.split("\n")
        if heading := re.fullmatch(r"(#+) (.*)", block):
            depth = min(level + len(heading[1]) - 1, 6)
            parts.append(f"<h{depth}>{_inline(heading[2])}</h{depth}>")
        elif picture := _PICTURE.fullmatch(block):
            if source := pictures.get(picture[2]):
                parts.append(f'<img src="{source}" alt="{html.escape(picture[1])}">')
        elif all(line.startswith("|") for line in lines):
            parts.append(_table(lines))
        elif block.startswith("- "):
            items = re.split(r"\n- ", "\n" + block)[1:]
            parts.append(f"<ul>{''.join(f'<li>{_lines(item)}</li>' for item in items)}</ul>")
        else:
            parts.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "\n".join(parts)


def table(header: Iterable[str], rows: Iterable[Iterable[str]], *, label: str) -> str:
    """A table in a box of its own that scrolls; the first cell of a row is its heading.

    Args:
      header, rows: HTML of the cells.
      label: Text that names the box.
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _table(lines: list[str]) -> str:
    rows = [
        [_inline(cell.strip()) for cell in _BAR.split(line)[1:-1]]
        for line in lines
        if not _RULE.fullmatch(line)
    ]
    return table(rows[0], rows[1:], label="table")


def _lines(text: str) -> str:
    return "<br>".join(_inline(line.strip()) for line in text.split("\n"))


def _inline(text: str) -> str:
    """Spans of code and all else, what is escaped as it is."""
    parts = _CODE.split(text)  # Every other one was between backticks.
    return "".join(
        f"<code>{html.escape(part)}</code>" if i % 2 else html.escape(_ESCAPED.sub(r"\1", part))
        for i, part in enumerate(parts)
    )
