"""One chart a benchmark: the ratio to the first baseline of what it measures first, with quartiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ._model import Benchmark


def draw(name: str, benchmark: Benchmark, cases: Mapping[str, Any], directory: Path) -> None:
    """Write ``directory/name.png`` and ``.svg``, or nothing if there is nothing to compare."""
    metric = next(iter(benchmark.metrics))
    baseline = benchmark.baselines[0]
    bars: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for place, case in enumerate(cases.values()):
        for rival, figures in case["metrics"][metric].items():
            ratio = figures["ratios"].get(baseline)
            if ratio is not None:
                bars.setdefault(rival, []).append((place, ratio))
    if not bars:
        return
    height = 0.8 / len(bars)
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.32 * len(cases) * len(bars)), layout="constrained")
    for index, (rival, ratios) in enumerate(bars.items()):
        medians = [ratio["median"] for _, ratio in ratios]
        axes.barh(
            [place + (index - (len(bars) - 1) / 2) * height for place, _ in ratios],
            medians,
            height=height * 0.9,
            xerr=[
                [max(0.0, ratio["median"] - ratio["q1"]) for _, ratio in ratios],
                [max(0.0, ratio["q3"] - ratio["median"]) for _, ratio in ratios],
            ],
            error_kw={"elinewidth": 0.8, "alpha": 0.6},
            label=rival,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    better = benchmark.metrics[metric].better
    axes.set_xlabel(f"{metric}, ratio to {baseline} ({better} is better; median and quartiles)")
    axes.set_title(benchmark.title)
    axes.legend()
    for kind in ("png", "svg"):
        figure.savefig(directory / f"{name}.{kind}", dpi=120)
    plt.close(figure)
