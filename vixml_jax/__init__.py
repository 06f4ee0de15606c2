"""Extreme multi-label classification with text and images in JAX (ViXML, arXiv 2511.13189).

from vixml_jax import Predictor
predictor = Predictor.load("runs/mine")
predictor(["a query"], k=5)
"""

import signal
import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"]:  # A command is about to be imported: Ctrl-C ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
