"""Extreme multi-label classification with text and images in JAX (ViXML, arXiv 2511.13189).

from vixml_jax import Predictor
predictor = Predictor.load("runs/mine")
predictor(["a query"], k=5)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vixml_jax.serving.predictor import Predictor

__version__ = "0.4.0"

__all__ = ["Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports `Predictor`, and JAX with it, on first use."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vixml_jax.serving.predictor import Predictor

    return Predictor
