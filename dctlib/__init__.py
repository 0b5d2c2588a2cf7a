"""Deep causal transcoding: find the steering vectors that unlock what a language model hides."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dctlib.causal_map import CausalMap, FunctionMap
    from dctlib.fit import fit_exponential, fit_linear, fit_quadratic
    from dctlib.input_scale import calibrate
    from dctlib.intervene import ablate, steer
    from dctlib.models import load_model
    from dctlib.prompts import format_chat
    from dctlib.rank import score_vectors
    from dctlib.transcoder import Transcoder

__all__ = [
    "CausalMap",
    "FunctionMap",
    "Transcoder",
    "ablate",
    "calibrate",
    "fit_exponential",
    "fit_linear",
    "fit_quadratic",
    "format_chat",
    "load_model",
    "score_vectors",
    "steer",
]

_DEFINED_IN = {
    "CausalMap": "causal_map",
    "FunctionMap": "causal_map",
    "Transcoder": "transcoder",
    "ablate": "intervene",
    "calibrate": "input_scale",
    "fit_exponential": "fit",
    "fit_linear": "fit",
    "fit_quadratic": "fit",
    "format_chat": "prompts",
    "load_model": "models",
    "score_vectors": "rank",
    "steer": "intervene",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the command line does without torch, which takes seconds."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'dctlib' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"dctlib.{_DEFINED_IN[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
