"""Where in depth to fit, and how deep a slice."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dctlib.evaluation.statistics import Interval
from dctlib.paper.plots import errorbar, panels, style


def deeper_models(found: pd.DataFrame) -> Figure:
    """Test score of the best vector by source layer, one line a depth horizon t − s, one panel a model.

    Parameters
    ----------
    found : DataFrame
        Columns ``model``, ``source``, ``horizon``, ``mean``, ``low``, ``high`` and ``clean``.
    """
    with style():
        models = list(found["model"].unique())
        figure, axes = panels(len(models), height=2.7, ratios=[1] * len(models), width=4.6 if len(models) == 1 else 7.0)
        colours = sns.color_palette("viridis", len(set(found["horizon"])) + 1)
        for panel, model in zip(axes, models, strict=True):
            rows: pd.DataFrame = found[found["model"] == model]  # pyright: ignore[reportAssignmentType]
            for place, (horizon, cells) in enumerate(rows.groupby("horizon")):
                at = cells["source"].to_numpy() + 0.25 * (place - (len(set(rows["horizon"])) - 1) / 2)
                panel.plot(at, cells["mean"].to_numpy(), color=colours[place], lw=1.2, label=f"t − s = {horizon}")
                for x, *mean in zip(at, cells["mean"], cells["low"], cells["high"], strict=True):
                    errorbar(panel, float(x), Interval(*mean), color=colours[place])
            clean = max(rows["clean"])
            panel.axhline(clean, color="0.5", lw=1, ls=":")
            panel.annotate(
                "no vector",
                (min(rows["source"]), clean),
                xytext=(0, 3),
                textcoords="offset points",
                color="0.4",
                fontsize=8,
            )
            panel.set_xticks(sorted(set(rows["source"])))
            folder, _, name = str(model).rpartition("/")
            title = f"{name} organism" if folder.startswith("models") else name
            panel.set(title=title, xlabel="source layer s", ylabel="test score of the best vector")
        axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        sns.despine(figure)
    return figure
