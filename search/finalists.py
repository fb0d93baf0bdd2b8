"""The finalists of a search: the best lose the factors that they do not need, then one wins.

On a model that the search did not see, a good metric may have a factor that does harm there.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console

from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.progress import counted
from prunevolve.search.breeding.product import exponents_of, product_of_powers
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.pool import Pool
from prunevolve.search.prepare import read_scale
from prunevolve.search.records import Record
from prunevolve.search.run_folder import RunFolder
from prunevolve.search.scale import KNOWN, Difference, Scale, scale_of

SIMPLIFIED = 3
"""Finalists that lose the factors that they do not need."""


@dataclass(frozen=True, order=True)
class _Finalist:
    """A finalist and its loss on the selection texts, by which they are ordered.

    Attributes:
        losses: The same by task and window.
        factors: What it loses without each of its factors, null where it cannot prune without it;
            none if that was not measured.
    """

    loss: float
    index: int
    record: Record = field(compare=False)
    losses: list[list[float]] = field(compare=False)
    factors: list[JsonObject] = field(compare=False, default_factory=list)


def choose(
    folder: RunFolder,
    experiment: Experiment,
    pool: Pool,
    finalists: Sequence[Record],
    console: Console,
) -> tuple[Record, list[JsonObject], list[JsonObject]]:
    """Measure finalists on the selection texts, the best of them without what they do not need.

    Returns:
        The winner; all of them, best first, with their paired differences to it; and its factors.
        If none can prune a model of the selection, the fittest, and nothing of the others.
    """
    total = (len(finalists) + KNOWN) * len(experiment.tasks_of("selection"))
    with counted(console, "finalists", total) as count, pool.counting(count):
        scale = scale_of(experiment, pool.losses, "selection")
        measured = _losses(experiment, pool, "selection", [r.criterion for r in finalists])
    scored = sorted(
        _Finalist(scale.fitness(losses), record.index, record, losses)
        for record, losses in zip(finalists, measured, strict=True)
        if losses
    )
    if not scored:  # none can prune a model that the search did not see
        console.print("no finalist can prune all models of the selection: the fittest is taken")
        return finalists[0], [], []
    fitness = read_scale(folder)
    scored[:SIMPLIFIED] = [
        _simplified(experiment, pool, scale, fitness, finalist, console)
        for finalist in scored[:SIMPLIFIED]
    ]
    scored.sort()
    winner = scored[0]
    standings = [
        {"index": x.index, **x.record.described, "selection_loss": x.loss}
        | scale.difference(x.losses, winner.losses).as_json("difference")
        for x in scored
    ]
    return winner.record, standings, winner.factors


def _simplified(
    experiment: Experiment,
    pool: Pool,
    scale: Scale,
    fitness: Scale,
    finalist: _Finalist,
    console: Console,
) -> _Finalist:
    """Return a finalist without what it does not need, with what it loses without each factor.

    Left out are as many of the factors that are worth less than their error as together are, too.

    Args:
        scale: That of the selection texts.
        fitness: That of the fitness texts.
    """
    whole = finalist.record.criterion

    def losses_of(role: str, *rests: Metric) -> list[list[list[float]]]:
        return _losses(experiment, pool, role, [Criterion(rest, whole.group) for rest in rests])

    def gap_of(losses: list[list[float]]) -> Difference | None:
        return scale.difference(losses, finalist.losses) if losses else None

    rests = without_each(whole.metric)
    stage = f"ablation of candidate {finalist.index}"
    total = len(rests) * len(experiment.tasks_of("selection"))
    with counted(console, stage, total) as count, pool.counting(count):
        measured = losses_of("selection", *rests.values())
    gaps = dict(zip(rests, map(gap_of, measured), strict=True))
    needs_units = experiment.breeder.comparable and whole.metric.is_comparable
    least = sorted(
        (gap.mean, text)
        for text, gap in gaps.items()
        if gap and gap.is_small and (rests[text].is_comparable or not needs_units)
    )
    best = finalist
    while least:
        rest = without(whole.metric, [text for _, text in least])
        if not rest.problem:
            (losses,), (on_fitness,) = losses_of("selection", rest), losses_of("fitness", rest)
            if on_fitness and (gap := gap_of(losses)) and gap.is_small:
                record = Record(
                    replace(best.record.candidate, criterion=Criterion(rest, whole.group)),
                    replace(best.record.outcome, fitness=fitness.fitness(on_fitness)),
                )
                best = _Finalist(scale.fitness(losses), best.index, record, losses)
                break
        least = least[: len(least) // 2]
    dropped = {text for _, text in least}
    factors = [
        {"factor": text, "dropped": text in dropped, "difference": None, "standard_error": None}
        | (gap.as_json("difference") if gap else {})
        for text, gap in gaps.items()
    ]
    return replace(best, factors=factors)


def _losses(
    experiment: Experiment, pool: Pool, role: str, criteria: Sequence[Criterion]
) -> list[list[list[float]]]:
    """Return each criterion's losses on one of the texts, by task; none if it cannot prune."""
    tasks = experiment.tasks_of(role)
    answers = iter(pool.losses([(task, role, c) for c in criteria for task in tasks]))
    measured = []
    for _ in criteria:
        losses: list[list[float]] = [[] for _ in experiment.tasks]
        for task in tasks:
            answer = next(answers)
            losses[task] = answer or []
        measured.append(losses if all(losses[task] for task in tasks) else [])
    return measured


def factors_of(metric: Metric) -> tuple[Metric, ...]:
    """Return the factors whose product a metric is, divisors as `quot(1, x)`."""
    return tuple(product_of_powers([factor]) for factor in _powers(metric))


def without_each(metric: Metric) -> dict[str, Metric]:
    """Return what is left of a product without each of its factors, by the factor's text.

    Factors that it cannot rank weights without are left out.
    """
    rests = {factor.text: without(metric, {factor.text}) for factor in factors_of(metric)}
    return {text: rest for text, rest in rests.items() if not rest.problem}


def without(metric: Metric, texts: Collection[str]) -> Metric:
    """Return what is left of a product without the factors of these texts."""
    powers = _powers(metric)
    return product_of_powers([x for x in powers if product_of_powers([x]).text not in texts])


def _powers(metric: Metric) -> list[tuple[Metric, float]]:
    # What is left of a product whose layers compete still has no units.
    exponents = exponents_of(metric, relative=metric.is_comparable)
    return [power for power in exponents.items() if power[1]]
