"""The data card's Markdown as HTML, and tables of the report."""

import html.parser

from hypothesis import given, settings
from hypothesis import strategies as st

from vixml_jax.data.card import card
from vixml_jax.report import markdown, render


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and texts, and checks that tags are properly nested."""

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


def test_headings_paragraphs_images_tables_and_lists():
    text = (
        "# name\n\nA line\nand `--flag=1`.\n\n![In images](a.png)\n\n![No](b.png)\n\n## Part\n\n"
        "| x   | n |\n| --- | -: |\n| a\\|b | 1 |\n\n- one\n  → two\n- three\n"
    )
    found = markdown.to_html(text, figures={"a.png": "<div><figure>1</figure></div>"})
    read(found)
    found = found.replace("\n", "")
    assert "<h3>name</h3>" in found and "<h4>Part</h4>" in found
    assert "<p>A line and <code>--flag=1</code>.</p>" in found
    assert "</p><div><figure>1</figure></div><h4>" in found and "<img" not in found
    assert '<th scope="row">a|b</th><td>1</td>' in found
    assert (
        'aria-label="Part"><table><thead><tr><th scope="col">x</th><th scope="col">n</th>' in found
    )
    assert "<ul><li>one<br>→ two</li><li>three</li></ul>" in found


def test_raw_html_and_links_are_shown_as_text():
    text = (
        "<script>alert(1)</script>\n\n<b>bold</b> [link](http://example.com) <http://example.com>\n\n"
        "[ref]: http://example.com\n\n![x](http://example.com/x.png)\n"
    )
    found = markdown.to_html(text, figures={"a.png": "<b>figure</b>"})
    reader = read(found)
    assert set(reader.tags) == {"p"} and not any(attributes for _, attributes in reader.attributes)
    shown = "".join(reader.texts)
    for part in (
        "<script>alert(1)</script>",
        "<b>bold</b>",
        "[link](http://example.com)",
        "[ref]:",
    ):
        assert part in shown


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_escaped_text_of_the_card_is_shown_verbatim(text):
    """In headings, list items and table cells, up to white space and control characters."""
    escaped = card.escape(text)
    plain = " ".join(card.escape("x" + text).split())  # One line that starts with a letter.
    if not escaped:
        return
    for block in (f"# x{plain[1:]}", f"- x{plain[1:]}", f"| x{plain[1:]} | 2 |\n| - | -: |"):
        reader = read(markdown.to_html(block, figures={}))
        assert not {"script", "img", "code", "a"} & set(reader.tags)
    reader = read(markdown.to_html(f"- {escaped}", figures={}))
    shown = " ".join("".join(reader.texts).split())
    expected = "".join(" " if card.unicodedata.category(c) == "Cc" else c for c in text)
    assert shown == " ".join(expected.split())


def test_tables_have_row_and_column_headings():
    macros = render.environment().get_template("macros.html.j2").module
    reader = read(macros.table('of "x"', ["", "a"], [["<b>x</b>", "1"]]))
    assert "<b>x</b>" in reader.texts
    scopes = [attrs.get("scope") for tag, attrs in reader.attributes if tag == "th"]
    assert scopes == ["col", "col", "row"]
    box = {"class": "scroll", "role": "region", "tabindex": "0", "aria-label": 'of "x"'}
    assert ("div", box) in reader.attributes
