import subprocess
import sys

import pytest

import dctlib


@pytest.mark.parametrize("name", dctlib.__all__)
def test_a_public_name_is_what_bears_it(name):
    assert getattr(dctlib, name).__name__ == name
    assert name in dir(dctlib)


def test_another_name_is_none():
    with pytest.raises(AttributeError, match="has no attribute 'fit_cubic'"):
        _ = dctlib.fit_cubic  # pyright: ignore[reportAttributeAccessIssue]


def test_the_command_line_runs_notebooks_without_torch():
    program = "import sys, dctlib.paper.pipeline\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
