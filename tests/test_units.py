"""GB is 10^9 bytes and GiB 2^30 bytes, wherever a size is shown: read from the source."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "vixml_jax"
BINARY = re.compile(r"\b2 ?\*\* ?[234]0\b|(<<|>>) ?[234]0\b|\b_?[KMG]IB\b")
DECIMAL = re.compile(r"\b1e-?(6|9|12)\b|\b10 ?\*\* ?(6|9|12)\b")
BINARY_UNIT = re.compile(r"(\b|_)([KMGT]iB|[kmgt]ib)\b")
# A rate of a network, such as 50 GB/s, is decimal by convention too.
DECIMAL_UNIT = re.compile(r"(\b|_)([kKMGT]B|[kmgt]b)\b")


def mixed(source):
    """Lines of the simple statements that divide by one unit and name the other."""
    lines = source.encode().splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            text = b"\n".join(lines[node.lineno - 1 : node.end_lineno])
            last = len(lines[node.end_lineno - 1]) - node.end_col_offset  # Bytes of a comment.
            text = text[: len(text) - last].decode()
            binary, decimal = BINARY.search(text), DECIMAL.search(text)
            if binary and not decimal and DECIMAL_UNIT.search(text):
                yield node.lineno
            if decimal and not binary and BINARY_UNIT.search(text):
                yield node.lineno


@pytest.mark.parametrize(
    "source,wrong",
    [
        ('x = f"{n / 2**30:.1f} GB"', True),
        ('x = f"{n / 2**30:.1f} GiB"', False),
        ('x = f"{n / 1e9:.1f} GB"', False),
        ('x = f"{n / 1e9:.1f} GiB"', True),
        ('x = {"peak_gb": n / 2**30}', True),
        ('x = {"peak_gib": n / 2**30}', False),
        ("limit = memory_gb * 2**30", True),
        ("limit = memory_gb * 1e9", False),
        ('x = f"{n >> 20} MB"', True),
        ('x = f"{n / GIB:.1f} GB"', True),
        ('if a:\n    print(f"{n / 2**20} MB")', True),
    ],
)
def test_mixed_units_are_found(source, wrong):
    assert bool(list(mixed(source))) == wrong


def test_units_are_not_mixed():
    found = [
        f"{path.relative_to(ROOT)}, line {line}"
        for path in sorted(ROOT.rglob("*.py"))
        for line in mixed(path.read_text(encoding="utf-8"))
    ]
    assert not found, "GB is 1e9 bytes, GiB is 2**30 bytes: " + "; ".join(found)
