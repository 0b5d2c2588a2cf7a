"""What every notebook promises, read from its source: nothing is executed here (`make nbval` does that)."""

import ast
import json
from pathlib import Path

import pytest
import yaml

import dctlib
from dctlib.paper.params import read_defaults

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PIPELINES = [yaml.safe_load((ROOT / path).read_text()) for path in ("dvc.yaml", "beyond/dvc.yaml")]
STAGES = {name: stage for pipeline in PIPELINES for name, stage in pipeline["stages"].items()}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [(cell, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


def code_lines(path):
    """Lines of code, without comments."""
    lines = [line.strip() for _, source in code_cells(path) for line in source.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_parameters_are_the_smoke_profile(path):
    found = {name: default for name, (default, _) in read_defaults(path).items()}
    expected = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())[path.stem]
    assert found == {"profile": "smoke", **expected}


def test_it_reads_like_a_paper(path):
    notebook = json.loads(path.read_text())
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")
    assert "$" in "".join(first["source"])
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = code_lines(path)
    assert len(code) <= 60
    assert not any(line.startswith(("def ", "class ")) for line in code)


def test_only_the_checked_cell_holds_output(path):
    checked = 0
    for cell, source in code_cells(path):
        if "NBVAL_CHECK_OUTPUT" in source:
            checked += 1
            assert cell["outputs"]
            assert cell["execution_count"] == 1  # nbval takes a cell without one for never run
        else:
            assert not cell["outputs"]
            assert cell["execution_count"] is None
    assert checked >= 1


def imported_modules(code):
    """The dctlib modules that `code` imports, itself or through one another."""
    found, waiting = set(), [code]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("dctlib"):
                continue
            for name in (alias.name for alias in node.names):
                module = f"dctlib.{dctlib._DEFINED_IN[name]}" if node.module == "dctlib" else str(node.module)
                file = ROOT / f"{module.replace('.', '/')}.py"
                file = file if file.exists() else file.with_suffix("") / "__init__.py"
                if file not in found:
                    found.add(file)
                    waiting.append(file.read_text())
    return {str(file.relative_to(ROOT)) for file in found}


def test_its_stage_depends_on_every_room_that_it_imports(path):
    stage = STAGES[path.stem]
    deps = [dep for dep in stage["deps"] if dep.startswith("dctlib/")]
    needed = imported_modules("\n".join(source for _, source in code_cells(path)))
    assert all(any(module == dep or module.startswith(f"{dep}/") for dep in deps) for module in needed)
    assert all(any(module == dep or module.startswith(f"{dep}/") for module in needed) for dep in deps)
    assert f"notebooks/{path.name}" in stage["deps"]
    assert stage["params"] == [{"params/${profile}.yaml": [path.stem]}]
