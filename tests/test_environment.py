"""environment.yml, pyproject.toml and requirements.lock say the same thing."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
NAMED_BY_OUR_USER = {"torch", "transformers", "jupyter", "papermill", "matplotlib", "seaborn", "nbval", "pytest"}


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["paper"] + extras["dev"]
    return [Requirement(line) for line in lines if not line.startswith("dctlib[")]


def conda_packages():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    return [Requirement(line) for line in pip if not line.startswith("-")]


def test_every_declared_package_is_locked_at_a_version_it_allows():
    pins = locked()
    for requirement in declared():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_lock_is_exact_and_names_no_place():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


def test_environment_has_every_declared_package_at_its_locked_version():
    pins, packages = locked(), {canonicalize_name(r.name): r for r in conda_packages()}
    assert {canonicalize_name(requirement.name) for requirement in declared()} <= set(packages)
    assert set(packages) >= NAMED_BY_OUR_USER
    for name, requirement in packages.items():
        assert str(requirement.specifier) == f"=={pins[name]}"
