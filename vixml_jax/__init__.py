"""Extreme multi-label classification with text and images in JAX (ViXML, arXiv 2511.13189).

from vixml_jax import Predictor
predictor = Predictor.load("runs/mine")
predictor(["a query"], k=5)
"""

import sys
from typing import TYPE_CHECKING, Any

_command = sys.orig_argv[-len(sys.argv) :]  # The module after -m, and its arguments.
if sys.argv[:1] == ["-m"] and "vixml_jax" in _command[0]:
    # Python is about to import a command, which takes seconds.
    from vixml_jax.runtime import signals

    signals.end_at_once(
        resumable=_command[0].endswith("vixml_jax.train") or _command[:2] == ["vixml_jax", "train"]
    )

if TYPE_CHECKING:
    from vixml_jax.serving.predictor import Predictor

__version__ = "0.5.0"

__all__ = ["Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports `Predictor`, and JAX with it, on first use."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vixml_jax.serving.predictor import Predictor

    return Predictor
