"""Deep causal transcoding: find the steering vectors that unlock what a language model hides."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from dctlib.discovery.search import search_vectors as search_vectors
    from dctlib.fits.baselines import random_vectors as random_vectors
    from dctlib.fits.calibration import calibrate as calibrate
    from dctlib.fits.power_steering import power_steering as power_steering
    from dctlib.fits.solvers import fit_exponential as fit_exponential
    from dctlib.fits.solvers import fit_linear as fit_linear
    from dctlib.fits.solvers import fit_quadratic as fit_quadratic
    from dctlib.fits.transcoder import Transcoder as Transcoder
    from dctlib.maps.causal import CausalMap as CausalMap
    from dctlib.maps.function import FunctionMap as FunctionMap
    from dctlib.models.chat import format_chat as format_chat
    from dctlib.models.loading import load_model as load_model
    from dctlib.runs.cache import cached_fit as cached_fit
    from dctlib.steering.generation import generate_completions as generate_completions
    from dctlib.steering.hooks import ablate as ablate
    from dctlib.steering.hooks import steer as steer
    from dctlib.steering.scoring import score_vectors as score_vectors

_DEFINED_IN = {
    "CausalMap": "maps.causal",
    "FunctionMap": "maps.function",
    "Transcoder": "fits.transcoder",
    "ablate": "steering.hooks",
    "cached_fit": "runs.cache",
    "calibrate": "fits.calibration",
    "fit_exponential": "fits.solvers",
    "fit_linear": "fits.solvers",
    "fit_quadratic": "fits.solvers",
    "format_chat": "models.chat",
    "generate_completions": "steering.generation",
    "load_model": "models.loading",
    "power_steering": "fits.power_steering",
    "random_vectors": "fits.baselines",
    "score_vectors": "steering.scoring",
    "search_vectors": "discovery.search",
    "steer": "steering.hooks",
}

__all__ = [*_DEFINED_IN]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, because torch takes seconds to import and some commands need none."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'dctlib' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"dctlib.{_DEFINED_IN[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
