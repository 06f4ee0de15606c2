"""Text tables of results."""

from vixml_jax.report import tables


def test_table_is_aligned():
    rows = {
        "kNN, text": {"P@1": 42.0, "R@100": 100.0},
        "ours": {"P@1": 58.128, "MRR": 3.0, "R@100": 81.25, "seconds": 1.0},
    }
    assert tables.format_table(rows, ("P@1", "P@3", "R@100", "MRR")) == (
        "             P@1   R@100   MRR\n"
        "------------------------------\n"
        "kNN, text  42.00  100.00     -\n"
        "ours       58.13   81.25  3.00"
    )


def test_table_without_rows_is_an_empty_header():
    assert tables.format_table({}, ("P@1",)) == "\n"
