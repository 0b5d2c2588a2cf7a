"""The command line: ``python -m dctlib``. Each stage of dvc.yaml is one of these commands."""

import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError

from dctlib._io import ROOT, explain_invalid
from dctlib.discovery.options import DiscoverOptions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ProfileOption = Annotated[
    str, typer.Option(help="A file in params/, without .yaml. Left out: what params/run.yaml names.")
]


def _on_the_command_line(kind: Any) -> Any:
    """Return a field's type as typer takes it: str for text or a list, because a list comes from a file."""
    return str if get_origin(kind) in (Union, UnionType) and str in get_args(kind) else kind


def _with_options(options: type[BaseModel]) -> Callable[[Callable], Callable]:
    """Add an option for each field of a pydantic model to a command, which gets them as keyword arguments."""

    def extend(command: Callable) -> Callable:
        own = [each for each in inspect.signature(command).parameters.values() if each.kind is not each.VAR_KEYWORD]
        generated = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.default,
                annotation=Annotated[
                    _on_the_command_line(field.annotation),
                    typer.Option(help=field.description),
                ],
            )
            for name, field in sorted(options.model_fields.items(), key=lambda item: not item[1].is_required())
        ]
        signature = inspect.Signature([*generated, *own])
        command.__dict__["__signature__"] = signature
        command.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
        return command

    return extend


@app.command()
def assets(
    name: Annotated[
        str, typer.Argument(help="One file or model, as qwen2.5-coder-0.5b-instruct. Left out: all the paper needs.")
    ] = "",
) -> None:
    """Fetch the pinned data and model, and check them."""
    from dctlib.models.assets import ASSETS, MODELS, fetch, fetch_model

    every_time = [key for key, asset in ASSETS.items() if not asset.on_demand]
    for key in [name] if name else [*every_time, "smollm2-135m-instruct"]:
        print(f"{key}: {fetch_model(key) if key in MODELS else fetch(key)}")


@app.command()
def run(notebook: str, profile: ProfileOption = "") -> None:
    """Execute one notebook with the parameters of a profile, into runs/<profile>/."""
    from dctlib.paper.params import load_run
    from dctlib.paper.pipeline import run_notebook

    print(f"executed {run_notebook(notebook, profile or load_run().profile)}")


@app.command()
@_with_options(DiscoverOptions)
def discover(
    *,
    name: Annotated[
        str, typer.Option(help="Name of the folders of results, as in runs/NAME. Left out: the model's name.")
    ] = "",
    **values: Any,
) -> None:
    """Find what a model hides: search for vectors that do something, each at a length that breaks little.

    Writes runs/NAME/discover_explorer.html to browse, runs/NAME/discover.json, and vectors/NAME/discover to share.
    A search is remembered: run again with another ranking, it takes seconds and replaces these files. Another search of
    the model goes to runs/NAME-2, and so on. To find nothing is a result, too.

    Example: python -m dctlib discover --model qwen2.5-coder-0.5b-instruct --prompts harmful
    """
    for key in ("model", "prompts"):
        path = Path(values[key])
        if path.exists():
            values[key] = str(path.resolve())
    name = name or re.sub(r"[^\w.-]", "-", Path(values["model"].partition("@")[0]).name)
    if not re.fullmatch(r"\w[\w.-]*", name) or (ROOT / "params" / f"{name}.yaml").exists():
        raise ValueError(f"got --name {name!r}, expected letters and digits, and not the name of a profile in params/")
    try:
        options = DiscoverOptions(**values)
    except ValidationError as error:
        raise ValueError(explain_invalid("discover", error)) from error

    from dctlib.discovery.discover import DiscoveryPaths
    from dctlib.discovery.discover import discover as run_discovery
    from dctlib.evaluation.judges import truncate
    from dctlib.models.loading import silence_transformers

    silence_transformers()
    found, paths = run_discovery(options, DiscoveryPaths(ROOT, name))
    print(f"\n{found.explanation}")
    for number, row in enumerate(found.table.to_dict("records")):
        line = truncate(row["says"], min(80, options.shown_characters))
        score = f"{options.rank_by} {row[options.rank_by]:4.2f}"
        print(f"  {number:>2}  {row['source']:16}  behaviour {row['behaviour']:.0f}  {score}  {line}")
    for purpose, path in {"browse": paths.explorer, "numbers": paths.results, "share": paths.shared}.items():
        print(f"{purpose + ':':9}{os.path.relpath(path)}")
    if len(found.table):
        print(f"next:    python -m dctlib export {os.path.relpath(paths.shared)} 0 --to gguf --output vector.gguf")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="A folder of vectors, such as vectors/NAME/discover.")],
    vector: Annotated[int, typer.Argument(help="The vector's place there, counted from 0.", min=0)],
    to: Annotated[str, typer.Option(help="gguf, repeng, npz, folder or model.")],
    output: Annotated[str, typer.Option(help="The file or folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="For --to model, as for load_model. Left out: the one that FOLDER names.")
    ] = None,
) -> None:
    """Write one vector that was found for another tool.

    Example: python -m dctlib export vectors/NAME/discover 0 --to gguf --output vector.gguf
    """
    from dctlib.exchange.export import export_vector

    print(f"wrote {output}, to use as: {export_vector(folder, vector, to, output, model=model)}")


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="As for load_model: a pinned name, a folder, a GGUF file, a Hub id.")],
    dtype: Annotated[str | None, typer.Option(help="As for load_model.")] = None,
) -> None:
    """Say which capabilities work on a model, each verified against the model itself on a few tokens."""
    from dctlib.discovery.check import check_model
    from dctlib.models.loading import load_model, silence_transformers

    silence_transformers()
    found = check_model(*load_model(model, dtype=dtype))
    for row in found.to_dict("records"):
        print(f"{row['capability']:27}{'works' if row['works'] else 'refused':9}{row['detail']}")
    if not all(found["works"]):
        print("docs/families.md says what each refusal means, and how to add a layout")


@app.command()
def study(
    profile: Annotated[str, typer.Option(help="A file in params/, without .yaml.")] = "study",
    stage: Annotated[str | None, typer.Option(help="The only stage to work on.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes after which no cell is started.", min=0)] = None,
) -> None:
    """Compute the cells of the study that have no record yet, until done or stopped (Ctrl-C or SIGTERM)."""
    from dctlib.paper.study import run_study

    run_study(profile, stage=stage, minutes=minutes)


@app.command()
def verify_records(
    profile: Annotated[str, typer.Option(help="A file in params/, without .yaml.")] = "study",
    sample: Annotated[int, typer.Option(help="How many recorded cells to compute again.", min=1)] = 3,
    seed: Annotated[int | None, typer.Option(help="Seed of their choice. Left out: others every day.")] = None,
) -> None:
    """Compute some recorded cells of the study again, and fail if a result does not agree with its record."""
    from datetime import date

    from dctlib.paper.study import verify_records as verify

    verify(profile, sample=sample, seed=date.today().toordinal() if seed is None else seed)


@app.command()
def writeup(
    profile: ProfileOption = "",
    document: Annotated[str, typer.Option(help="A file in writeup/, without .md.")] = "paper",
) -> None:
    """Put the numbers and figures of a profile into a document of writeup/: HTML and PDF."""
    from dctlib.paper.document import write_report
    from dctlib.paper.params import load_run

    for path in write_report(profile or load_run().profile, document=document):
        print(f"wrote {path}")


def main() -> None:
    """Run the command line; errors that the user can fix are printed without a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:  # OSError: a full disk
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
