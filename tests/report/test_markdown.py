"""The card's Markdown as HTML."""

import html.parser

from hypothesis import given, settings
from hypothesis import strategies as st

from vixml_jax.data.card import card
from vixml_jax.report import markdown


class Reader(html.parser.HTMLParser):
    """Tags in order, checked to be closed as they are opened, and texts."""

    VOID = ("img", "br", "meta")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def test_all_kinds_of_blocks():
    text = (
        "# name\n\nA line\nand `--flag=1`.\n\n![In pictures](a.png)\n\n![No](b.png)\n\n## Part\n\n"
        "| x   | n |\n| --- | -: |\n| a\\|b | 1 |\n\n- one\n  → two\n- three\n"
    )
    found = markdown.to_html(text, pictures={"a.png": "data:image/png;base64,AA=="})
    assert "<h3>name</h3>" in found and "<h4>Part</h4>" in found
    assert "<p>A line and <code>--flag=1</code>.</p>" in found
    assert found.count("<img") == 1 and 'alt="In pictures"' in found
    assert '<th scope="row">a|b</th><td>1</td>' in found
    assert "<ul><li>one<br>→ two</li><li>three</li></ul>" in found
    read(found)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_what_the_card_escapes_is_read_as_it_was(text):
    """In a heading, a paragraph, an item and a cell; without its white space and controls."""
    escaped = card.escape(text)
    plain = " ".join(card.escape("x" + text).split())  # What one line of it is, behind a letter.
    if not escaped:
        return
    for block in (f"# x{plain[1:]}", f"- x{plain[1:]}", f"| x{plain[1:]} | 2 |\n| - | -: |"):
        reader = read(markdown.to_html(block, pictures={}))
        assert not {"script", "img", "code", "a"} & set(reader.tags)
    reader = read(markdown.to_html(f"- {escaped}", pictures={}))
    shown = " ".join("".join(reader.texts).split())
    expected = "".join(" " if card.unicodedata.category(c) == "Cc" else c for c in text)
    assert shown == " ".join(expected.split())


def test_tables_name_their_rows_and_columns():
    reader = read(markdown.table(["", "a"], [["<b>x</b>", "1"]], label='of "x"'))
    scopes = [attrs.get("scope") for tag, attrs in reader.attributes if tag == "th"]
    assert scopes == ["col", "col", "row"]
    box = {"class": "scroll", "role": "region", "tabindex": "0", "aria-label": 'of "x"'}
    assert ("div", box) in reader.attributes
