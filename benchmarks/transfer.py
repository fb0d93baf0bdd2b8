"""What tells beforehand how well a formula holds on a model that its search did not see.

Two tables of formulas, each with its exponents (`Metric.units`), the fitness that its search gave
it and its mean relative rise on the unseen model, and the rank correlations of that rise. The first
is of docs/LOG.md: all searches on two models whose results were measured on a third. The second is
made here, if run folders are named: their best members, measured on another model (`found.py`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from found import Measured, relative_rises, settings_of
from tables import conditions, rank_correlation, show, wikitext2_corpora, write_json

from pruning.criterion import Criterion
from pruning.memory import keep_freed_memory
from pruning.metric import Metric
from pruning.operators import Units
from search.journal import RunFolder
from search.population import Record

_SHORT = {
    "F": "colmean(quot(M, G))",
    "C": "quot(G, colmean(W))",
    "R": "quot(G, rowmean(W))",
    "h": "root4(rowmean(H))",
    "DD": "exp(D)",
}

LOGGED = (
    # Found on SmolLM2 and the embedded model.
    ("Gemma", 0.907, 0.940, "exp(mul(2, F)) * C * sqr(W) * h * root4(quot(X, W))"),
    ("Gemma", 0.911, 1.402, "exp(mul(1.67, F)) * C * sqr(W) * h * root4(quot(G, W))"),
    ("Gemma", 0.840, 1.000, "exp(mul(1.67, F)) * R * pow15(W) * h * root4(quot(X, rowmean(G)))"),
    ("Gemma", 0.822, 1.046, "exp(mul(2, F)) * C * pow15(W) * h * root4(div(colmax(G), B))"),
    (
        *("Gemma", 0.894, 0.971),
        "exp(mul(2.4, colmean(quot(tanh(M), G)))) * C * sqr(W) * h * root4(quot(X, W))",
    ),
    ("Gemma", 0.892, 0.960, "exp(mul(1.67, F)) * C * sqr(W) * h * sqrt(quot(A, W))"),
    ("Gemma", 0.890, 0.966, "exp(mul(1.39, F)) * C * sqr(W) * h * sqrt(quot(A, W))"),
    ("Gemma", 0.895, 1.368, "exp(mul(1.67, F)) * C * sqr(W) * sqr(h) * root4(quot(X, W))"),
    ("Gemma", 0.889, 1.492, "exp(mul(1.67, F)) * C * sqr(W) * sqr(h) * sqrt(quot(A, W))"),
    ("Gemma", 0.937, 1.181, "quot(quot(mul(G, pow15(W)), DD), root4(colmean(quot(W, A))))"),
    (
        *("Gemma", 0.885, 1.181),
        "G * exp(rowmean(quot(M, G))) * pow15(W) * root4(log(sqr(A))) * "
        "root4(colmax(mul(G, rowmean(quot(M, G)))))",
    ),
    (
        *("Gemma", 0.847, 1.129),
        "quot(quot(mul(exp(sqrt(W)), mul(exp(F), mul(G, W))), sqrt(rownorm(W))), "
        "root4(rownorm(mul(G, quot(W, I)))))",
    ),
    ("Gemma", 0.943, 0.996, "quot(mul(mul(exp(F), mul(G, W)), sqrt(W)), root4(W))"),
    (
        *("Gemma", 0.818, 1.110),
        "quot(mul(mul(G, W), root4(W)), DD) * root4(O) * sqrt(sqrt(A)) * pow15(exp(F))",
    ),
    (
        "Gemma",
        0.952,
        1.160,
        "quot(mul(mul(G, exp(F)), mul(cube(sqrt(W)), sqrt(pow15(I)))), sqrt(I))",
    ),
    # Found on Gemma and the embedded model.
    (
        "SmolLM2",
        0.902,
        0.938,
        "quot(mul(mul(mul(G, exp(F)), pow15(W)), root4(div(mul(A, sqrt(B)), A))), DD)",
    ),
    ("SmolLM2", 0.913, 0.941, "mul(W, quot(mul(G, exp(F)), add(0.833, DD)))"),
    (
        *("SmolLM2", 0.983, 0.998),
        "quot(quot(mul(sqr(mul(pow15(W), quot(mul(W, sqr(G)), DD))), sqrt(colmax(G))), DD), "
        "div(colmean(W), colmean(W)))",
    ),
    (
        *("SmolLM2", 0.960, 1.089),
        "mms(quot(W, colmean(sqr(W)))) * pow15(G) * root4(div(V, V)) * sqr(quot(W, DD))",
    ),
)
"""Unseen model, fitness in the search, mean relative rise on the model, formula."""


@dataclass(frozen=True)
class Point:
    """A formula, with what is known of it before and its mean relative rise on an unseen model."""

    model: str
    metric: Metric
    fitness: float
    rise: float

    @property
    def exponents(self) -> Units | None:
        """Its exponents; None if operands do not go together."""
        try:
            return self.metric.units
        except ValueError:
            return None


def main(
    run: Annotated[list[Path] | None, typer.Option(help="Run folder; repeatable.")] = None,
    model: Annotated[str, typer.Option(help="A model that these runs did not see.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder that keeps the measurements.")] = None,
    members: Annotated[int, typer.Option(help="Of each run, its best so many.")] = 12,
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 64,
    windows: Annotated[int, typer.Option(help="Test windows of each kind of text.")] = 2,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print the tables."""
    logged = [Point(name, _read(text), fitness, rise) for name, fitness, rise, text in LOGGED]
    figures = {"logged": _shown("of docs/LOG.md", logged)}
    if run:
        if not model or not out:
            raise typer.BadParameter("--run needs --model and --out")
        keep_freed_memory()
        out.mkdir(parents=True, exist_ok=True)
        measured = list(_measured(run, members, model, samples, windows, out))
        figures["measured"] = _shown(f"of {len(run)} runs, on {model}", measured)
    write_json(json, {**conditions("bfloat16"), **figures})


def _read(text: str) -> Metric:
    """Return a formula of `LOGGED`, which is a product and uses the names in `_SHORT`."""
    whole = re.sub(r"\b[A-Za-z]+\b", lambda match: _SHORT.get(match[0], match[0]), text)
    return reduce(lambda x, y: Metric("mul", (x, y)), map(Metric.parse, whole.split(" * ")))


def _shown(title: str, points: Sequence[Point]) -> dict[str, object]:
    """Print formulas and rank correlations, and return both as JSON."""
    rows = [
        [
            p.model,
            f"{p.fitness:.3f}",
            f"{p.rise:.3f}",
            str(p.exponents or "disagree"),
            p.metric.text,
        ]
        for p in sorted(points, key=lambda point: point.rise)
    ]
    show(f"formulas {title}", ["model", "fitness", "rise", "units", "formula"], rows)
    correlations: dict[str, dict[str, float]] = {}
    for model in dict.fromkeys(point.model for point in points):
        agreeing = [p for p in points if p.model == model and p.exponents]
        rises = [p.rise for p in agreeing]
        known = {
            f"size of {name}": [abs(getattr(p.exponents, name)) for p in agreeing]
            for name in Units._fields
        }
        known["sum of the three"] = [sum(map(abs, p.exponents or ())) for p in agreeing]
        known["fitness of the search"] = [p.fitness for p in agreeing]
        known["number of nodes"] = [p.metric.size for p in agreeing]
        correlations[f"{model}, {len(agreeing)} formulas"] = {
            name: rank_correlation(values, rises) for name, values in known.items()
        }
    show(
        f"rank correlation with the rise on the unseen model, formulas {title}",
        ["", *correlations],
        [
            [name, *(f"{by_name[name]:.2f}" for by_name in correlations.values())]
            for name in next(iter(correlations.values()))
        ],
    )
    points_json = [vars(p) | {"metric": p.metric.text, "units": p.exponents} for p in points]
    return {"formulas": points_json, "rank_correlations": correlations}


def _measured(
    runs: Sequence[Path], members: int, model: str, samples: int, windows: int, out: Path
) -> Iterator[Point]:
    validation, test = wikitext2_corpora()
    (setting,) = settings_of([model], ["both"], [samples], windows, validation, test)
    records = [record for run in runs for record in _best(run, members)]
    named = {str(record.criterion): record.criterion for record in records}
    wanda = Criterion.parse("mul(W, sqrt(X))", "row")
    measured = Measured(setting, out)
    rises = relative_rises(measured.dense, measured.of({"wanda": wanda, **named}), ["wanda"])
    for record in records:
        rise = fmean(by_metric[str(record.criterion)] for by_metric in rises.values())
        yield Point(model, record.criterion.metric, record.fitness or 0.0, rise)


def _best(run: Path, members: int) -> list[Record]:
    records = [r for r in RunFolder.look(run).records_so_far() if r.fitness is not None]
    return sorted(records, key=lambda record: record.rank)[:members]


if __name__ == "__main__":
    typer.run(main)
