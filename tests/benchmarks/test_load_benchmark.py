"""The loading benchmark on a tiny checkpoint, and what it measures on known memory."""

import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from vixml_jax.benchmarks import load
from vixml_jax.models import hf_checkpoints

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(load, "QWEN", load.QWEN | SMALL)
    monkeypatch.setattr(load, "PART", 20_000)


def test_a_checkpoint_in_parts_that_loads(tmp_path):
    sizes = load.write_checkpoint(str(tmp_path), 1e-4)
    parts = list(tmp_path.glob("*.safetensors"))
    assert len(parts) > 1 and 8e4 < 2 * sum(sizes) < 1.2e5
    config, params = hf_checkpoints.load_hf_tower(str(tmp_path), dtype="bfloat16")
    assert config.num_layers > 1 and max(sizes) == 64 * 32
    words = np.asarray(params["word_embeddings"], np.float32)
    assert 0.015 < words.std() < 0.025


@pytest.mark.parametrize("program", ["ours, 8 devices", load.BASELINE])
def test_a_round(program, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # Left alone otherwise: jax is awake already.
    load.write_checkpoint(str(tmp_path), 1e-4)
    settings = {"path": str(tmp_path), "dtype": "float32", "threads": 1}
    _, run = load.prepare([program], settings)[program]
    assert run() == {}


def test_prints_a_line_for_each_program(capfd):
    load.define_flags()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(gigabytes=1e-4, devices=["1", "2"], baseline="none", rounds=1):
        load.main([])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["ours, 1 device", "ours, 2 devices"]


def test_peak_memory_of_another_process():
    script = "input(); x = bytearray(3 * 10**8); del x; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        with load.PeakMemory(process.pid) as memory:
            print(file=process.stdin, flush=True)
            process.stdout.readline()
        print(file=process.stdin, flush=True)
    assert 2.5e8 < memory.own < 4e8 and memory.files < 5e7
