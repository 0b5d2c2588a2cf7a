"""The command line: ``python -m dctlib``. Each stage of dvc.yaml is one of these commands."""

import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ProfileOption = Annotated[
    str, typer.Option(help="A file in params/, without .yaml. Left out: what params/run.yaml names.")
]


@app.command()
def assets() -> None:
    """Fetch the pinned data and model, and check them."""
    from dctlib import assets as pinned

    for name, asset in pinned.ASSETS.items():
        if not asset.on_demand:
            print(f"{name}: {pinned.fetch(name)}")
    for name in pinned.MODELS:
        print(f"{name}: {pinned.fetch_model(name)}")


@app.command()
def run(notebook: str, profile: ProfileOption = "") -> None:
    """Execute one notebook with the parameters of a profile, into runs/<profile>/."""
    from dctlib.params import current_profile
    from dctlib.pipeline import run_notebook

    print(f"executed {run_notebook(notebook, profile or current_profile())}")


@app.command()
def writeup(profile: ProfileOption = "") -> None:
    """Put the numbers and figures of a profile into the writeup: HTML and PDF."""
    from dctlib.params import current_profile
    from dctlib.report import write_report

    for path in write_report(profile or current_profile()):
        print(f"wrote {path}")


def main() -> None:
    """Run the command line; what the user can mend is one line, not a traceback."""
    try:
        app()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
