"""Control characters in texts: they reach neither a terminal nor the report."""

import html.parser
import io
import sys

import numpy as np
import pytest

from tests.tiny import run_command
from vixml_jax.report import render
from vixml_jax.runtime import console

CONTROLS = [chr(n) for n in range(32) if chr(n) not in "\t\n\r"] + [
    *map(chr, range(0x7F, 0xA0)),
    *"\u202a\u202e\u2066\u2069",
]


def random_texts(count):
    rng = np.random.default_rng(5)
    alphabet = np.array([*"ab<>&\"'\t\n é漢🙂", *CONTROLS])
    for _ in range(count):
        yield "".join(rng.choice(alphabet, rng.integers(1, 40)))


def test_what_is_printed_has_no_control_characters(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", write_through=True))
    console.guard_output()
    for text in random_texts(50):
        print(text)
    sys.stdout.flush()
    printed = written.getvalue().decode("utf-8")
    assert not set(printed) & set(CONTROLS)
    assert "\\x1b" in printed and "漢" in printed and "🙂" in printed


def test_texts_without_control_characters_stay_as_they_are():
    for text in ("é漢🙂\t\n", "שלום\u200f", "a\\x1b"):
        assert console.printable(text) == text


class Contents(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("template", ["<p>{{ text }}</p>", "<p title='{{ text }}'>x</p>"])
def test_the_templates_of_the_report_escape_and_replace(template):
    for text in random_texts(100):
        page = render.environment().from_string(template).render(text=text)
        parser = Contents()
        parser.feed(page)
        assert parser.tags == ["p"] and not set(page) & set(CONTROLS)
        if "title" not in template:
            assert "".join(parser.texts) == console.printable(text)


def test_markup_stays_markup():
    import markupsafe

    page = (
        render.environment()
        .from_string("{{ a }}{{ b }}")
        .render(a=markupsafe.Markup("<b>\x1b</b>"), b="<i>")
    )
    assert page == "<b>\\x1b</b>&lt;i&gt;"


def test_a_carriage_return_does_not_overwrite_a_line():
    assert console.printable("good\rbad\r\nnext\r") == "good\\rbad\r\nnext\\r"


def test_the_data_card_has_no_control_characters():
    from vixml_jax.data.card import card

    for text in random_texts(200):
        line = card.escape(text, 30)
        assert not set(line) & set(CONTROLS) and "\n" not in line and "\r" not in line
    assert card.escape("ab\u202ecd") == "ab\\\\u202ecd"  # A backslash, escaped for Markdown.


def test_messages_of_errors_have_no_control_characters(tmp_path):
    """An id of the data, in the error of a command."""
    source = tmp_path / "queries.csv"
    bad = "x\u202e\x1b[31m\x9b\u2066y"
    rows = f"id,text,labels\n{bad},a,b\n{bad},b,c\n"
    source.write_text(rows, encoding="utf-8")
    error = run_command(
        "prepare", f"--source={source}", f"--out={tmp_path / 'out'}", "--dry_run", status=2
    )
    assert "is already used in" in error and "\\u202e" in error
    assert not set(error) & set(CONTROLS)
