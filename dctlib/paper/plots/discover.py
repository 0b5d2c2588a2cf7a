"""What an unsupervised search found: how much each vector does, and which ones point one way."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dctlib.paper.plots import COLOURS, panels, style


def ranked_vectors(table: pd.DataFrame, floor: float, labelled: int = 6) -> Figure:
    """Effect on the next token by rank; and against the change at the target layer, the strongest clusters named.

    Parameters
    ----------
    table : DataFrame
        Columns ``divergence``, ``change``, ``next`` and ``alike``, the most interesting vector first.
    floor : float
        Divergence of the best of as many random vectors of the same length.
    labelled : int
        Clusters whose first vector is labelled with the token that it makes the model say next.
    """
    with style():
        figure, (left, right) = panels(2, height=2.8, ratios=(2, 3))
        ranked = np.sort(table["divergence"].to_numpy())[::-1]
        left.plot(np.arange(1, len(ranked) + 1), ranked, color=COLOURS["DCT"], lw=1.5)
        left.axhline(floor, color=COLOURS["random"], lw=1, ls="--")
        left.annotate(
            "best random vector",
            (1, floor),
            xytext=(0, 3),
            textcoords="offset points",
            color=COLOURS["random"],
            fontsize=8,
        )
        left.set(xlabel="rank of the vector", ylabel="KL of the next token (nats)", ylim=(0, None))
        first = table.drop_duplicates("alike")
        right.scatter(table["change"], table["divergence"], s=8, color="0.8", linewidths=0)
        right.scatter(first["change"], first["divergence"], s=12, color="0.5", linewidths=0)
        named = first.head(labelled)
        colours = sns.color_palette("colorblind", len(set(named["next"])))
        for (token, rows), colour in zip(named.groupby("next", sort=False), colours, strict=True):
            (dots,) = right.plot(rows["change"], rows["divergence"], "o", ms=5, color=colour, mew=0)
            dots.set_label(f"{token!r} ({len(rows)})")
        legend = right.legend(
            title=f"next token of the first {len(named)}", fontsize=8, title_fontsize=8, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        right.set(xlabel="length of the change at layer t", ylabel="KL of the next token (nats)", ylim=(0, None))
        if len(first) < len(table):
            right.set_title("dark: the first of each cluster", loc="left", color="0.4", fontsize=8)
        sns.despine(figure)
    return figure
