"""Compiled programs are reused by later processes."""

import os
import subprocess
import sys

PROGRAM = """
import os, jax
from vixml_jax.runtime import compilation_cache
compilation_cache.enable(os.environ["CACHE"])
events = []
jax.monitoring.register_event_listener(lambda event, **kwargs: events.append(event))
jax.jit(lambda x: x @ x)(jax.numpy.ones((4, 4)))
print(sum(event.endswith("cache_hits") for event in events) > 0)
"""


def hits_cache(directory, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"CACHE": directory, "HOME": str(cwd), "PYTHONPATH": os.getcwd()},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_second_process_hits_the_cache(tmp_path):
    assert hits_cache("~/cache", tmp_path) == "False"
    assert os.listdir(tmp_path / "cache")
    assert hits_cache("~/cache", tmp_path) == "True"
    assert hits_cache("", tmp_path) == "False"
    assert os.listdir(tmp_path) == ["cache"]
