"""One run of a notebook: its folders, its clock, and what it saves."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from IPython.display import Image
from matplotlib.figure import Figure

from dctlib._io import write_json
from dctlib.models.loading import silence_transformers
from dctlib.paper.plots.style import save_figure
from dctlib.runs.records import record_cells


@dataclass(frozen=True)
class NotebookRun:
    """One run of a notebook: its folders, its clock, and what it saves. The working directory is notebooks/.

    Attributes
    ----------
    name : str
        Name of the notebook, without .ipynb.
    profile : str
        Name of the profile whose parameters it has.
    started : float
        Start on ``time.perf_counter``'s clock, from which ``seconds`` count.
    """

    name: str
    profile: str
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        """Silence transformers' progress bars and advice."""
        silence_transformers()

    def folder(self, part: str) -> Path:
        """Return ``part/<profile>``, where `part` is ``.cache``, ``figures``, ``models``, ``runs`` or ``vectors``."""
        return Path("..") / part / self.profile

    def save_figure(self, figure: Figure, suffix: str = "") -> Image:
        """Save figures/<profile>/<name>[_suffix].png and .svg, and return the former, which a notebook displays."""
        stem = f"{self.name}_{suffix}" if suffix else self.name
        path = save_figure(figure, self.folder("figures") / stem)
        return Image(filename=str(path), retina=True)

    def record(self, task: Callable[..., Any], settings: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the results of a task under each of `settings`, from the records of this notebook.

        Missing cells are computed here, but under the profile ``study`` they are an error: `make study` computes those.
        """
        folder = self.folder("records") / self.name
        return record_cells(task, settings, folder=folder, compute=self.profile != "study")

    def save_results(self, results: dict[str, Any]) -> None:
        """Save figures/<profile>/<name>.json: the notebook's numbers, and the seconds since its start."""
        seconds = time.perf_counter() - self.started
        write_json(self.folder("figures") / f"{self.name}.json", results | {"seconds": seconds})
