"""Long work says how long it takes."""

import pytest

from vixml_jax.data import progress


@pytest.mark.parametrize("seconds,said", [
    ([0.5, 1.9, 4.9], ""),
    ([3.0, 4.0, 7.0, 60.0], "texts: 1,000 at 50 a second, about 14 s more\n"),
    ([3.0, 7.0, 60.0, 67.0], "texts: 1,000 at 25 a second, about 32 s more\n"
                             "texts: 1,000 at 3 a second, about 180 s more\n"),
    ([9.0], ""),  # What is done in one piece has no speed yet.
])  # fmt: skip
def test_the_time_that_is_left_is_told(monkeypatch, capsys, seconds, said):
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress.watch("texts", 1000) as update:
        for _ in seconds:
            update(100)
    assert capsys.readouterr().out == said
