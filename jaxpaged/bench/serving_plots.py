"""A picture of a load test: how the times to the first text and between two texts are spread. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from jaxpaged.bench.memory_plots import FAINT, STYLE, TOKENS, WASTE, save
from jaxpaged.bench.serving import Answer


def spread(answers: Sequence[Answer], limits: Mapping[str, float], title: str, path: Path) -> None:
    """For each time a panel: the share of requests, or of gaps, that took at most so long; limits are dashed."""
    good = [answer for answer in answers if answer.error is None]
    panels = {
        ("ttft", "time to first text, ms"): [answer.ttft for answer in good],
        ("itl", "time between two texts, ms"): [gap for answer in good for gap in answer.itl],
    }
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        for one, ((name, label), seconds) in zip(axes, panels.items(), strict=True):
            values = 1e3 * np.sort(seconds)
            one.step(values, np.arange(1, len(values) + 1) / max(1, len(values)), where="post", color=TOKENS)
            if name in limits:
                one.axvline(1e3 * limits[name], color=WASTE, linestyle="--")
            if len(values):
                said = f"median {np.median(values):.3g}, p99 {np.percentile(values, 99):.3g}"
                one.set_title(said, loc="right", fontsize=9, color=FAINT)
            one.set_xlabel(label)
            one.set_xscale("log")
            one.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            one.xaxis.set_minor_formatter(NullFormatter())
            one.yaxis.set_major_formatter(PercentFormatter(1))
            one.set_ylim(0, 1)
        save(figure, path)
