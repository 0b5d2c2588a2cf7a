"""Run a notebook as a pipeline stage: papermill over a copy, parameters from the profile, and HTML of it."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from dctlib._io import ROOT, atomic_path
from dctlib.paper.notebook_pages import write_page
from dctlib.paper.params import load_profile, load_run

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
    fails, the notebook is kept as <stem>.failed.ipynb for reading. Of one that succeeds,
    :func:`dctlib.paper.notebook_pages.write_page` leaves a light page in writeup/<profile>/notebooks/.

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
    write_page(notebook, stem, profile, root)
    return folder / f"{stem}.ipynb"


def _without_progress(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop standard error, because progress bars fill it."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook
