"""Deep causal transcoding: find the steering vectors that unlock what a language model hides."""

from dctlib.calibrate import calibrate
from dctlib.causal_map import CausalMap, FunctionMap
from dctlib.fit import fit_exponential, fit_linear, fit_quadratic
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
