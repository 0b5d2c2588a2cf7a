"""The command line: ``python -m dctlib``. Each stage of dvc.yaml is one of these commands."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ProfileOption = Annotated[
    str, typer.Option(help="A file in params/, without .yaml. Left out: what params/run.yaml names.")
]


@app.command()
def assets() -> None:
    """Fetch the pinned data and model, and check them."""
    from dctlib.models import assets as pinned

    for name, asset in pinned.ASSETS.items():
        if not asset.on_demand:
            print(f"{name}: {pinned.fetch(name)}")
    for name in pinned.MODELS:
        print(f"{name}: {pinned.fetch_model(name)}")


@app.command()
def run(notebook: str, profile: ProfileOption = "") -> None:
    """Execute one notebook with the parameters of a profile, into runs/<profile>/."""
    from dctlib.paper.params import load_run
    from dctlib.paper.pipeline import run_notebook

    print(f"executed {run_notebook(notebook, profile or load_run().profile)}")


@app.command()
def discover(
    model: Annotated[
        str, typer.Option(help="A Hub id (owner/name@revision), a local folder, or smollm2-135m-instruct.")
    ],
    prompts: Annotated[
        str, typer.Option(help="A text file with one instruction a line; or `harmful` or `benign`, the pinned sets.")
    ],
    name: Annotated[
        str, typer.Option(help="Names the folders, runs/NAME and so on, of what is found. Left out: the model's name.")
    ] = "",
    fit_prompts: Annotated[int, typer.Option(help="Instructions to fit, the first of the file. 4 to 12 suffice.")] = 4,
    validation: Annotated[
        int, typer.Option(help="Instructions after those: vectors are measured and read on them.")
    ] = 8,
    source: Annotated[
        int | None,
        typer.Option(help="Layer to add vectors at, as in hidden_states. Left out: three slices are scanned."),
    ] = None,
    target: Annotated[int | None, typer.Option(help="Layer to measure at, about a third of the model deeper.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="exponential, the post's best; quadratic; or linear, exact: a backward pass for each coordinate of "
            "the residual stream, however few factors."
        ),
    ] = "exponential",
    num_factors: Annotated[int, typer.Option(help="Width m of the fit: the more, the rarer what it finds.")] = 64,
    iterations: Annotated[int, typer.Option(help="Of the fit.")] = 10,
    nonlinearity: Annotated[
        float, typer.Option(help="λ, which sets the vectors' length R. Lower it if completions are word salad.")
    ] = 0.5,
    rank_by: Annotated[
        str,
        typer.Option(
            help="fluent (how often it says something fluent and new), divergence (of the next token), change (at the "
            "target layer), alpha, or score (of words)."
        ),
    ] = "fluent",
    words: Annotated[
        tuple[str, str] | None,
        typer.Option(help="What to score, if you know: a positive and a negative one-token word."),
    ] = None,
    shown: Annotated[int, typer.Option(help="Vectors to show: the first of each cluster.")] = 12,
    answer_tokens: Annotated[int, typer.Option(help="Length of completions.")] = 32,
    shown_characters: Annotated[int, typer.Option(help="To which completions are cut in all that is stored.")] = 400,
    dtype: Annotated[
        str, typer.Option(help="native (bfloat16 where the hardware has it), float32 or bfloat16.")
    ] = "native",
    seed: Annotated[int, typer.Option(help="Of the directions that everything starts from.")] = 0,
) -> None:
    """Find what a model hides: fit a transcoder, rank its vectors with no target word, and read what they unlock.

    This runs notebooks/discover.ipynb. It leaves runs/NAME/discover_explorer.html to browse, runs/NAME/discover.html to
    read, and vectors/NAME/discover to share. Fits are remembered: a second run with another ranking is quick.

    Example: python -m dctlib discover --model Qwen/Qwen2.5-0.5B-Instruct --prompts mine.txt
    """
    from dctlib._io import ROOT
    from dctlib.paper.params import check_parameters, read_defaults
    from dctlib.paper.pipeline import execute

    name = name or re.sub(r"[^\w.-]", "-", Path(model.partition("@")[0]).name)
    if not re.fullmatch(r"\w[\w.-]*", name) or (ROOT / "params" / f"{name}.yaml").exists():
        raise ValueError(f"got --name {name!r}, expected letters and digits, and not the name of a profile in params/")
    names = read_defaults(ROOT / "notebooks" / "discover.ipynb")
    values = {key: value for key, value in locals().items() if key in names and key != "profile"}
    for key in ("model", "prompts"):
        if (path := Path(values[key])).exists():
            values[key] = str(path.resolve())
    parameters = check_parameters("discover", {**values, "strengths": [1.0, 0.5, 1.5]}, "discover")
    print(f"executed {execute('discover', name, parameters)}")


@app.command()
def study(
    profile: Annotated[str, typer.Option(help="A file in params/, without .yaml.")] = "study",
    stage: Annotated[str | None, typer.Option(help="The only stage to work on.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Start no cell later than this.", min=0)] = None,
) -> None:
    """Compute the cells of the study that have no record yet, until done or stopped (Ctrl-C or SIGTERM)."""
    from dctlib.paper.study import run_study

    run_study(profile, stage=stage, minutes=minutes)


@app.command()
def verify_records(
    profile: Annotated[str, typer.Option(help="A file in params/, without .yaml.")] = "study",
    sample: Annotated[int, typer.Option(help="How many recorded cells to compute again.", min=1)] = 3,
    seed: Annotated[int | None, typer.Option(help="Which ones. Left out: other ones every day.")] = None,
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
    """Run the command line; what the user can mend is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:  # OSError: a full disk
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
