"""The files of this library that a piece of code depends on."""

import ast
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path

_PACKAGE = Path(__file__).parent
_DCTLIB = import_module("dctlib")  # by name: the statement would count here as an import of everything


@lru_cache
def sources_of(code: str) -> tuple[str, ...]:
    """Names of the dctlib files that `code` imports, itself or through one another: ``fit``, ``plots/__init__``.

    A name that is taken from the package itself counts as the file that defines it, and ``import dctlib`` as all its
    names.
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
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names if alias.name.split(".")[0] == "dctlib"):
                yield from ([_file(name)] if name != "dctlib" else []) + _imported("*")
        elif isinstance(node, ast.ImportFrom) and node.module == "dctlib":
            for alias in node.names:
                yield from _imported(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dctlib."):
            yield _file(str(node.module))


def _imported(name: str) -> list[str]:
    """The files behind a name of the package, or behind ``*``, all of them."""
    names = _DCTLIB.__all__ if name == "*" else [name]
    return [_file(getattr(_DCTLIB, n).__module__ if n in _DCTLIB.__all__ else f"dctlib.{n}") for n in names]


def _file(module: str) -> str:
    name = "/".join(module.split(".")[1:])
    return f"{name}/__init__" if (_PACKAGE / name).is_dir() else name
