"""The platform that programs are measured on, and whether PyTorch can use it."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from vixml_jax.errors import InputError


class Platform(NamedTuple):
    """The devices that JAX uses.

    Attributes:
      name: "cpu", "gpu" or "tpu".
      count: Number of devices.
      kind: `jax.Device.device_kind`.
    """

    name: str
    count: int
    kind: str


def describe() -> Platform:
    """The devices that JAX uses.

    Raises:
      InputError: If it finds none, with its reason.
    """
    ask = "import jax; d = jax.devices(); print(jax.default_backend(), len(d), d[0].device_kind)"
    name, count, kind = _say(ask).split(" ", 2)
    return Platform(name, int(count), kind)


def _say(program: str) -> str:
    """What a program prints, in a child process: this one is to hold no GPU memory and no TPU."""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if found.returncode:
        last = (found.stderr.strip().splitlines() or [f"status {found.returncode}"])[-1]
        raise InputError(f"no accelerator can be used: {last}")
    return found.stdout.strip().splitlines()[-1]


def why_no_torch(platform: str, modules: Sequence[str]) -> str:
    """Why PyTorch cannot be measured on a platform; empty if it can.

    Args:
      platform: `Platform.name`.
      modules: Python modules that the program imports.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if platform == "cpu":
        return ""
    if platform != "gpu":
        return f"there is no baseline for a {platform.upper()}"
    cuda = _say("import torch; print(torch.cuda.is_available())")
    return "" if cuda == "True" else "the installed torch finds no GPU"


def measurable(
    programs: Sequence[str],
    platform: str,
    baseline: str,
    modules: Sequence[str] = ("torch", "transformers"),
) -> list[str]:
    """The programs without those of PyTorch where they are not asked for or cannot run.

    Prints why they cannot.

    Args:
      programs: Names, those of PyTorch beginning with "torch".
      platform: `Platform.name`.
      baseline: "torch" or "none".
      modules: Python modules that PyTorch's programs import.
    """
    ours = [name for name in programs if not name.startswith("torch")]
    if baseline == "none":
        return ours
    if reason := why_no_torch(platform, modules):
        print(f"PyTorch is not measured: {reason}", flush=True)
        return ours
    return list(programs)
