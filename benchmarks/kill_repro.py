"""Kill the pipeline again and again, let it go on each time, and see that it ends as a run in peace does.

``python benchmarks/kill_repro.py`` runs the smoke profile in two copies of this tree under build/kills: once in peace,
and once killed (SIGKILL, all its processes) at random moments. It exits with 1 if any metric of figures/ differs, but
for seconds, or any picture but that of the fits' seconds. ``--kills 3 synthetic_recovery`` does so with one stage and
what it needs.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from dctlib.store import ROOT, sha256, write_json

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


def finished(folder: Path, stages: list[str]) -> float:
    """Let it run to its end; the seconds that it took."""
    begun = time.perf_counter()
    if started(folder, stages).wait():
        sys.exit(f"dvc repro failed: see {folder / 'repro.log'}")
    return time.perf_counter() - begun


def killed(folder: Path, stages: list[str], after: float) -> str:
    """Let it run for `after` seconds, then kill every process of it; the stage at which it was."""
    process = started(folder, stages)
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
    lines = (folder / "repro.log").read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("Running stage")), "before the first stage")


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
    seconds = finished(peaceful, options.stages)
    print(f"in peace: {seconds:.0f} s", flush=True)
    for kill in range(options.kills):
        after = moments.uniform(0, 2 * seconds / options.kills)  # so that the kills fall on all of the run
        print(f"kill {kill + 1} after {after:.1f} s: {killed(harassed, options.stages, after)}", flush=True)
    print(f"the rest: {finished(harassed, options.stages):.0f} s", flush=True)
    expected, found = results(peaceful), results(harassed)
    different = sorted(place for place in expected | found if expected.get(place) != found.get(place))
    for place in different:
        print(f"{place}: {expected.get(place)} in peace, {found.get(place)} after kills")
    counts = {"stages": options.stages, "kills": options.kills, "seed": options.seed, "results": len(expected)}
    write_json(FOLDER / "result.json", {**counts, "different": different})
    sys.exit(f"{len(different)} of {len(expected)} results differ" if different or not expected else None)


if __name__ == "__main__":
    main()
