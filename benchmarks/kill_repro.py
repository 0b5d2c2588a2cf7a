"""Kill the pipeline again and again, let it go on each time, and see that it ends as a run in peace does.

``python benchmarks/kill_repro.py`` runs the smoke profile in two copies of this tree under build/kills: once in peace,
and once killed (SIGKILL, all its processes) at random moments of every stage in turn. It exits with 1 if any metric of
figures/ differs, but for seconds, or any picture but that of the fits' seconds. ``--kills 3 synthetic_recovery`` does
so with one stage and what it needs.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from dctlib._io import ROOT, sha256, write_json

FOLDER = ROOT / "build" / "kills"
FETCHED = ("data", "models/smollm2-135m-instruct")  # downloads, hard-linked; what was fitted or trained is left behind


def copied(name: str) -> Path:
    """A copy of the tree as git sees it, at the smoke profile: what ``make smoke`` makes."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for file in subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0"):
        if file and (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file)
    for kept in FETCHED:
        if (ROOT / kept).is_dir():
            shutil.copytree(ROOT / kept, folder / kept, copy_function=os.link)
    (folder / "params" / "run.yaml").write_text("profile: smoke\n")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def started(folder: Path, stages: list[str]) -> subprocess.Popen:
    """``dvc repro`` in `folder`, with this interpreter's tools, and the copy's dctlib."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
    with open(folder / "repro.log", "ab") as log:
        return subprocess.Popen(["dvc", "repro", *stages], cwd=folder, env=environment, stdout=log, stderr=log)


def logged(folder: Path) -> list[str]:
    """The stages that were started there, in order, by all runs."""
    log = folder / "repro.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return re.findall(r"^Running stage '(\w+)'", text, re.MULTILINE)


def finished(folder: Path, stages: list[str]) -> dict[str, float]:
    """Let it run to its end; the seconds that each stage took."""
    before, begun, process = len(logged(folder)), {}, started(folder, stages)
    while process.poll() is None:
        for stage in logged(folder)[before:]:
            begun.setdefault(stage, time.perf_counter())
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"dvc repro failed: see {folder / 'repro.log'}")
    ends = [*begun.values(), time.perf_counter()][1:]
    return {stage: end - start for (stage, start), end in zip(begun.items(), ends, strict=True)}


def killed(folder: Path, stages: list[str], among: Collection[str], after: float) -> str:
    """Let it run until it is `after` seconds into a stage `among` these, then kill all its processes.

    It gives the stage at which it was.
    """
    before, process = len(logged(folder)), started(folder, stages)
    while process.poll() is None and not set(logged(folder)[before:]) & {*among}:
        time.sleep(0.5)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        family = [psutil.Process(process.pid)]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.suspend()  # so that it starts no more
                family += each.children()
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        return logged(folder)[-1]
    return "none: it ended before"


def results(folder: Path) -> dict[str, Any]:
    """Every number of figures/, by file and place in it, and every picture's SHA-256, but for times."""
    found: dict[str, Any] = {}

    def walk(where: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if "seconds" not in key:
                    walk(f"{where}.{key}", inner)
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                walk(f"{where}.{index}", inner)
        else:
            found[where] = value

    for path in sorted((folder / "figures" / "smoke").glob("*.json")):
        walk(path.stem, json.loads(path.read_text(encoding="utf-8")))
    for path in sorted((folder / "figures" / "smoke").glob("*.png")):
        if path.stem != "training_curves":  # which draws seconds
            found[path.name] = sha256(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="of dvc.yaml; left out, all")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments, peaceful, harassed = random.Random(options.seed), copied("peaceful"), copied("killed")
    seconds, fell = finished(peaceful, options.stages), []
    print("in peace:", {stage: round(of) for stage, of in seconds.items()}, flush=True)
    for kill in range(options.kills):
        first = kill * len(seconds) // options.kills
        stage, *later = list(seconds)[first:]  # a later one, if the kill before it came when this one was done
        after = moments.uniform(0, seconds[stage])
        fell.append(killed(harassed, options.stages, [stage, *later], after))
        print(f"kill {kill + 1}, {after:.0f} s after {stage} began: {fell[-1]}", flush=True)
    print("the rest:", {stage: round(of) for stage, of in finished(harassed, options.stages).items()}, flush=True)
    expected, found = results(peaceful), results(harassed)
    different = sorted(place for place in expected | found if expected.get(place) != found.get(place))
    for place in different:
        print(f"{place}: {expected.get(place)} in peace, {found.get(place)} after kills")
    counts = {"stages": options.stages, "kills": options.kills, "seed": options.seed, "results": len(expected)}
    write_json(FOLDER / "result.json", {**counts, "fell_on": Counter(fell), "different": different})
    sys.exit(f"{len(different)} of {len(expected)} results differ" if different or not expected else None)


if __name__ == "__main__":
    main()
