"""Notebooks as pipeline stages: executed copies with the parameters of a profile, and what a notebook saves."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill
from IPython.display import Image
from matplotlib.figure import Figure
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from dctlib._io import ROOT, atomic_path, write_json
from dctlib.models.loading import silence_transformers
from dctlib.paper.params import load_profile, load_run
from dctlib.paper.plots.style import save_figure


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
        from dctlib.runs.records import record_cells  # it loads torch, which the process that starts notebooks need not

        folder = self.folder("records") / self.name
        return record_cells(task, settings, folder=folder, compute=self.profile != "study")

    def save_results(self, results: dict[str, Any]) -> None:
        """Save figures/<profile>/<name>.json: the notebook's numbers, and the seconds since its start."""
        seconds = time.perf_counter() - self.started
        write_json(self.folder("figures") / f"{self.name}.json", results | {"seconds": seconds})


# glibc gives large blocks back at every free; the page faults of taking them again cost training a fifth of its time.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}


def run_notebook(stem: str, profile: str, root: Path = ROOT) -> Path:
    """Execute notebooks/<stem>.ipynb with the parameters of a profile, and return the executed copy's path.

    Raises
    ------
    ValueError
        If the profile is invalid or has no section for the notebook, or a cell raised ValueError.
    """
    parameters = load_profile(profile, root).get(stem)
    if parameters is None:
        raise ValueError(f"params/{profile}.yaml has no section {stem}, so there is no such notebook to run")
    return execute(stem, profile, parameters, root)


def execute(stem: str, profile: str, parameters: Mapping[str, Any], root: Path = ROOT) -> Path:
    """Execute notebooks/<stem>.ipynb into runs/<profile>/<stem>.ipynb and .html, and return the former.

    The kernel works in notebooks/, as it does under Jupyter, and what it prints is passed on as it comes; its sweeps
    run on the Ray cluster of params/run.yaml, or of RAY_ADDRESS. The source notebook is not touched. Of a run that
    fails, the notebook is kept as <stem>.failed.ipynb for reading.

    Parameters
    ----------
    profile : str
        Names the folders of what the notebook leaves: figures/<profile>/ and so on.
    parameters : mapping
        Values of its parameters cell, by name.

    Raises
    ------
    ValueError
        If a cell raised ValueError, or the kernel died.
    """
    folder = root / "runs" / profile
    failed = folder / f"{stem}.failed.ipynb"
    os.environ.update(_MALLOC | {"RAY_ADDRESS": load_run(root).ray} | os.environ)  # what the kernel inherits
    with atomic_path(folder / f"{stem}.ipynb") as partial:
        try:
            papermill.execute_notebook(
                root / "notebooks" / f"{stem}.ipynb",
                partial,
                parameters={"profile": profile, **parameters},
                cwd=root / "notebooks",
                kernel_name="python3",
                language="python",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
        except PapermillExecutionError as error:
            partial.replace(failed)
            if error.ename != "ValueError":
                raise
            raise ValueError(f"notebooks/{stem}.ipynb: {error.evalue} (see runs/{profile}/{failed.name})") from error
        except DeadKernelError as error:
            if partial.exists():
                partial.replace(failed)
            raise ValueError(f"notebooks/{stem}.ipynb: its kernel died, as when memory runs out") from error
        failed.unlink(missing_ok=True)
        notebook = _without_progress(nbformat.read(partial, as_version=4))
        nbformat.write(notebook, partial)
    html, _ = HTMLExporter().from_notebook_node(notebook)
    with atomic_path(folder / f"{stem}.html") as partial:
        partial.write_text(html, encoding="utf-8")
    return folder / f"{stem}.ipynb"


def _without_progress(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop standard error, because progress bars fill it."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook
