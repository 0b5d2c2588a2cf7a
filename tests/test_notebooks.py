"""What every notebook promises, read from its source: nothing is executed here (`make nbval` does that)."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from dctlib.sources import sources_of

ROOT = Path(__file__).parent.parent
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
    (source,) = [source for cell, source in code_cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
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


def test_its_stage_depends_on_all_it_imports(path):
    stage = STAGES[path.stem]
    code = "\n".join(source for _, source in code_cells(path))
    needed = {f"dctlib/{name}.py" for name in sources_of(code)}
    assert needed | {f"notebooks/{path.name}"} <= set(stage["deps"])
    assert {dep for dep in stage["deps"] if dep.endswith(".py")} <= needed
    assert stage["params"] == [{"params/${profile}.yaml": [path.stem]}]
