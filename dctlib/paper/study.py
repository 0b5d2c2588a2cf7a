"""The study: all cells behind the paper's figures, as a queue that can be stopped, and a check of records."""

import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from dctlib._io import ROOT
from dctlib.paper.experiments.real_baselines import real_baselines_cells
from dctlib.paper.experiments.real_models import real_models_cells
from dctlib.paper.experiments.real_multiplicity import real_multiplicity_cells
from dctlib.paper.experiments.sample_complexity import sample_complexity_cells
from dctlib.paper.experiments.search_steps import search_steps_cells
from dctlib.paper.params import load_profile
from dctlib.runs.cache import Setting, Task
from dctlib.runs.records import mismatches, read_record, record_cell, record_path

Cells = Sequence[tuple[Task, Setting]]


STAGES: dict[str, Callable[..., Cells]] = {
    "real_models": real_models_cells,
    "sample_complexity": sample_complexity_cells,
    "real_baselines": real_baselines_cells,
    "real_multiplicity": real_multiplicity_cells,
    "search_steps": search_steps_cells,
}
"""Stages in the order of work: name of a notebook → function from its parameters to cells."""

MOST_FAILURES = 3
"""The failure that ends the queue."""


@dataclass(frozen=True)
class StudyCell:
    """One call of a task, and the folder of its stage's records."""

    stage: str
    task: Task
    setting: Setting
    folder: Path

    @property
    def path(self) -> Path:
        """The path of the cell's record, whether it is there or not."""
        return record_path(self.task, self.setting, folder=self.folder)

    @property
    def label(self) -> str:
        """The stage and the task, for messages."""
        return f"{self.stage}: {self.task.__name__}"


def study_cells(profile: str = "study", stage: str | None = None, root: Path = ROOT) -> list[StudyCell]:
    """Return the cells of all stages of a profile, or of one stage, in the order of work.

    Raises
    ------
    ValueError
        If there is no such profile or stage.
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"got the stage {stage!r}, expected one of {', '.join(STAGES) or 'none: none is declared'}")
    sections = load_profile(profile, root)
    cells = [
        StudyCell(name, task, setting, root / "records" / profile / name)
        for name, declare_cells in STAGES.items()
        if name in sections and stage in (None, name)
        for task, setting in declare_cells(**sections[name])
    ]
    return list({cell.path: cell for cell in cells}.values())


def run_study(
    profile: str = "study", *, stage: str | None = None, minutes: float | None = None, root: Path = ROOT
) -> None:
    """Compute the cells that have no record, one after another, and record each as soon as it is finished.

    Several processes share the queue: each leaves out what another one is computing. Ctrl-C or SIGTERM stops a process;
    the cell that was running is computed again by the next call, as it is after a kill. A cell that fails is named and
    left out; the third one ends the process.

    Parameters
    ----------
    stage : str, optional
        The only stage to work on.
    minutes : float, optional
        No cell is started later than this.

    Raises
    ------
    ValueError
        If there is no such profile or stage, or if cells failed.
    """
    start = time.monotonic()
    cells = study_cells(profile, stage, root)
    missing = [cell for cell in cells if not cell.path.exists()]
    failures = []
    default = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops the queue as Ctrl-C does
    try:
        with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="cell", file=sys.stderr) as bar:
            for cell in missing:
                if minutes is not None and time.monotonic() - start >= 60 * minutes:
                    break
                bar.set_description(cell.label)
                try:
                    with FileLock(root / ".cache" / "study" / f"{cell.path.stem}.lock", blocking=False):
                        if not cell.path.exists():  # unless another process, or `git pull`, has brought it meanwhile
                            record_cell(cell.task, cell.setting, folder=cell.folder)
                except Timeout:
                    continue  # another process computes it
                except Exception as error:
                    failures.append(f"{cell.label}({dict(cell.setting)}): {type(error).__name__}: {error}")
                    bar.write(failures[-1], file=sys.stderr)
                    if len(failures) == MOST_FAILURES:
                        break
                bar.update()
    except KeyboardInterrupt:
        print("stopped: the cell that was running is computed again next time", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, default)
    recorded = sum(cell.path.exists() for cell in cells)
    print(f"{recorded} of {len(cells)} cells are recorded, {len(cells) - recorded} remain.")
    print(f"Commit the new records: git add records/{profile}")
    if failures:
        raise ValueError(f"{len(failures)} cells failed, the last one with {failures[-1]}")


def verify_records(profile: str = "study", *, sample: int, seed: int, root: Path = ROOT) -> None:
    """Compute a random sample of recorded cells again and compare the results with the records.

    Raises
    ------
    ValueError
        If a result does not agree with its record within what its task declares: one line for each such cell.
    """
    recorded = [cell for cell in study_cells(profile, root=root) if cell.path.exists()]
    chosen = random.Random(seed).sample(recorded, min(sample, len(recorded)))
    lines = []
    for cell in tqdm(chosen, desc="verify", disable=not chosen):
        found = mismatches(cell.task, read_record(cell.path)["result"], cell.task(**cell.setting))
        if found:
            lines.append(
                f"{cell.label} {cell.path.stem}: {len(found)} values differ, first {found[0]}; was its version raised?"
            )
    print(f"computed {len(chosen)} of {len(recorded)} recorded cells again (seed {seed}): {len(lines)} differ")
    if lines:
        raise ValueError("\n".join(lines))
