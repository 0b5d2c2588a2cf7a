"""Imports run downwards through the rooms, and the method imports without the paper's packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dctlib
from dctlib._io import ROOT

ROOMS = ["_io", "models", "maps", "fits", "runs", "steering", "evaluation", "exchange", "discovery", "cli", "paper"]
"""From the lowest to the highest. The command line stands below the paper, which it opens inside a function only."""

PAPER_PACKAGES = [
    *("dvc", "jupyter", "papermill", "nbclient", "nbconvert", "nbformat", "matplotlib", "seaborn", "peft"),
    *("math_verify", "pypandoc", "typst", "ray"),
]
PACKAGE = Path(dctlib.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path, source, *, functions=True):
    """Rooms that a file imports: by absolute and relative imports, and by ``from dctlib import name``."""
    tree = ast.parse(source)
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    nodes = ast.walk(tree) if functions else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for module in modules:
            if module[0] != "dctlib":
                continue
            name = module[1] if len(module) > 1 else "*"
            defined = dctlib._DEFINED_IN
            found.add(defined[name].split(".")[0] if name in defined else name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_itself_and_from_rooms_below(path):
    own = room(path)
    allowed = set(ROOMS[: ROOMS.index(own) + 1])
    # A command of the command line opens the paper when it is called.
    imported = imported_rooms(path, path.read_text(encoding="utf-8"), functions=own != "cli")
    assert imported <= allowed, f"{own} imports {sorted(imported - allowed)}, which lie above it"


@pytest.mark.parametrize(
    "statement",
    [
        "from dctlib.fits.solvers import fit_linear",
        "import dctlib.fits",
        "from ..fits import solvers",
        "from dctlib import fit_linear",
        "from dctlib import fits",
        "def f():\n    from dctlib import calibrate",
    ],
)
def test_every_kind_of_upward_import_is_seen(statement):
    assert imported_rooms(PACKAGE / "maps" / "causal.py", statement) == {"fits"}


def test_every_folder_is_a_room():
    assert {room(path) for path in FILES} <= set(ROOMS)


def test_the_method_imports_without_the_packages_of_the_paper():
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES if room(path) != "paper"
    ]
    program = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {PAPER_PACKAGES!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
import dctlib
for name in dctlib.__all__:
    getattr(dctlib, name)
for module in {["dctlib", *modules]!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_fits_on_a_few_screens(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
