"""Profiles, params/*.yaml: their values, checked against the notebooks' parameters cells.

A notebook's parameters cell is the one source of names and types: the type of a parameter is that of its default,
or its annotation where ``None`` or another type is allowed too. ``RULES`` adds the bounds that no type expresses.
"""

import ast
import functools
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from dctlib._io import ROOT, explain_invalid
from dctlib.discovery.options import DiscoverOptions


def _integer(least: int, most: int | None = None) -> Any:
    return Annotated[int, Field(ge=least, le=most, strict=True)]  # strict: true is no 1


def _several(kind: Any, least: int = 1, most: int | None = None) -> Any:
    return Annotated[list[kind], Field(min_length=least, max_length=most)]


INDEX = _integer(0)
COUNT = _integer(1)
EVEN = Annotated[int, Field(ge=2, multiple_of=2, strict=True)]
NUMBER = Annotated[float, Field(strict=True)]
POSITIVE = Annotated[float, Field(gt=0, strict=True)]
RATE = Annotated[float, Field(ge=0, le=1, strict=True)]
TEXT = Annotated[str, Field(min_length=1)]

FIT = 32
"""Prompts that a split keeps for fits, and as many for validation."""

TEST = 100
"""Prompts that a split keeps for tests."""

POOL = 388
"""Prompts of AdvBench that are neither for validation nor for tests."""

FITTED = ("exponential", "exponential_axes", "quadratic", "linear_projected", "linear")
"""The names of :data:`dctlib.paper.comparisons.METHODS`, which imports torch; the command line starts without it."""

PROMPTS = Annotated[str, Field(pattern=r"^([1-9]|[12]\d|3[0-2])$")]
"""A number of fit prompts as a key, of which JSON has only texts: 1 to 32."""

COMPETING = ("DCT", "projected linear", "power steering", "MELBO", "random", "difference of means", "search")
"""The methods that are compared within one bound on damage."""

TYPES: dict[str, Any] = {
    "bool": Annotated[bool, Field(strict=True)],
    "int": COUNT,
    "float": POSITIVE,
    "str": TEXT,
    "list[str]": _several(TEXT),
}
"""What a type means where ``RULES`` does not name the parameter."""

RULES: dict[str, Any] = {
    # layers and seeds
    **dict.fromkeys(("source", "target", "seed"), INDEX),
    **dict.fromkeys(("sources", "reroute_layers", "keep_layers", "supervised_layers"), _several(INDEX)),
    **dict.fromkeys(("seeds", "controls"), _several(INDEX)),
    **dict.fromkeys(("replicates.seeds", "auditing.seeds", "hidden_sums.seeds"), _several(INDEX, 2)),  # an interval
    "stability.seeds": _several(INDEX, 2, 2),
    # prompts
    **dict.fromkeys(("fit_prompts", "validation"), _integer(1, FIT)),
    "anomaly.fit_prompts": COUNT,  # from a set of its own
    "anomaly.trusted": _integer(2),
    "stability.fit_prompts": _integer(1, FIT // 2),  # two fits share no prompt
    "circuit_breaker.validation": _integer(4, FIT),
    "hidden_sums.held_out": _integer(2, FIT),
    "pool": _integer(1, POOL),
    "calibration_prompts": _integer(1, FIT),
    **dict.fromkeys(("real_multiplicity.validation", "real_multiplicity.answered"), _integer(4, FIT)),
    "real_multiplicity.test": _integer(4, TEST),
    "real_baselines.methods": Annotated[dict[Literal[COMPETING], COUNT], Field(min_length=1)],
    "real_baselines.validation": _integer(4, FIT),
    "real_baselines.test": _integer(4, TEST),
    "real_baselines.benign": _integer(2),
    "search_steps.validation": _integer(4, FIT),
    "search_steps.test": _integer(8, TEST),  # each half is judged by itself
    "sample_complexity.arms": Annotated[dict[Literal[FITTED], dict[PROMPTS, _integer(2)]], Field(min_length=1)],
    "sample_complexity.judged": _integer(4, TEST),  # an answer is compared with those to three other requests
    "auditing.sizes": _several(COUNT),
    "hidden_sums.sizes": _several(_integer(1, FIT)),
    "test": _integer(2, TEST),
    "ablated": _integer(2, TEST),
    "organisms.test": _integer(3, TEST),
    **dict.fromkeys(("circuit_breaker.test", "baselines.test"), _integer(4, TEST)),
    "multiplicity.test": _integer(5, TEST),
    # fits
    **dict.fromkeys(("auditing.num_factors", "hidden_sums.num_factors"), EVEN),  # power steering has both signs
    **dict.fromkeys(("sample_complexity.num_factors", "multiplicity.shown", "shuffles"), _integer(2)),
    "plain_batch": _integer(2),
    "least": RATE,
    **dict.fromkeys(("threshold", "min_pmi"), NUMBER),
    # choices
    "dtype": Literal["native", "float32", "bfloat16"],
    "organisms.kinds": list[Literal["refusal"]],  # none where the profile's models already hide something
    "questions": Literal["sums", "math"],
    "behaviours": _several(Literal["refusal", "sums"]),
    "supervised_lengths": _several(POSITIVE, 0),
    "others": create_model(
        "Others",
        __config__=ConfigDict(extra="forbid"),
        prompts=(list[Literal["averaged", "concatenated"]], ...),
        nonlinearity=(_several(POSITIVE, 0), ...),
        horizon=(_several(COUNT, 0), ...),
        positions=(_several(COUNT, 0), ...),
    ),
    # the options of the command line
    **{
        f"discover.{name}": Annotated[field.annotation, field.description, *field.metadata]
        for name, field in DiscoverOptions.model_fields.items()
    },
}
"""What a value must be, by parameter, or by notebook and parameter."""


class _Section(BaseModel):
    """Parameters of one notebook; unknown names are refused, because their defaults would stay in force unnoticed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _agree(self) -> "_Section":
        if contradiction := _contradiction(vars(self)):
            raise ValueError(contradiction)
        return self


def _contradiction(values: Mapping[str, Any]) -> str | None:
    """Return what is wrong with parameters that are valid one by one."""
    source, target = values.get("source"), values.get("target")
    if source is not None and target is not None and source >= target:
        return f"source={source} must lie below target={target}"
    prompt = values.get("prompt")
    if "questions" in values and prompt and "{question}" not in prompt:
        return f"prompt={prompt!r} must hold {{question}}, where each question goes"
    for part, whole in (("tries", "num_factors"), ("fit_prompts", "trusted")):
        if part in values and whole in values and values[part] > values[whole]:
            return f"{part}={values[part]} are part of {whole}={values[whole]}, so at most as many"
    if "controls" in values and len(set(values["seeds"])) < max(len(values["seeds"]), len(values["kinds"])):
        return f"seeds={values['seeds']} make one organism each: give {len(values['kinds'])} or more, all different"
    return None


class Run(BaseModel):
    """Settings of params/run.yaml, which hold for all notebooks.

    Attributes
    ----------
    profile : str
        Name of the profile that the pipeline runs.
    ray : str
        Address of the cluster for sweeps, as ``ray.init`` takes it; empty for this machine alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str
    ray: str = ""


def load_run(root: Path = ROOT) -> Run:
    """Return the settings of params/run.yaml, checked."""
    path = root / "params" / "run.yaml"
    return _validate(Run, _read(path), f"params/{path.name}")


def load_profile(name: str, root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Return the parameters in params/<name>.yaml by notebook, checked; a profile may leave notebooks out.

    Raises
    ------
    ValueError
        If there is no such profile, or a key is unknown, missing or out of range; the message names file and key.
    """
    folder = root / "params"
    profiles = sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "run")
    if name not in profiles:
        raise ValueError(f"no profile {name!r}: expected one of {', '.join(profiles)} (params/*.yaml)")
    return check_profile(_read(folder / f"{name}.yaml"), f"params/{name}.yaml", root)


def check_profile(content: Mapping[str, Any], where: str, root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Return the sections of a profile as papermill takes them.

    Raises
    ------
    ValueError
        With one line for each key of `where` that is wrong.
    """
    sections: dict[str, Any] = {path.stem: (_section(path), None) for path in (root / "notebooks").glob("*.ipynb")}
    if not content:
        raise ValueError(f"{where} holds no section, expected some of {', '.join(sorted(sections))}")
    profile = create_model("Profile", __config__=ConfigDict(extra="forbid"), **sections)
    return _validate(profile, content, where).model_dump(mode="json", exclude_unset=True)


def read_defaults(notebook: Path) -> dict[str, tuple[Any, list[str]]]:
    """Return each name of a notebook's parameters cell with its default and the types of its annotation, if any."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    defaults = {}
    for node in ast.parse("\n".join(tagged)).body:
        if isinstance(node, ast.AnnAssign) and node.value:
            defaults[ast.unparse(node.target)] = ast.literal_eval(node.value), ast.unparse(node.annotation).split(" | ")
        elif isinstance(node, ast.Assign):
            defaults[ast.unparse(node.targets[0])] = ast.literal_eval(node.value), []
    return defaults


def _section(notebook: Path) -> type[BaseModel]:
    return _section_at(notebook, notebook.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _section_at(notebook: Path, _changed: int) -> type[BaseModel]:
    defaults = read_defaults(notebook)
    fields: dict[str, Any] = {
        name: (_type_of(notebook.stem, name, default, annotation), ...)
        for name, (default, annotation) in defaults.items()
        if name != "profile"  # which the pipeline adds
    }
    base = DiscoverOptions if notebook.stem == "discover" else _Section
    return create_model(notebook.stem, __base__=base, **fields)


def _type_of(stem: str, name: str, default: Any, annotation: list[str]) -> Any:
    kind = RULES.get(f"{stem}.{name}", RULES.get(name))
    if kind is None and annotation:
        kind = functools.reduce(operator.or_, (TYPES[part] for part in annotation if part != "None"))
    elif kind is None and isinstance(default, dict):
        fields: dict[str, Any] = {key: (_type_of(stem, key, value, []), ...) for key, value in default.items()}
        kind = create_model(name, __config__=_Section.model_config, **fields)
    elif kind is None and isinstance(default, list):
        kind = _several(_type_of(stem, "", default[0], []))
    elif kind is None:
        kind = TYPES[type(default).__name__]
    return kind | None if "None" in annotation else kind


def _read(path: Path) -> dict[str, Any]:
    where = f"{path.parent.name}/{path.name}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {where}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds {type(content).__name__}, expected a mapping")
    return content


def _validate(kind: type[Any], content: Mapping[str, Any], where: str) -> Any:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(explain_invalid(where, error)) from error
