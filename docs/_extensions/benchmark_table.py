"""``{benchmark-table} NAME``: what the last run of a benchmark found, as ratios to its baseline.

A row for each case, a column for each rival. The figures are those of ``_static/benchmarks/results.md``, which
``python -m benchmarks --output docs/_static/benchmarks`` writes.

:metric: of those that the benchmark yields; by default the first, which is also the one that is drawn.
:chart: what the benchmark's chart shows; it then comes before the table.

A run need not have had all benchmarks; of one that it lacks, the page says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent.parent
RESULTS = DOCS / "_static" / "benchmarks" / "results.md"
BENCHMARKS = DOCS.parent / "benchmarks"
NON_BREAKING_HYPHEN = "\N{NON-BREAKING HYPHEN}"


class Figure(NamedTuple):
    case: str
    metric: str
    rival: str
    value: str
    ratio: str  # to the first baseline; empty for the baseline itself


def figures(results: str, benchmark: str) -> Iterator[Figure]:
    """The rows of the table that follows the command for this benchmark."""
    _, found, rest = results.partition(f"\n`python -m benchmarks {benchmark}`\n")
    if not found:
        raise LookupError(f"there is no benchmark {benchmark} in {RESULTS}")
    table = rest.partition("\n## ")[0].strip().splitlines()
    for line in table[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        case, metric, rival, value = cells[:4]
        yield Figure(case, metric, rival, value, cells[4] if len(cells) > 4 else "")


class BenchmarkTable(SphinxDirective):
    required_arguments = 1
    option_spec: ClassVar = {"metric": directives.unchanged, "chart": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(RESULTS))
        name = self.arguments[0]
        if not (BENCHMARKS / f"{name}.py").exists():
            raise self.error(f"there is no benchmark {name}")
        try:
            rows = list(figures(RESULTS.read_text(), name))
        except LookupError:
            return [nodes.paragraph("", "", nodes.emphasis("", f"The last run did not include the benchmark {name}."))]
        except OSError as error:
            raise self.error(str(error)) from None
        named = next(row.metric for row in rows if row.metric)
        wanted = self.options.get("metric", named.partition(" (")[0])
        chosen = [row for row in rows if row.metric.partition(" (")[0] == wanted]
        if not chosen:
            raise self.error(f"{name} does not yield {wanted}")
        unit = re.sub(r"^.* \((.*)\)$", r"\1", chosen[0].metric)
        baseline = next(row.rival for row in chosen if not row.ratio)
        cases = dict.fromkeys(row.case for row in chosen)
        rivals = [baseline, *dict.fromkeys(row.rival for row in chosen if row.rival != baseline)]
        # a line may end before the quartiles, but not within
        cells = {(row.case, row.rival): (row.ratio or row.value).replace("-", NON_BREAKING_HYPHEN) for row in chosen}
        header = [f"{wanted}", f"{baseline}, {unit}", *(f"{rival}, ratio" for rival in rivals[1:])]
        body = [[case, *(cells.get((case, rival), "") for rival in rivals)] for case in cases]
        chart = f"_static/benchmarks/{name}.svg"
        alt = f"Chart of {name}: {self.options.get('chart')}"
        return [*([nodes.image(uri=chart, alt=alt)] if "chart" in self.options else []), table(header, body)]


def table(header: list[str], body: Iterable[list[str]]) -> nodes.table:
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=1) for _ in header]
    group += nodes.thead("", row(header))
    group += nodes.tbody("", *map(row, body))
    return nodes.table("", group)


def row(cells: Iterable[str]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", cell)) for cell in cells))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("benchmark-table", BenchmarkTable)
    return {"parallel_read_safe": True}
