"""Long work says once how long it takes."""

import pytest

from vixml_jax.data import progress


@pytest.mark.parametrize("seconds,said", [
    ([0.5, 1.9], ""),
    ([0.5, 4.0, 9.0], "texts: 1,000 at 50 a second, about 16 s more\n"),
    ([4.0, 9.0], "texts: 1,000 at 25 a second, about 36 s more\n"),
])  # fmt: skip
def test_the_time_that_is_left_is_told_once(monkeypatch, capsys, seconds, said):
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress.watch("texts", 1000) as update:
        for _ in seconds:
            update(100)
    assert capsys.readouterr().out == said
