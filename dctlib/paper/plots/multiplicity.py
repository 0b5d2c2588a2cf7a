"""How alike the vectors that unlock the model are."""

from collections.abc import Mapping, Sequence

import seaborn as sns
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from dctlib.paper.plots import COLOURS, panels, style


def multiplicity(V: Tensor, each: Sequence[float], aggregates: Mapping[str, float]) -> Figure:
    """|cosine| of every pair of directions, alike ones beside each other, and their scores beside their aggregates'.

    Parameters
    ----------
    V : Tensor, (m, d)
        Unit directions.
    each : sequence of float
        The score of each direction.
    aggregates : mapping
        Name of an aggregate → its score.
    """
    with style():
        figure, (left, right) = panels(2, height=2.9, ratios=(1, 1))
        rows = V.double().cpu().numpy()
        order = leaves_list(linkage(rows, "average", metric="cosine"))
        image = left.imshow(abs(rows[order] @ rows[order].T), vmin=0, vmax=1, cmap="rocket_r")
        left.set(xlabel="direction, clustered", ylabel="direction, clustered")
        figure.colorbar(image, ax=left, label="|cos|", shrink=0.8)
        right.hist(each, bins=20, color=COLOURS["DCT"], alpha=0.7)
        marks = {"average": sum(each) / len(each), "best": max(each), **aggregates}
        for place, (name, value) in enumerate(marks.items()):
            right.axvline(value, color="0.3", lw=1, ls=["-", "--", ":", "-."][place % 4], label=f"{name} {value:+.1f}")
        right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        right.set(xlabel="mean score, test", ylabel="vectors")
        sns.despine(figure)
    return figure
