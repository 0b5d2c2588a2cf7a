"""What a piece of code depends on, held to what importing it loads."""

import json
import subprocess
import sys

import pytest

from dctlib.sources import sources_of


def loaded_by(code):
    """The dctlib modules in a new process that has run `code` behind a package that imports nothing itself."""
    program = (
        "import importlib.machinery, importlib.util, json, sys\n"
        "package = importlib.util.module_from_spec(importlib.util.find_spec('dctlib'))\n"
        "sys.modules['dctlib'] = package\n"
        f"{code}\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('dctlib.')]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = [name.removeprefix("dctlib.").replace(".", "/") for name in json.loads(done.stdout)]
    return {f"{name}/__init__" if name == "plots" else name for name in names}


@pytest.mark.parametrize("module", ["fit", "blind_audit", "plots.baselines"])
def test_they_are_what_an_import_loads(module):
    code = f"from dctlib.{module} import *"
    assert set(sources_of(code)) == loaded_by(code) | ({"plots/__init__"} if "plots" in module else set())


def test_a_name_of_the_package_is_the_file_that_defines_it():
    assert sources_of("from dctlib import calibrate") == sources_of("from dctlib.input_scale import calibrate")
    assert "melbo" in sources_of("from dctlib import melbo")
    assert sources_of("import torch\nfrom pathlib import Path") == ()


@pytest.mark.parametrize("code", ["import dctlib", "import dctlib.melbo as m", "from dctlib import *"])
def test_the_package_itself_counts_as_all_its_names(code):
    assert {"fit", "intervene", "transcoder"} <= set(sources_of(code))
    assert ("melbo" in sources_of(code)) == ("melbo" in code)
