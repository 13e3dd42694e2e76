"""Results as data, as JSON and as a Markdown table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ._contest import Outcome
    from ._model import Benchmark

PACKAGES = ("trio", "trio-aiopoll", "cffi", "uvloop", "hypercorn")


def environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    models = [
        line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")
    ]
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": models[0] if models else None,
        "cpus": os.cpu_count(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": versions,
        "load average": os.getloadavg(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def quartiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) == 1:
        return {"q1": values[0], "median": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def ratios(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float] | None:
    """Quartiles of the rounds' ratios, each round being divided by the baseline's round next to it."""
    pairs = [ours / theirs for ours, theirs in zip(values, baseline, strict=True) if theirs]
    return quartiles(pairs) if pairs else None


def summarize(benchmark: Benchmark, outcome: Outcome) -> dict[str, Any]:
    """One case: for each metric and rival the quartiles of the values, and of the ratios to each baseline."""
    metrics: dict[str, Any] = {}
    for metric in benchmark.metrics:
        values = {rival: [sample[metric] for sample in samples] for rival, samples in outcome.rounds.items()}
        metrics[metric] = {
            rival: {
                **quartiles(own),
                "ratios": {
                    baseline: ratios(own, values[baseline])
                    for baseline in benchmark.baselines
                    if baseline in values and baseline != rival
                },
                "rounds": own,
            }
            for rival, own in values.items()
        }
    return {"metrics": metrics, "failed": outcome.failed}


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}".rstrip("0").rstrip(".")


def _spread(of: Mapping[str, float], form: Any = _number) -> str:
    if of["q1"] == of["q3"]:
        return f"{form(of['median'])}"
    return f"{form(of['median'])} ({form(of['q1'])}-{form(of['q3'])})"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(results: Mapping[str, Any], benchmarks: Mapping[str, Benchmark]) -> str:
    about = results["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    lines = [
        "# Benchmarks",
        "",
        f"Linux {about['kernel']} on {about['cpus']} x {about['cpu']}; {about['python']}; {packages}.",
        "",
        "Medians over the rounds, with the quartiles in parentheses. A ratio is that of neighbouring rounds; less than "
        "1 is better than the baseline, where it does not say that more is.",
    ]
    for name, cases in results["benchmarks"].items():
        benchmark = benchmarks[name]
        lines += ["", f"## {benchmark.title}", "", f"`python -m benchmarks {name}`", ""]
        columns = ["case", "metric", "rival", "value", *(f"ratio to {baseline}" for baseline in benchmark.baselines)]
        lines += [_row(columns), _row("---" for _ in columns)]
        for label, case in cases.items():
            for metric, rivals in case["metrics"].items():
                about_metric = benchmark.metrics[metric]
                unit = about_metric.unit + (", more is better" if about_metric.better == "higher" else "")
                for rival, figures in rivals.items():
                    compared = [figures["ratios"].get(baseline) for baseline in benchmark.baselines]
                    lines.append(
                        _row(
                            [
                                label,
                                f"{metric} ({unit})",
                                rival,
                                _spread(figures),
                                *(_spread(ratio, _ratio) if ratio else "" for ratio in compared),
                            ]
                        )
                    )
            lines += [_row([label, "", rival, f"failed: {why}"]) for rival, why in case["failed"].items()]
    return "\n".join(lines) + "\n"
