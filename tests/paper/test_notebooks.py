"""What every notebook promises, read from its source: nothing is executed here (`make nbval` does that)."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

import dctlib
from dctlib.paper.params import read_defaults

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PIPELINES = [yaml.safe_load((ROOT / path).read_text()) for path in ("dvc.yaml", "beyond/dvc.yaml", "study/dvc.yaml")]
STAGES = {name: stage for pipeline in PIPELINES for name, stage in pipeline["stages"].items()}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [(cell, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


def parsed(path):
    """Return the syntax tree of each code cell, the parameters cell first."""
    return [ast.parse(source) for _, source in code_cells(path)]


def assigned_names(tree):
    """Return every name that code assigns, also by a loop, a walrus or a comprehension."""
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def is_call_of(node, method):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method


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


def test_it_has_at_most_70_statements_and_defines_nothing(path):
    nodes = [node for tree in parsed(path) for node in ast.walk(tree)]
    assert sum(isinstance(node, ast.stmt) for node in nodes) <= 70
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]


def test_each_line_holds_one_idea(path):
    nodes = [node for tree in parsed(path) for node in ast.walk(tree)]
    assert not [ast.unparse(node) for node in nodes if isinstance(node, ast.NamedExpr)]
    assert not [
        ast.unparse(node) for node in nodes if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr)
    ]
    assert not [
        ast.unparse(node)
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    ]
    assert not [source for _, source in code_cells(path) if ";" in re.sub(r"#.*|\".*?\"", "", source)]


def test_parameters_and_imported_names_are_never_assigned_again(path):
    parameters, *cells = parsed(path)
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for tree in cells
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    taken = {*assigned_names(parameters), *imported}
    assert not taken & {name for tree in cells for name in assigned_names(tree)}


def test_each_figure_is_the_last_expression_of_its_cell(path):
    cells = [tree for tree in parsed(path) if any(is_call_of(node, "save_figure") for node in ast.walk(tree))]
    assert cells
    for tree in cells:
        last = tree.body[-1]
        assert isinstance(last, ast.Expr)
        assert is_call_of(last.value, "save_figure")
        assert sum(is_call_of(node, "save_figure") for node in ast.walk(tree)) == 1


def executed_copies(path):
    return sorted((ROOT / "runs").glob(f"*/{path.name}"))


def test_executed_copies_show_their_figures(path):
    """Copies from before figures were shown are those whose source differs, which is not read here."""
    figures = sum(is_call_of(node, "save_figure") for tree in parsed(path) for node in ast.walk(tree))
    sources = [source for _, source in code_cells(path)]
    for copy in executed_copies(path):
        cells = [cell for cell in json.loads(copy.read_text())["cells"] if cell["cell_type"] == "code"]
        if [
            "".join(cell["source"]) for cell in cells if "injected-parameters" not in cell["metadata"]["tags"]
        ] != sources:
            continue
        shown = [output["data"] for cell in cells for output in cell["outputs"] if "data" in output]
        assert sum("image/png" in data for data in shown) == figures
        assert not [data for data in shown if "<Figure" in "".join(data.get("text/plain", ""))]
        assert copy.with_suffix(".html").read_text().count("data:image/png;base64,") >= figures


def test_light_pages_show_their_figures_by_links(path):
    """Those of the profiles that are committed, and of others that were run here."""
    figures = sum(is_call_of(node, "save_figure") for tree in parsed(path) for node in ast.walk(tree))
    for page in (ROOT / "writeup").glob(f"*/notebooks/{path.stem}.html"):
        text = page.read_text(encoding="utf-8")
        linked = [page.parent / target for target in re.findall(r'<img[^>]+src="([^"]+)"', text)]
        assert len(linked) == figures
        assert all(target.is_file() for target in linked)
        assert len(text) < 100_000


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
    """The dctlib modules that `code` imports, itself or through one another, but for what checks parameters."""
    found, waiting = {ROOT / "dctlib/paper/params.py"}, [code]
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
    return {str(file.relative_to(ROOT)) for file in found} - {"dctlib/paper/params.py"}


def test_its_stage_depends_on_every_room_that_it_imports(path):
    stage = STAGES[path.stem]
    deps = [dep for dep in stage["deps"] if dep.startswith("dctlib/")]
    needed = imported_modules("\n".join(source for _, source in code_cells(path)))
    assert all(any(module == dep or module.startswith(f"{dep}/") for dep in deps) for module in needed)
    assert all(any(module == dep or module.startswith(f"{dep}/") for module in needed) for dep in deps)
    assert f"notebooks/{path.name}" in stage["deps"]
    (params,) = stage["params"]
    assert params in ({"params/${profile}.yaml": [path.stem]}, {"params/study.yaml": [path.stem]})


def test_a_reader_opens_at_most_three_rooms_besides_the_paper(path):
    rooms = {
        (node.module or "").split(".")[1]
        for tree in parsed(path)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dctlib.")
    }
    most = 4 if path.stem == "discover" else 3  # discover walks through the whole method
    assert len(rooms - {"paper"}) <= most
