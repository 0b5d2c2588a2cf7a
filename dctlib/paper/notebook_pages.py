"""Executed notebooks as light pages: prose, formulas, folded code, outputs, and links to the saved figures."""

import base64
import hashlib
import re
from pathlib import Path

import jinja2
import nbformat
import pypandoc
import yaml
from nbconvert.filters import strip_ansi

from dctlib._io import ROOT, atomic_path

_UP = "../../.."  # from writeup/<profile>/notebooks to the root of the repository
_STYLE = "../../paper.css"


def write_page(notebook: nbformat.NotebookNode, stem: str, profile: str, root: Path = ROOT) -> Path:
    """Write writeup/<profile>/notebooks/<stem>.html from an executed notebook, and the index beside it.

    The page needs no network. It shows the file in figures/<profile>/ that has the same bytes as a figure, with a link
    to the SVG beside it. It holds an image itself only where no file does.

    Returns
    -------
    Path
        The page.
    """
    figures = root / "figures" / profile
    saved = {hashlib.sha256(path.read_bytes()).digest(): path.name for path in sorted(figures.glob("*.png"))}

    def figure(encoded: str) -> str:
        name = saved.get(hashlib.sha256(base64.b64decode(encoded)).digest())
        if name is None:
            return f"![{stem}](data:image/png;base64,{''.join(encoded.split())})"
        path = f"{_UP}/figures/{profile}/{name}"
        return f"[![{stem}]({path})]({path.removesuffix('.png')}.svg)"

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dctlib.paper", "."),
        autoescape=False,  # the output is Markdown; what a model said stands in fences or in pandas' escaped tables
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fenced": _fenced, "table": _plain_table, "strip_ansi": strip_ansi}
    prose = environment.get_template("notebook_page.md.j2").render(
        cells=notebook.cells, stem=stem, profile=profile, up=_UP, figure=figure
    )
    page = root / "writeup" / profile / "notebooks" / f"{stem}.html"
    _write_html(page, prose, f"{stem}, profile {profile}")
    _write_index(page.parent, profile, root)
    return page


def _write_index(folder: Path, profile: str, root: Path) -> None:
    """Write index.html: the pages in a folder, in the order of the profile, each with its title."""
    pages = {path.stem for path in folder.glob("*.html")} - {"index"}
    sections = yaml.safe_load((root / "params" / f"{profile}.yaml").read_text(encoding="utf-8"))
    listed = [stem for stem in sections if stem in pages]
    lines = [f"- [{_title(root / 'notebooks' / f'{stem}.ipynb')}]({stem}.html) ({stem})" for stem in listed]
    text = "\n".join(
        [
            "# Executed notebooks",
            "",
            f"Each page shows one notebook as the profile *{profile}* ran it. Its code is folded.",
            "",
            *lines,
        ]
    )
    _write_html(folder / "index.html", text, f"Executed notebooks, profile {profile}")


def _title(path: Path) -> str:
    """Return the first line of a notebook, its title, or its name."""
    first = next(iter(nbformat.read(path, as_version=4).cells), None)
    title = first.source.splitlines()[0] if first and first.source else ""
    return title.removeprefix("# ") if title.startswith("# ") else path.stem


def _write_html(path: Path, prose: str, title: str) -> None:
    """Render Markdown as Jupyter reads it, CommonMark with formulas, which become MathML."""
    html = pypandoc.convert_text(
        prose,
        "html5",
        format="commonmark_x-smart",
        extra_args=[
            "--standalone",
            "--mathml",
            f"--css={_STYLE}",
            f"--metadata=pagetitle:{title}",
            "--metadata=lang:en",
        ],
    )
    html = re.sub(r'href="(\w+)\.ipynb"', r'href="\1.html"', html)  # one notebook names another
    with atomic_path(path) as partial:
        partial.write_text(html, encoding="utf-8")


def _fenced(text: str, kind: str) -> str:
    """Return a block that no line of the text can end."""
    fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {kind}\n{text.rstrip()}\n{fence}"


def _plain_table(html: str) -> str:
    """Drop the style sheet and the borders that pandas gives each table."""
    return re.sub(r"<style[^>]*>.*?</style>\s*", "", html, flags=re.DOTALL).replace(' border="1"', "")
