"""Compiled programs that outlive their process."""

import os
import subprocess
import sys

PROGRAM = """
import os, jax
from vixml_jax import programs
programs.keep_in(os.environ["WHERE"])
hits = []
jax.monitoring.register_event_listener(lambda event, **more: hits.append(event))
jax.jit(lambda x: x @ x)(jax.numpy.ones((4, 4)))
print(sum(event.endswith("cache_hits") for event in hits) > 0)
"""


def run(where, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"WHERE": where, "HOME": str(cwd), "PYTHONPATH": os.getcwd()},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_what_was_compiled_is_found_again(tmp_path):
    assert run("~/kept", tmp_path) == "False"
    assert os.listdir(tmp_path / "kept")
    assert run("~/kept", tmp_path) == "True"
    assert run("", tmp_path) == "False"
    assert os.listdir(tmp_path) == ["kept"]
