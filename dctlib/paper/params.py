"""Profiles, params/*.yaml: which there are, and whether what they say is in order."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dctlib._io import ROOT
from dctlib.paper import beyond_sections as beyond
from dctlib.paper import sections


class Profile(sections.Section):
    """What params/<profile>.yaml says, one section a notebook."""

    organisms: sections.Organisms
    training_curves: sections.TrainingCurves
    multiplicity: sections.Multiplicity
    ablation: sections.Ablation
    synthetic_recovery: sections.SyntheticRecovery
    replication_audit: sections.ReplicationAudit
    sample_complexity: sections.SampleComplexity
    deeper_models: sections.DeeperModels
    rerouted: sections.Rerouted
    locked: sections.Locked
    circuit_breaker: sections.CircuitBreaker
    password_locked: sections.PasswordLocked
    discover: sections.Discover
    baselines: beyond.Baselines
    stability: beyond.Stability
    replicates: beyond.Replicates
    secrets: beyond.Secrets
    auditing: beyond.Auditing
    hidden_sums: beyond.HiddenSums
    anomaly: beyond.Anomaly
    choices: beyond.Choices


class Run(sections.Section):
    """What params/run.yaml says of all notebooks."""

    profile: str
    ray: str = ""
    """The cluster for sweeps, as ``ray.init`` takes it; empty for this machine alone."""


def load_run(root: Path = ROOT) -> Run:
    """Read and check params/run.yaml."""
    return _validated(root / "params" / "run.yaml", Run)


def load_profile(name: str, root: Path = ROOT) -> Profile:
    """Read and check params/<name>.yaml.

    Raises
    ------
    ValueError
        If there is no such profile, or a key is unknown, missing or out of range; the message names file and key.
    """
    folder = root / "params"
    path = folder / f"{name}.yaml"
    profiles = sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "run")
    if name not in profiles:
        raise ValueError(f"no profile {name!r}: expected one of {', '.join(profiles)} (params/*.yaml)")
    return _validated(path, Profile)


def _validated(path: Path, kind: type[Any]) -> Any:
    where = f"{path.parent.name}/{path.name}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {where}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{where} holds {type(content).__name__}, expected a mapping of {', '.join(kind.model_fields)}"
        )
    return validate_section(kind, content, where)


def validate_section(kind: type[Any], content: dict[str, Any], where: str) -> Any:
    """`content` as a section of this kind, or ValueError with a line for each key of `where` that is wrong."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [_explain(where, detail) for detail in error.errors()]
        raise ValueError("\n".join(lines)) from error


def _explain(where: str, detail: Any) -> str:
    key = ".".join(map(str, detail["loc"]))
    match detail["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key {key}; is it misspelt?"
        case "missing":
            return f"{where}: {key} is missing"
        case "value_error":  # of keys together, as a validator of ours says it
            return f"{where}: {key}{': ' if key else ''}{detail['ctx']['error']}"
    return f"{where}: {key} = {detail['input']!r}: {detail['msg']}"
