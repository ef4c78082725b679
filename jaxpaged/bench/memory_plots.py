"""Pictures of KV memory: what lies in it over time, what sharing saves, who holds which page. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.collections import PatchCollection
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from jaxpaged.bench.memory import SLOTS, Run, shares
from jaxpaged.engine.page_map import PageInfo

TOKENS, WASTE, FREE, CACHED = "#2b6cb0", "#e8a33d", "#eceef1", "#a9c9a4"
SHARED = ("#e0673a", "#a3243b")  # by two or three, by more
EMPTY = "#c9d9ec"  # the part of a held page that holds no token yet
INK, FAINT = "#22262b", "#6b7280"

STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c4c8ce",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "figure.dpi": 144,
}


def waste_over_time(runs: Mapping[str, Run], title: str, path: Path) -> None:
    """For each way to give memory away a panel: the shares that hold tokens, hold none, and are free, step by step."""
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            len(runs), 1, figsize=(9, 1.75 * len(runs) + 1), sharey=True, layout="constrained"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        for panel, (name, run) in zip(panels, runs.items(), strict=True):
            steps = range(len(run.seen))
            used = [memory.used / SLOTS for memory in run.seen]
            held = [memory.held / SLOTS for memory in run.seen]
            panel.fill_between(steps, 0, used, color=TOKENS, linewidth=0)
            panel.fill_between(steps, used, held, color=WASTE, linewidth=0)
            panel.fill_between(steps, held, 1, color=FREE, linewidth=0)
            means = shares(run)
            panel.set_title(name, loc="left", fontsize=10.5, fontweight="bold")
            said = f"{means['useful_of_all']:.1%} of memory holds tokens, {means['in_flight']:.0f} requests at once"
            panel.set_title(said, loc="right", fontsize=9, color=FAINT)
            panel.margins(0)
            panel.set_ylim(0, 1)
            panel.yaxis.set_major_formatter(PercentFormatter(1))
            panel.set_yticks([0, 0.5, 1])
            panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panels[-1].set_xlabel("step, while requests wait")
        names = {TOKENS: "holds a token", WASTE: "held, holds none", FREE: "free"}
        _legend(figure, names)
        save(figure, path)


def sharing(saved: Mapping[str, Mapping[int, float]], title: str, path: Path) -> None:
    """A group of bars for each number of completions or beams: the memory that sharing spares. {kind: {n: share}}"""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        colors = (TOKENS, WASTE)
        width = 0.8 / len(saved)
        for index, (kind, by_n) in enumerate(saved.items()):
            where = [x + (index - (len(saved) - 1) / 2) * width for x in range(len(by_n))]
            bars = axes.bar(where, list(by_n.values()), width * 0.92, color=colors[index], label=kind)
            axes.bar_label(bars, [f"{share:.0%}" for share in by_n.values()], padding=2, fontsize=9.5)
            axes.set_xticks(range(len(by_n)), [str(n) for n in by_n])
        axes.set_xlabel("completions, or beams, of each request")
        axes.set_ylabel("memory saved by sharing pages")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(0, 1)
        axes.tick_params(length=0)
        axes.legend(frameon=False, loc="upper left", ncols=len(saved))
        save(figure, path)


def page_map(pages: Sequence[PageInfo], page_size: int, title: str, path: Path) -> None:
    """A cell for each page in order, filled as far as it holds tokens, coloured by who holds it."""
    columns = max(1, round((len(pages) * 1.6) ** 0.5))
    rows = -(-len(pages) // columns)
    kinds: dict[str, str] = {
        TOKENS: "held by one sequence",
        SHARED[0]: "shared by 2 or 3",
        SHARED[1]: "shared by 4 or more",
        CACHED: "cached: nobody's, found again",
        FREE: "free",
    }
    counts = dict.fromkeys(kinds, 0)
    cells: dict[str, list[Rectangle]] = {color: [] for color in (FREE, EMPTY, *kinds)}  # drawn in this order
    for place, page in enumerate(pages):
        color = _color(page)
        counts[color] += 1
        x, y = place % columns, rows - 1 - place // columns
        cells[EMPTY if page.state == "held" else FREE].append(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88))
        if color != FREE:
            cells[color].append(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88 * page.num_tokens / page_size))
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(9, 8.7 * rows / columns + 1), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        for color, patches in cells.items():
            axes.add_collection(PatchCollection(patches, facecolor=color, linewidth=0))
        axes.set(xlim=(0, columns), ylim=(0, rows), aspect="equal")
        axes.axis("off")
        _legend(figure, {color: f"{name}: {counts[color]:,}" for color, name in kinds.items()})
        save(figure, path)


def _color(page: PageInfo) -> str:
    match page.state:
        case "held":
            holders = len(page.holders)
            return TOKENS if holders < 2 else SHARED[holders >= 4]
        case "cached":
            return CACHED
    return FREE


def _legend(figure: Any, names: Mapping[str, str]) -> None:
    patches = [Patch(facecolor=color, label=name) for color, name in names.items()]
    figure.legend(handles=patches, loc="outside lower left", ncols=3, frameon=False, fontsize=9, handlelength=1)


def save(figure: Any, path: Path) -> None:
    """Write the picture and let go of it."""
    figure.savefig(path, facecolor="white")
    pyplot.close(figure)
