"""The command for accelerators: its parts at tiny sizes on a CPU, its files, and its failures."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from vixml_jax.benchmarks.accelerator import __main__ as accelerator
from vixml_jax.benchmarks.accelerator import doctor, parity, parts, results, searching
from vixml_jax.benchmarks.accelerator.results import Row
from vixml_jax.benchmarks.support import platforms, workers
from vixml_jax.config import LossConfig
from vixml_jax.errors import InputError
from vixml_jax.search.exact import ExactIndex

TINY = {"size": "tiny", "data": "glyphs", "device": "cpu", "threads": 1}


def checked(rows):
    """The verdicts of the rows that have one, by what they check."""
    return {row.what: row.passed for row in rows if row.passed is not None}


def test_doctor_names_versions_and_devices():
    rows = {row.what: row for row in doctor.examine(TINY)}
    assert f"jax {jax.__version__}" in rows["versions"].value
    assert rows["devices"].value == f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    assert set(checked(rows.values()).values()) == {True}


def test_search_is_that_of_numpy(monkeypatch):
    assert set(checked(searching.check(TINY)).values()) == {True}
    labels = np.random.default_rng(0).standard_normal((50, 4), np.float32)
    best = searching.best_scores(labels, labels[:9], 3)
    np.testing.assert_allclose(best, -np.sort(-(labels[:9] @ labels.T))[:, :3], atol=1e-6)
    search = ExactIndex.search

    def second_best(self, queries, k):
        found = search(self, queries, k + 1)
        return found._replace(ids=found.ids[:, 1:])

    monkeypatch.setattr(ExactIndex, "search", second_best)
    wrong = checked(searching.check(TINY))
    assert not any(passed for what, passed in wrong.items() if "score lost" in what)


@pytest.fixture(scope="module")
def case():
    return parity.make_case("MiniLM", "tiny")


def test_parity_reads_gradients_of_the_step(case):
    """Along the gradient that is read, the loss falls as it should."""
    loss = LossConfig(kind="softmax")
    found = parity.step(case, loss, jax.devices()[0])
    assert {name.split("/")[0] for name in found.gradient} == {"tower", "combiner", "free"}
    norm = np.sqrt(sum(np.sum(x**2) for x in found.gradient.values()))
    trained, *rest = case.weights
    direction = jax.tree_util.tree_map_with_path(
        lambda path, x: found.gradient[parity.sharding.path_name(path)] / norm, trained
    )

    def moved(distance):
        weights = jax.tree.map(lambda x, d: np.float32(x + distance * d), trained, direction)
        return parity.step(case._replace(weights=(weights, *rest)), loss, jax.devices()[0]).loss

    assert (moved(1e-2) - moved(-1e-2)) / 2e-2 == pytest.approx(norm, rel=2e-2)


def test_parity_finds_differences(case):
    loss = LossConfig(kind="softmax")
    reference = parity.step(case, loss, jax.devices()[0])
    assert max(parity.errors(reference, reference).values()) == 0
    half = case._replace(tower=dataclasses.replace(case.tower, dtype="bfloat16"))
    rounded = parity.step(half, loss, jax.devices()[0])
    lost = parity.errors(rounded, reference)
    assert all(parity.EXACT < lost[name] < limit for name, limit in parity.COARSE.items())
    # Items that see one another, as with a wrong mask.
    segments = case.batch.items.segments
    mixed = np.where(segments % 2 == 1, segments - 1, segments)
    items = case.batch.items._replace(segments=mixed)
    other = parity.step(
        case._replace(batch=case.batch._replace(items=items)), loss, jax.devices()[0]
    )
    assert parity.errors(other, reference)["vectors"] > parity.COARSE["vectors"]


def test_rows_of_padding_alone_are_half_of_the_rows(case):
    segments = case.batch.items.segments
    assert np.count_nonzero((segments < 0).all(axis=1)) >= len(segments) // 2
    empty = parity.make_batch(case.layout, segments.shape[1], empty=True)
    assert (empty.items.segments < 0).all() and (empty.query_ids < 0).all()
    found = parity.step(case._replace(batch=empty), LossConfig(kind="softmax"), jax.devices()[0])
    assert found.loss == 0 and all((x == 0).all() for x in found.gradient.values())


@pytest.mark.parametrize("allowed", [True, False])
def test_fused_attention_can_be_turned_off(allowed):
    x = np.ones((1, 4, 2, 8), np.float32)
    with parity.fused_attention(allowed=allowed) as asked:
        jax.nn.dot_product_attention(x, x, x, implementation=None)
    assert asked == [None if allowed else "xla"]
    jax.nn.dot_product_attention(x, x, x)
    assert len(asked) == 1


class Instant:
    """A worker whose programs take one second of ours and three of PyTorch's."""

    def __init__(self, module, programs, settings, threads):
        about = {"flops": 2e14, "device": "NVIDIA H100 80GB HBM3", "first_s": 9.0}
        counts = {"texts": 60, "images": 60, "queries": 60}
        self.about = {name: {**about, **counts} for name in programs}

    def time(self, program):
        seconds = 3.0 if program.startswith("torch") else 1.0
        return {"seconds": seconds, "bytes": 2**31, "planned": 2**32, "loss": 1.0}

    def close(self):
        pass


def test_rows_of_speeds(monkeypatch):
    monkeypatch.setattr(workers, "Worker", Instant)
    rows = {row.what: row for row in parts.train_decoder({**TINY, "size": "full"})}
    assert rows["ours, all of 32: texts/s"].value == 60
    assert rows["speed, ours, all of 32 : torch, all of 32"].value == 3
    assert rows["speed, ours, all of 32 : torch, all of 32"].wanted == "goal: 1.5"
    assert rows["ours, all of 32: model FLOPs utilisation, %"].value == pytest.approx(20.2, abs=0.1)
    assert rows["ours: peak memory of the device, GiB"].value == 2
    assert rows["ours: peak memory of the device, GiB"].wanted == "4.00 planned"
    monkeypatch.setattr(platforms, "why_no_torch", lambda *_: "torch not installed")
    for part in (parts.encode, parts.siglip, parts.head, parts.train_minilm):
        rows = part({**TINY, "size": "full"})
        assert rows[0] == Row("PyTorch is not measured", "torch not installed")
        assert not any("torch," in row.what or "torch:" in row.what for row in rows)


def fine(settings):
    return [results.at_most("an error", 0.5, 1.0), Row("with | a bar", "two\nlines")]


def test_files_and_errors(tmp_path):
    about = {"size": "tiny"}
    gathered = results.open_results(str(tmp_path), about)
    gathered.parts["one"] = results.Part("done", 2.0, fine({}), "", "one.log")
    gathered.parts["two"] = results.Part("failed", 1.0, [], "it broke", "two.log")
    results.write(str(tmp_path), gathered)
    assert results.open_results(str(tmp_path), about) == gathered
    table = (tmp_path / results.TABLE).read_text()
    assert "| one | an error | 0.5 | at most 1 | ok |" in table
    assert "| one | with \\| a bar | two lines |  |  |" in table
    assert "- two failed: it broke (see two.log)" in table
    with pytest.raises(InputError, match="size 'tiny', not 'full'"):
        results.open_results(str(tmp_path), {"size": "full"})
    assert results.at_most("x", float("nan"), 1.0).passed is False
    assert results.failed_checks([*fine({}), results.is_true("it holds", False)]) == (
        "it holds: no (yes)"
    )


def test_the_error_of_a_part_is_that_of_its_first_traceback():
    said = [
        "starting", "Traceback (most recent call last):", '  File "x.py", line 1', "    f()",
        "RuntimeError: no memory", "During handling:", "Traceback (most recent call last):",
        "KeyError: 1",
    ]  # fmt: skip
    assert accelerator.error_line(said) == "RuntimeError: no memory"
    assert accelerator.error_line(["one", "Killed", ""]) == "Killed"
    assert accelerator.error_line([]) == ""


def test_parts_that_failed_are_run_again(tmp_path, monkeypatch, capsys):
    """A part that fails, and one that hangs, end none of the others; a second call completes."""
    program = tmp_path / "part.py"
    program.write_text(
        "import json, os, sys, time\n"
        "name, repaired = sys.argv[2], os.path.exists(os.environ['REPAIRED'])\n"
        "if name == 'search' and not repaired: raise ValueError('wrong')\n"
        "if name == 'head' and not repaired: time.sleep(60)\n"
        "print(json.dumps({'rows': [{'what': name, 'value': 1.0}]}, separators=(',', ':')))\n"
    )
    repaired = tmp_path / "repaired"
    monkeypatch.setenv("REPAIRED", str(repaired))
    popen = subprocess.Popen

    def start(command, **kwargs):
        return popen([sys.executable, str(program), *command[3:]], **kwargs)

    found = platforms.Platform("cpu", 1, "cpu")
    monkeypatch.setattr(platforms, "describe", lambda: found)
    monkeypatch.setattr(accelerator.subprocess, "Popen", start)
    accelerator.define_flags()
    flags.FLAGS.mark_as_parsed()
    out, names = str(tmp_path / "out"), ["head", "search", "doctor"]
    with flagsaver.flagsaver(out=out, size="tiny", parts=names, timeout_s=2.0):
        with pytest.raises(SystemExit) as stop:
            accelerator.main([])
        assert stop.value.code == 1
        with open(os.path.join(out, results.JSON), encoding="utf-8") as file:
            written = json.load(file)["parts"]
        assert list(written) == ["doctor", "search", "head"]
        assert [written[name]["state"] for name in written] == ["done", "failed", "failed"]
        assert written["search"]["error"] == "ValueError: wrong"
        assert written["head"]["error"] == "did not end within 2 s"
        repaired.touch()
        capsys.readouterr()
        accelerator.main([])
        printed = capsys.readouterr().out
        assert "doctor: done before" in printed and "FAILED" not in printed
        with pytest.raises(InputError, match="--parts=nothing"):
            flags.FLAGS.parts = ["nothing"]
            accelerator.main([])


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "vixml_jax.benchmarks.accelerator", "--size=tiny"]
    one_device = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, f"--out={tmp_path}"], env=one_device, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / results.JSON).read_text())
    assert list(content["parts"]) == list(parts.PARTS)
    resumed = {row["what"]: row for row in content["parts"]["quickstart"]["rows"]}
    assert resumed["bits of the final state as in an undisturbed run"]["passed"]
