"""The files of this library that a piece of code depends on."""

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import dctlib

_PACKAGE = Path(__file__).parent


@lru_cache
def sources_of(code: str) -> tuple[str, ...]:
    """Names of the dctlib files that `code` imports, itself or through one another: ``fit``, ``plots/__init__``.

    A name that is taken from the package itself counts as the file that defines it.
    """
    found: set[str] = set()
    waiting = [*_imports(code)]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += _imports((_PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    return tuple(sorted(found))


def _imports(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "dctlib":
            for name in (alias.name for alias in node.names):
                yield _file(getattr(dctlib, name).__module__ if name in dctlib.__all__ else f"dctlib.{name}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dctlib."):
            yield _file(str(node.module))


def _file(module: str) -> str:
    name = "/".join(module.split(".")[1:])
    return f"{name}/__init__" if (_PACKAGE / name).is_dir() else name
