"""Lists written as text: what JSON, Python and numpy write is read back; nothing else is a list."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from vixml_jax.data.sources import list_text

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(st.lists(WORDS, max_size=40))
def test_lists_of_texts_are_read_back(words):
    written = [json.dumps(words), str(words), repr(tuple(words))]
    written += [str(np.array(words, object)), repr(np.array(words, object))]
    written += [f"[{', '.join(f'np.str_({word!r})' for word in words)}]"]  # Of numpy 2.
    for text in written:
        assert list_text.parse(text) == words, text
    if words:
        assert sorted(list_text.parse(str(set(words)))) == sorted(set(words))


@hypothesis.settings(max_examples=100, deadline=None, database=None)
@hypothesis.given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), st.integers(1, 3)
)
def test_arrays_of_numbers_are_read_back(numbers, rows):
    array = np.array([numbers] * rows, np.float32)
    array = array[0] if rows == 1 else array
    for text in (str(array), repr(array), str(array.tolist()), json.dumps(array.tolist())):
        read = np.array(list_text.parse(text), np.float32)
        assert read.shape == array.shape
        np.testing.assert_allclose(read, array, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "text,expected",
    [
        ("[]", []),
        (" [ ] ", []),
        ("set()", []),
        ("()", []),
        ("['a',]", ["a"]),
        ("[1 2\n 3]", [1, 2, 3]),
        ("[None, 'x', True]", [None, "x", True]),
        ("[['a', 'b'], ['c']]", [["a", "b"], ["c"]]),
        ("frozenset({'a'})", ["a"]),
        ("['it\\'s', \"it's\"]", ["it's", "it's"]),
    ],
)
def test_other_lists(text, expected):
    assert list_text.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[Deluxe Edition]", "[a, b]", "['a', 'b' 'c']", "['it''s']", "['a'", "['a']]", "[,]",
        "['a'] b", "[12] Monkeys", "(limited) edition", "(2020)", "{red,blue}", "{'a': 1}",
        "[print('x')]", "[__import__('os')]", "a", "", "nan", "[b'a']", "[" * 100_000, "{", "(",
        "array([", "['a' , , 'b']", "['a' 'b', 'c']", '{"a": 1}', "[0x10]", "[1_000]",
    ],
)  # fmt: skip
def test_what_is_not_a_list(text):
    assert list_text.parse(text) is None


@pytest.mark.parametrize(
    "text", [str(np.arange(2000)), str(np.array([f"w{n}" for n in range(2000)])), "['a', ..., 'b']"]
)
def test_shortened_lists_are_refused(text):
    with pytest.raises(list_text.ShortenedError, match="shortened"):
        list_text.parse(text)
