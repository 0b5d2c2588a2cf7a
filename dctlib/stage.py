"""One notebook's run under a profile: its folders, its clock, and what it leaves behind."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dctlib.models import quiet
from dctlib.plots import save_figure
from dctlib.store import write_json


@dataclass(frozen=True)
class Stage:
    """Made in a notebook's first cell, whose working directory is notebooks/.

    Attributes
    ----------
    name, profile : str
        The notebook's, and the one that its parameters came from.
    started : float
        When it was made, on the clock behind ``seconds``.
    """

    name: str
    profile: str
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        quiet()

    def folder(self, part: str) -> Path:
        """``part/<profile>``: of ``.cache``, ``figures``, ``models``, ``runs`` or ``vectors``."""
        return Path("..") / part / self.profile

    def draw(self, figure: Figure, what: str = "") -> Figure:
        """Save a figure as PNG and SVG under the notebook's name, and return it for display."""
        return save_figure(figure, self.folder("figures") / (f"{self.name}_{what}" if what else self.name))

    def write(self, results: dict[str, Any]) -> None:
        """Save the notebook's numbers, with the seconds that they took."""
        seconds = time.perf_counter() - self.started
        write_json(self.folder("figures") / f"{self.name}.json", results | {"seconds": seconds})
