"""Curves of k tries, which several figures hold, and the colour that a method has in all of them."""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dctlib.evaluation.statistics import Curve
from dctlib.paper.plots import COLOURS, errorbar, label_ends

_PALETTE = sns.color_palette("colorblind")
_METHODS = {"random": COLOURS["random"], "power steering": _PALETTE[4], "MELBO": _PALETTE[3], "sampling": (0.5,) * 3}


def method_colours(methods: Sequence[str]) -> dict[str, tuple]:
    """A colour each: DCT's variants are shades of its own, the later the darker; what is supervised is dark grey."""
    variants = [method for method in methods if method.startswith("DCT")]
    shades = sns.light_palette(COLOURS["DCT"], 2 * len(variants) + 1)[2::2]
    own = dict(zip(variants, shades, strict=True))
    return {method: own.get(method) or _METHODS.get(method, (0.25,) * 3) for method in methods}


def draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """The rate of each method against k, named at its right end beside the 95 % interval at the last k."""
    colours, most = method_colours(list(curves)), max(len(curve.mean) for curve in curves.values())
    step, ends = 0.025 * most, []
    for place, (method, curve) in enumerate(sorted(curves.items(), key=lambda of: of[1].mean[-1].item())):
        last = curve.at(len(curve.mean))
        dashes = "--" if method in ("random", "sampling") else "-"  # told apart where both lie on the floor
        axes.plot(np.arange(1, len(curve.mean) + 1), curve.mean, color=colours[method], lw=1.5, ls=dashes)
        errorbar(axes, most + step * (place + 1), last, color=colours[method], ms=2.5)
        ends.append((last.mean, method, colours[method]))
    right = most + step * (len(curves) + 1)
    axes.set(xlim=(1, right), ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines["bottom"].set_bounds(1, most)
    axes.set_xticks([tick for tick in axes.get_xticks() if 1 <= tick <= most])
    label_ends(axes, right, ends)
