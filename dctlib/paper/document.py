"""Documents: a template with the numbers and figures of a profile, rendered as HTML and PDF."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pypandoc
import typst

from dctlib._io import ROOT, atomic_path
from dctlib.evaluation.statistics import wilson
from dctlib.paper.claims import RULES, compare_with_published, published_numbers
from dctlib.paper.params import load_profile


def write_report(profile: str, root: Path = ROOT, *, document: str = "paper") -> list[Path]:
    """Render writeup/<document>.md with the numbers of a profile as HTML and PDF in writeup/<profile>/.

    The names of the template are every figures/<profile>/<stem>.json under its stem, ``published``
    (writeup/published.yaml), ``beside`` (stem → :class:`dctlib.paper.claims.Replication`), ``params`` and ``profile``.

    Returns
    -------
    list of Path
        The HTML and the PDF.

    Raises
    ------
    ValueError
        If there is no such document, or a metrics file or a number in it is missing.
    """
    if not (root / "writeup" / f"{document}.md").is_file():
        documents = ", ".join(sorted(path.stem for path in (root / "writeup").glob("*.md")))
        raise ValueError(f"no document {document!r}: expected one of {documents} (writeup/*.md)")
    metrics = dict(_metrics(root / "figures" / profile))
    replicated = {stem: compare_with_published(stem, metrics[stem]) for stem in RULES if stem in metrics}
    params = load_profile(profile, root)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(root / "writeup"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        comment_start_string="<#",  # {# would take Pandoc's {#label} for a comment
        comment_end_string="#>",
        autoescape=False,  # the output is Markdown; model text goes through the `text` filter
    )
    environment.filters |= {"number": number, "percent": percent, "row": row, "text": markdown_text}
    environment.globals |= {"wilson": wilson, "comb": math.comb}
    try:
        prose = environment.get_template(f"{document}.md").render(
            **metrics,
            beside=replicated,
            published=published_numbers(),
            params=params,
            profile=profile,
            figures=f"../../figures/{profile}",
        )
    except jinja2.UndefinedError as error:
        raise ValueError(f"writeup/{document}.md needs a number that figures/{profile}/ lacks: {error}") from error
    folder = root / "writeup" / profile
    html, pdf = folder / f"{document}.html", folder / f"{document}.pdf"
    with atomic_path(html) as partial:
        _pandoc(
            prose,
            "html5",
            folder,
            partial,
            ["--standalone", "--mathml", "--embed-resources", "--toc", f"--css={root / 'writeup' / 'paper.css'}"],
        )
    with atomic_path(pdf) as partial:
        source = folder / f".{document}.typ"
        try:
            _pandoc(prose, "typst", folder, source, ["--standalone"])
            # Without a date the same numbers make the same bytes; and long tables may go on on the next page.
            rules = "#set document(date: none)\n#show figure.where(kind: table): set block(breakable: true)\n"
            source.write_text(rules + source.read_text(encoding="utf-8"), encoding="utf-8")
            partial.write_bytes(typst.compile(str(source), root=str(root)))
        finally:
            source.unlink(missing_ok=True)
    return [html, pdf]


def number(value: float, digits: int = 1) -> str:
    """Format a signed decimal with a true minus sign."""
    zero = f"{0:.{digits}f}"
    shown = f"{value:+.{digits}f}".replace("-", "−") if value else zero
    return zero if shown[1:] == zero else shown


def percent(value: float) -> str:
    """Format a fraction of 1 as a percentage without a line break."""
    return f"{100 * value:.0f}\u00a0%"


def row(table: Sequence[Mapping[str, Any]], **columns: Any) -> Mapping[str, Any]:
    """Return the one row of a table whose columns have these values."""
    found = [each for each in table if columns.items() <= each.items()]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows of a table hold {columns}, expected one")
    return found[0]


def markdown_text(value: str) -> str:
    """Escape a model's text for Markdown and HTML, and let very long words break."""
    words = re.sub(r"(\S{24})(?=\S)", "\\1\u200b", " ".join(value.split()))
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|<>~^$&@'\"" else c for c in words)


def _metrics(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield path.stem, json.loads(path.read_text(encoding="utf-8"))


def _pandoc(prose: str, to: str, folder: Path, output: Path, options: list[str]) -> None:
    options = [*options, f"--resource-path={folder}"]
    pypandoc.convert_text(prose, to, format="markdown", outputfile=str(output), extra_args=options)
