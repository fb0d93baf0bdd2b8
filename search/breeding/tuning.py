"""Tuning: all numbers of one metric are moved at once, by CMA-ES (Hansen, arXiv:1604.00772).

A metric is read as a product of powers, and so is what is inside its operators: its genes are the
exponents, made explicit, and its constants. Exponents move only so that units stay, and scores
remain comparable. The table's factors stand beside the metric's own with the exponent 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from deap import cma

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion, Metric, interned, is_number
from prunevolve.pruning.operators import SETS_WITH_NUMBERS, Units
from prunevolve.search.breeding.factors import MOST
from prunevolve.search.breeding.product import as_power, exponents_of, factors_of, product_of_powers
from prunevolve.search.breeding.simplify import simplify
from prunevolve.search.records import Candidate, Record

SIGMA = 0.15  # first standard deviation of exponents, and of the logarithms of constants

SAMPLES = 8
"""Least samples of a generation. With a large lag there are as many as are bred while one outcome
is waited for, so that a generation is drawn from the distribution that the last one led to."""

PARTS = 8
"""A sample is measured on one in so many of the fitness windows: all of a generation on the same,
so that they are compared fairly, and the next on others, so that none is learnt by heart."""

DRAWN = 4  # draws among which the surrogate chooses a sample
LEAST = 0.05  # an exponent nearer to 0 is 0: a factor that hardly counts is left out
AVERAGED = 3  # generations whose means are averaged: few samples on few windows lead one astray
MEASURED = 2  # a mean is measured after so many generations: on all windows it costs as much as one
BRED = 4  # one candidate in so many is bred while there is a tuning; the others are the tuning's
UNTUNED = 3  # populations that are bred before the first tuning, where there are no seeds
PATIENCE = 2  # means in a row, none the best candidate so far, that end the tuning of a metric

Numbers = npt.NDArray[np.float64]  # how far each gene is from where the tuning began

_Make = Callable[[Numbers], Metric]


class Genes:
    """The numbers of a metric; a part that is there twice has its own once.

    `make` returns the metric with other numbers, `count` in all. The exponents of added factors
    begin at 0. If scores of several layers compete, they keep their units.
    """

    def __init__(self, metric: Metric, added: tuple[Metric, ...], comparable: bool) -> None:
        self.count, self._comparable = 0, comparable
        self._makers: dict[Metric, _Make] = {}
        factors = dict.fromkeys(added, 0.0) | exponents_of(metric, comparable)
        self.make = self._product(factors, is_root=True)

    def _gene(self) -> int:
        self.count += 1
        return self.count - 1

    def _maker(self, metric: Metric) -> _Make:
        if metric.is_constant:
            gene = self._gene()
            return lambda z: _times(metric, float(np.exp(z[gene])))
        if metric not in self._makers:
            if metric.name in ("mul", "quot") or as_power(metric)[0] is not metric:
                make = self._product(exponents_of(metric, self._comparable))
            else:
                make = self._call(metric)
            self._makers[metric] = make
        return self._makers[metric]

    def _call(self, metric: Metric) -> _Make:
        makers = [self._maker(operand) for operand in metric.operands]
        return lambda z: interned(metric.name, tuple(make(z) for make in makers))

    def _product(self, factors: Mapping[Metric, float], is_root: bool = False) -> _Make:
        """Return the maker of a product of powers, which keeps the units that matter.

        At the root the exponent of the first base stays, and a number is left out: neither a power
        nor a multiple of the whole metric is of consequence.
        """
        bases = [base for base in factors if not (is_root and base.is_constant)]
        makers = [self._maker(x) if x.is_constant else self._call(x) for x in bases]
        moved = [base for base in bases if base.never_negative and not base.is_constant]
        fixed = next((x for x in moved if is_root and factors[x] and x.name != "exp"), None)
        columns: list[Sequence[float]] = [(x == fixed,) for x in moved]
        if self._comparable:
            units = [x.units or Units() for x in moved]  # all have some
            columns = [
                (*(u.of_layer if is_root else u), x == fixed)
                for u, x in zip(units, moved, strict=True)
            ]
        free, follow = _solved(columns)
        genes = {moved[i]: self._gene() for i in free}

        def make(z: Numbers) -> Metric:
            exponents = dict(factors)
            for base, gene in genes.items():
                if z[gene]:
                    exponent = round(factors[base] + float(z[gene]), 2)
                    exponents[base] = exponent if abs(exponent) >= LEAST else 0.0
            steps = [exponents[base] - factors[base] for base in genes]
            for i, row in follow.items():
                step = sum(part * step for part, step in zip(row, steps, strict=True))
                exponents[moved[i]] = round(exponents[moved[i]] - step, 6)
            made = [(make(z), exponents[base]) for make, base in zip(makers, bases, strict=True)]
            return product_of_powers(made)

        return make


def _times(number: Metric, factor: float) -> Metric:
    """Return the multiple of a number, in two digits; the number if the language has no such."""
    value = float(f"{number.value * factor:.2g}")
    return Metric.constant(value) if factor != 1 and is_number(value) else number


def _solved(columns: Sequence[Sequence[float]]) -> tuple[list[int], dict[int, list[float]]]:
    """Return which of some exponents can move freely, and how the others then follow, given the
    part of each in the sums that have to stay.
    """
    from sympy import Matrix, Rational  # takes half a second

    if not columns:
        return [], {}
    exact = [[Rational(float(x)).limit_denominator(10**4) for x in column] for column in columns]
    reduced, pivots = Matrix(exact).T.rref()
    free = [i for i in range(len(columns)) if i not in pivots]
    return free, {p: [float(reduced[r, i]) for i in free] for r, p in enumerate(pivots)}


_genes = lru_cache(256)(Genes)


# The strategy

_Samples = tuple[tuple[tuple[float, ...], float], ...]  # a generation's numbers and fitness


class _Sample(list[float]):
    fitness: float  # higher is better, as DEAP has it


@dataclass(frozen=True)
class Tuning:
    """Moves the numbers of the best metric, then of the next, by `ask` and `tell`.

    It is what pyribs calls an emitter, but a value: `tell` returns the tuning after an outcome, so
    that a child can be asked of any earlier one, and all follows from the journal.
    """

    start: Record | None = None  # the candidate whose numbers are moved, if any is
    first: int = 0  # index from which on its children are bred
    children: tuple[Record, ...] = ()  # its samples and their distribution's means, in order
    done: tuple[int, ...] = ()  # indices of the candidates whose numbers were moved before

    def tell(
        self, record: Record, members: Sequence[Record], best: float, search: Search
    ) -> "Tuning":
        """Return the tuning after one more outcome.

        A metric is done once its last means are all worse than the best candidate so far, whose
        fitness is `best`, infinite if there is none. The next is the best that was not tuned yet.
        """
        tuning = self
        if self.owns(record):
            tuning = replace(self, children=(*self.children, record))
        means = [_fitness(child) for child in tuning.children if not child.candidate.numbers]
        if self.start and len(means) >= PATIENCE and min(means[-PATIENCE:]) > best:
            tuning = Tuning(done=(*self.done, self.start.index))
        committed = record.index + 1
        early = committed < (len(search.seeds) or UNTUNED * search.population)
        if tuning.start or early or search.primitives not in SETS_WITH_NUMBERS:
            return tuning
        new = (member for member in members if member.index not in tuning.done)
        start = min(new, key=lambda member: member.rank, default=None)
        return Tuning(start, committed + search.lag, done=tuning.done) if start else tuning

    def owns(self, record: Record) -> bool:
        """Whether a record is a child of the metric whose numbers are moved."""
        is_parent = self.start is not None and record.candidate.parents == (self.start.index,)
        return is_parent and record.candidate.tuned

    def ask(
        self, index: int, search: Search, table: tuple[Metric, ...], comparable: bool
    ) -> list[Candidate]:
        """Return samples, of which one is to be measured, or the mean of their distribution.

        Nothing if the candidate is to be bred. The same index gives the same samples. The table's
        factors are added to a metric that has fewer than a bred one may have.
        """
        if not self.start or index % BRED == 0:
            return []
        parent, start = self.start.index, self.start.criterion
        added = table if len(factors_of(start.metric)) < MOST else ()
        genes = _genes(start.metric, added, comparable and start.metric.is_comparable)

        def child(moved: Numbers) -> Candidate:
            metric = genes.make(moved)
            # An exponent that becomes 0 may take what an operator needs, as W of colmax(mul(W, X)).
            metric = start.metric if metric.problem else metric
            return Candidate(index, simplify(Criterion(metric, start.group)), (parent,), tuned=True)

        generation, is_mean = self._generation_of(index, search.lag)
        if is_mean:
            return [child(self._mean(genes, search.lag))]
        generations = self._generations(search.lag)
        strategy = _strategy_after(genes.count, _samples_of(search.lag), generations)
        drawn = [_drawn(strategy, search.seed, index, attempt) for attempt in range(DRAWN)]
        part = (generation % PARTS, PARTS)
        return [replace(child(z), numbers=tuple(z.tolist()), part=part) for z in drawn]

    def _generation_of(self, index: int, lag: int) -> tuple[int, bool]:
        """Return the generation of a child, and whether it is the mean that those before led to:
        that is the first child of which all outcomes of their samples are known.
        """
        ordinal = _tuned_before(index) - _tuned_before(self.first)
        unknown, samples = _unknown(lag), _samples_of(lag)
        means, position = divmod(ordinal, MEASURED * samples + 1)
        if position == unknown:
            return MEASURED * means, True
        return MEASURED * means + (position - (position > unknown)) // samples, False

    def _generations(self, lag: int) -> tuple[_Samples, ...]:
        """Return the samples' numbers with their fitness, by whole generations."""
        count = _samples_of(lag)
        tuned = [(child.candidate.numbers, _fitness(child)) for child in self.children]
        samples = [(numbers, fitness) for numbers, fitness in tuned if numbers]
        ends = range(count, len(samples) + 1, count)
        return tuple(tuple(samples[end - count : end]) for end in ends)

    def _mean(self, genes: Genes, lag: int) -> Numbers:
        """Return the mean of the distribution over its last generations."""
        generations = self._generations(lag)
        count, last = _samples_of(lag), len(generations)
        ends = range(last, max(0, last - AVERAGED), -1) or [0]
        means = [_strategy_after(genes.count, count, generations[:end]).centroid for end in ends]
        return np.asarray(np.mean(means, axis=0))


def _fitness(child: Record) -> float:
    """Return the fitness, or else its prediction; infinite if there is none."""
    values = (child.fitness, child.outcome.estimate)
    return next((value for value in values if value is not None), math.inf)


def _tuned_before(index: int) -> int:
    return index - -(-index // BRED)


def _unknown(lag: int) -> int:
    """Return how many children of a tuning at most are bred before an outcome is known."""
    return lag - lag // BRED


def _samples_of(lag: int) -> int:
    return max(SAMPLES, _unknown(lag))


def _drawn(strategy: cma.Strategy, *key: int) -> Numbers:
    """Draw a sample, the same for the same key; DEAP itself draws from numpy's global state."""
    draw = np.random.RandomState([part % 2**32 for part in key])
    steps = draw.standard_normal((strategy.lambda_, strategy.dim))
    return np.asarray((strategy.centroid + strategy.sigma * steps.dot(strategy.BD.T))[0])


@lru_cache(16)  # each generation begins where the last one ended
def _strategy_after(count: int, samples: int, generations: tuple[_Samples, ...]) -> cma.Strategy:
    """Return the strategy for so many genes after some generations; it is not to be changed."""
    if not generations:
        return cma.Strategy([0.0] * count, SIGMA, lambda_=samples)
    strategy = deepcopy(_strategy_after(count, samples, generations[:-1]))
    measured = []
    for numbers, fitness in generations[-1]:
        measured.append(_Sample(numbers))
        measured[-1].fitness = -fitness
    strategy.update(measured)
    return strategy
