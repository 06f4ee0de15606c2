"""ViXML (https://arxiv.org/abs/2511.13189) in JAX: queries to the few right of millions of labels.

from vixml_jax import Predictor
predictor = Predictor.load("runs/mine")
predictor(["a query"], k=5)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vixml_jax.serving.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    """Loads JAX when it is asked for, not wherever a module of this package is imported."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vixml_jax.serving.predictor import Predictor

    return Predictor
