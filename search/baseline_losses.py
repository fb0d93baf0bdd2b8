"""Measures what candidates are compared with: the dense model and the named metrics."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, variance

from pruning.baselines import BASELINES
from search.fitness import Setup
from search.pool.requests import WindowLosses
from search.scale import Cell, Scale, cell_of

Ask = Callable[[Sequence[WindowLosses]], Sequence[list[float] | None]]
"""Returns each request's losses by window; None where a criterion is degenerate."""

Losses = dict[str, list[float]]


def losses_of(ask: Ask, task: int, role: str) -> tuple[list[float], Losses]:
    """Return a task's losses by window: dense, and under each named metric that can prune it."""
    criteria = [None, *(baseline.criterion for baseline in BASELINES.values())]
    dense, *measured = ask([WindowLosses(task, role, criterion) for criterion in criteria])
    assert dense is not None
    named = {
        name: losses
        for name, losses in zip(BASELINES, measured, strict=True)
        if losses and all(map(math.isfinite, losses))
    }
    return dense, named


def cells_of(
    setup: Setup, task: int, role: str, dense: Sequence[float], named: Mapping[str, list[float]]
) -> list[Cell]:
    """Return a task's cells on one of its texts, weighted by their numbers of windows."""
    # Tasks of weight 0 are only compared with one another.
    total = sum(setup.tasks[other].weight or 1 for other in setup.tasks_of(role))
    kinds = setup.kinds_of(task, role)
    cells = []
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        weight = (setup.tasks[task].weight or 1) / total * len(places) / len(kinds)
        cells.append(cell_of(task, kind, weight, places, dense, dict(named)))
    return cells


def scale_of(
    setup: Setup,
    ask: Ask,
    role: str = "fitness",
    seconds: Sequence[float] = (),
) -> Scale:
    """Measure the scale of one of the texts.

    Args:
        seconds: Duration of the first stage of each task; the task that discriminates best per
            second, on average over the tasks of its model, is evaluated first. Without them, tasks
            keep their order.
    """
    cells: list[Cell] = []
    discriminations = []
    order = setup.tasks_of(role)
    for task in order:
        dense, named = losses_of(ask, task, role)
        task_cells = cells_of(setup, task, role, dense, named)
        discriminations.append(_discrimination(task_cells, named))
        cells += task_cells
    if seconds:
        # Each rounded to powers of two, and one model's tasks at one cost, so that the order is not
        # a matter of what else the machine did.
        costs = _seconds_by_model(setup, seconds)
        cheapest = min(costs)
        rates = {
            task: round(math.log2(told + 1e-9)) - round(math.log2(costs[task] / cheapest))
            for task, told in zip(order, discriminations, strict=True)
        }
        order = sorted(order, key=lambda task: -rates[task])
    return Scale(order=tuple(order), cells=tuple(cells))


def _seconds_by_model(setup: Setup, seconds: Sequence[float]) -> list[float]:
    """Return, for each task, the mean seconds of the tasks on its model."""
    subjects = [task.subject for task in setup.tasks]
    return [
        fmean(time for time, other in zip(seconds, subjects, strict=True) if other == subject)
        for subject in subjects
    ]


def _discrimination(cells: Sequence[Cell], named: Mapping[str, list[float]]) -> float:
    """Return how well a window tells metrics apart: variance between metrics over that within."""
    between, within = [], []
    for cell in cells:
        values = [
            [rise / share / cell.rise for rise, share in zip(rises, cell.shares, strict=True)]
            for rises in map(cell.rises, named.values())
        ]
        if len(values) > 1 and len(cell.windows) > 1:
            between.append(variance(map(fmean, values)))
            within.append(fmean(map(variance, values)))
    return fmean(between) / max(fmean(within), 1e-9) if between else 0.0
