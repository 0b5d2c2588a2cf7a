"""Deep causal transcoding: find the steering vectors that unlock what a language model hides."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dctlib.fits.calibration import calibrate
    from dctlib.fits.solvers import fit_exponential, fit_linear, fit_quadratic
    from dctlib.fits.transcoder import Transcoder
    from dctlib.maps.causal import CausalMap
    from dctlib.maps.function import FunctionMap
    from dctlib.models.chat import format_chat
    from dctlib.models.loading import load_model
    from dctlib.steering.hooks import ablate, steer
    from dctlib.steering.scoring import score_vectors

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
    "CausalMap": "maps.causal",
    "FunctionMap": "maps.function",
    "Transcoder": "fits.transcoder",
    "ablate": "steering.hooks",
    "calibrate": "fits.calibration",
    "fit_exponential": "fits.solvers",
    "fit_linear": "fits.solvers",
    "fit_quadratic": "fits.solvers",
    "format_chat": "models.chat",
    "load_model": "models.loading",
    "score_vectors": "steering.scoring",
    "steer": "steering.hooks",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the command line does without torch, which takes seconds."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'dctlib' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"dctlib.{_DEFINED_IN[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
