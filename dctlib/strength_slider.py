"""A slider over steering strengths for a notebook that somebody looks at, and a plain table where nobody does."""

import os
from collections.abc import Sequence
from typing import Any

import pandas as pd

from dctlib.discover import Reading
from dctlib.judges import excerpt


def strength_slider(
    reading: Reading, instructions: Sequence[str], vectors: Sequence[int], *, characters: int, rows: int = 5
) -> Any:
    """What each vector makes the model say at each strength, beside what it says without.

    Parameters
    ----------
    reading : Reading
        Of `vectors` on `instructions`.
    vectors : sequence of int
        The numbers to call them by.
    characters, rows : int
        Completions are cut to `characters`; the first `rows` instructions are shown.

    Returns
    -------
    ipywidgets.interactive or DataFrame
        A choice of vector and strength under Jupyter; under papermill the first vector at the first strength.
    """
    first, start = vectors[0], next(iter(reading.steered))

    def show(vector: int = first, strength: float = start) -> pd.DataFrame:
        said = reading.steered[strength][vectors.index(vector)]
        columns = {"instruction": instructions, "without": reading.clean, f"vector {vector}, ×{strength:g}": said}
        return excerpt(columns, characters=characters, rows=rows)

    if "JPY_SESSION_NAME" not in os.environ:  # set by Jupyter's server for kernels with a window, not by papermill
        return show()
    from ipywidgets import SelectionSlider, interactive

    strengths = SelectionSlider(options=sorted(reading.steered), value=start, description="strength")
    return interactive(show, vector=list(vectors), strength=strengths)
