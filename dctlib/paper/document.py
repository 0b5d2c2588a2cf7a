"""Documents: a template with the numbers and figures of a profile, rendered as HTML and PDF."""

import json
import math
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pypandoc
import typst
import yaml

from dctlib._io import ROOT, atomic_path
from dctlib.evaluation.statistics import wilson
from dctlib.paper.claims import RULES, compare_with_published, published_numbers
from dctlib.paper.params import load_profile

_TYPST_RULES = """
#set document(date: none) // the same numbers make the same bytes
#show table: set par(justify: false)
#show table: set text(hyphenate: false)
#show figure.caption: set align(left)
#show figure.caption.where(kind: table): set block(sticky: true)
#show figure.where(kind: table): it => {
  // A table of more than 16 rows may continue on the next page. Others stay together, with their captions.
  let table = it.body.body
  let columns = if type(table.columns) == array { table.columns.len() } else { table.columns }
  set block(breakable: table.children.len() > 16 * columns)
  it
}
"""


def write_report(profile: str, root: Path = ROOT, *, document: str = "paper") -> list[Path]:
    """Render writeup/<document>.md with the numbers of a profile as HTML and PDF in writeup/<profile>/.

    A template can use each figures/<profile>/<stem>.json under the name ``<stem>``, and these names: ``published``
    (writeup/published.yaml); ``replications``, a stem → its :class:`dctlib.paper.claims.Replication`, the headline
    claims first; ``params`` and ``profile``; ``study``, a stem → figures/study/<stem>.json, with ``study_params`` and
    ``study_replications``; ``authors`` (CITATION.cff); and ``revision``, the last commit of the sources with its date,
    or None outside a git repository. Citations are resolved from writeup/references.bib. Sections are numbered.

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
    study = dict(_metrics(root / "figures" / "study"))
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
            replications=replicated,
            published=published_numbers(),
            params=params,
            profile=profile,
            figures=f"../../figures/{profile}",
            study=study,
            study_replications={stem: compare_with_published(stem, study[stem]) for stem in RULES if stem in study},
            study_params=load_profile("study", root),
            authors=_authors(),
            revision=_revision(root),
        )
    except jinja2.UndefinedError as error:
        raise ValueError(f"writeup/{document}.md needs a number that figures/{profile}/ lacks: {error}") from error
    folder = root / "writeup" / profile
    prose = _link_notebooks(prose, folder)
    citations = ["--citeproc", f"--bibliography={root / 'writeup' / 'references.bib'}", "--metadata=link-citations"]
    html, pdf = folder / f"{document}.html", folder / f"{document}.pdf"
    with atomic_path(html) as partial:
        _pandoc(
            prose,
            "html5",
            folder,
            partial,
            [
                *citations,
                "--standalone",
                "--mathml",
                "--embed-resources",
                "--toc",
                "--number-sections",
                f"--css={root / 'writeup' / 'paper.css'}",
            ],
        )
    with atomic_path(pdf) as partial:
        source = folder / f".{document}.typ"
        try:
            _pandoc(prose, "typst", folder, source, [*citations, "--standalone", "--number-sections"])
            source.write_text(_TYPST_RULES + source.read_text(encoding="utf-8"), encoding="utf-8")
            partial.write_bytes(typst.compile(str(source), root=str(root)))
        finally:
            source.unlink(missing_ok=True)
    return [html, pdf]


def number(value: float, digits: int = 1) -> str:
    """Format a decimal with its sign, and with the minus sign of typography."""
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


def _link_notebooks(prose: str, folder: Path) -> str:
    """Link a notebook itself where writeup/<profile>/ holds no page of it."""

    def target(link: re.Match[str]) -> str:
        return link[0] if (folder / link[1]).exists() else f"](../../notebooks/{Path(link[1]).stem}.ipynb)"

    return re.sub(r"\]\((notebooks/\w+\.html)\)", target, prose)


def _metrics(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield path.stem, json.loads(path.read_text(encoding="utf-8"))


def _authors() -> list[str]:
    """Return the names of the authors in CITATION.cff."""
    people = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["authors"]
    return [each.get("name") or f"{each['given-names']} {each['family-names']}" for each in people]


def _revision(root: Path) -> dict[str, str] | None:
    """Return the last commit of the sources behind the documents and its date, or None outside a git repository."""
    command = ["git", "-C", str(root), "log", "-1", "--format=%h %cs", "--", "dctlib", "notebooks", "params"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    commit, _, date = done.stdout.strip().partition(" ")
    return {"commit": commit, "date": date} if commit else None


def _pandoc(prose: str, to: str, folder: Path, output: Path, options: list[str]) -> None:
    options = [*options, f"--resource-path={folder}"]
    pypandoc.convert_text(prose, to, format="markdown", outputfile=str(output), extra_args=options)
