"""Descent: a metric's exponents follow the derivative of the loss, and factors are left out.

Adam follows it (Kingma and Ba, arXiv:1412.6980). Factors are left out as in Optimal Brain Surgeon
(Hassibi and Stork, NeurIPS 1992): that goes without which log scores near the threshold change
least once the other exponents make up for it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import MATRIX, any_side
from prunevolve.search.breeding.factors import MAX_FACTORS
from prunevolve.search.breeding.product import exponents_of, factors_of, product_of_powers
from prunevolve.search.slope import Ground, Logs, terms_of
from prunevolve.search.slope_of_neurons import slope_of

BATCH = 4  # windows of a step
RATE, LAST_RATE = 0.06, 0.03  # of Adam, at the first step and from the first factor left out on
BETAS = (0.9, 0.99)  # of Adam
STEPS, STEPS_OF_TASK = 12, 3  # with all factors: at least, and for each task
MORE_STEPS = 5  # after each factor that was left out, at least, and one for every other task
LAST_STEPS = 8  # with those that are left
KEPT = 9  # factors down to which no steps are made between two that are left out
RIDGE = 1e-4  # added to a covariance's diagonal, as a fraction of its mean: factors may be equal


class Descent:
    """A product of powers on its way down: `step` moves its exponents, `leave_out` drops a factor.

    Where scores of several layers compete, bases with units keep their exponents, which are the
    scale of all others; elsewhere that with the largest one does.
    """

    def __init__(
        self,
        start: Metric,
        added: Sequence[Metric],
        comparable: bool,
        grounds: Sequence[Ground],
        seed: tuple[int, ...],
    ) -> None:
        comparable = comparable and start.is_comparable
        powers = exponents_of(start, relative=comparable)
        powers = {base: x for base, x in powers.items() if x and not base.is_constant}
        with_units = [base for base in powers if comparable and not base.is_comparable]
        # A power of all of them changes no mask; without units it is that of the largest factor.
        fixed = with_units or [max(powers, key=lambda base: abs(powers[base]))]
        more = [base for base in added if not {*terms_of(base)} <= {*fixed}]
        powers = dict.fromkeys(more, 0.0) | powers
        self._bases = tuple(powers)
        self._exponents = torch.tensor(list(powers.values()), dtype=torch.float64)
        self._fixed = torch.tensor([base in fixed for base in self._bases])
        self._left = torch.ones_like(self._fixed)  # that were not left out
        self.tasks, self.most = len(grounds), len(powers)
        by_model = {ground.store: ground for ground in grounds}
        logs = {model: Logs(ground, self._bases) for model, ground in by_model.items()}
        self._slopes = [slope_of(ground, logs[ground.store]) for ground in grounds]
        self._adam = torch.optim.Adam([self._exponents], betas=BETAS)
        self._draw = np.random.default_rng(seed)
        self.steps = 0

    @property
    def metric(self) -> Metric:
        """The metric with its exponents, in two digits behind the point."""
        rounded = [round(float(x), 2) for x in self._exponents]
        return product_of_powers(zip(self._bases, rounded, strict=True))

    @property
    def factors(self) -> int:
        """Number of factors of the metric."""
        return len(factors_of(self.metric))

    @property
    def removable(self) -> int:
        """Number of factors that can be left out."""
        return int((self._left & ~self._fixed).sum())

    def step(self, rate: float) -> None:
        """Move all exponents by about a rate against the derivative on one of the tasks."""
        slope = self._slopes[self.steps % len(self._slopes)]
        windows, weights = slope.ground.windows, slope.ground.weights
        self.steps += 1
        drawn = torch.from_numpy(self._draw.integers(len(windows), size=BATCH))
        derivative = slope.derivative(self._exponents, windows[drawn], weights[drawn])
        self._exponents.grad = derivative * (self._left & ~self._fixed)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._exponents *= self._left

    def go(self, steps: int, first: float, last: float, total: int) -> Iterator["Step"]:
        """Make steps with rates that fall linearly, and yield how many of all are done."""
        for i in range(steps):
            self.step(first + (last - first) * i / steps)
            yield Step(self.steps, total)

    def leave_out(self) -> Metric | None:
        """Leave out the factor that does least, and return its base; None if none can go."""
        free = torch.nonzero(self._left & ~self._fixed).flatten()
        can_go = torch.tensor([self._ranks_without(int(base)) for base in free], dtype=torch.bool)
        if not can_go.any():
            return None
        # Those that are fixed move together: as one feature, to which the others are relative.
        scale = torch.where(self._fixed, self._exponents, 0.0)
        features = torch.cat([scale[None], torch.eye(len(self._bases)).double()[free]])
        covariance = sum(slope.covariance(self._exponents) for slope in self._slopes)
        inside = features @ covariance @ features.T
        inside += RIDGE * inside.diagonal().mean() * torch.eye(len(inside)).double()
        inverse = torch.linalg.inv(inside)
        exponents = torch.cat([torch.ones(1).double(), self._exponents[free]])
        change = exponents.square() / inverse.diagonal()
        least = 1 + int(change[1:].masked_fill(~can_go, math.inf).argmin())
        exponents -= inverse[:, least] / inverse[least, least] * exponents[least]
        self._exponents[free] = exponents[1:] / exponents[0].clamp(min=0.5)
        self._left[free[least - 1]] = False
        self._exponents *= self._left
        return self._bases[int(free[least - 1])]

    def _ranks_without(self, base: int) -> bool:
        """Whether what is left without a base tells weights of a row and of a column apart."""
        shapes = [x.shape for i, x in enumerate(self._bases) if self._left[i] and i != base]
        return any_side(*shapes) == MATRIX


def descend(descent: Descent) -> Iterator["Step"]:
    """Move all exponents, then leave out factors until at most `MAX_FACTORS` are left; yield after
    each step.
    """
    tasks = descent.tasks
    first, more = max(STEPS, STEPS_OF_TASK * tasks), max(MORE_STEPS, tasks // 2)
    excess = max(0, min(KEPT, descent.most) - MAX_FACTORS)
    total = first + more * excess + LAST_STEPS
    yield from descent.go(first, RATE, LAST_RATE, total)
    while descent.factors > MAX_FACTORS and descent.leave_out():
        if descent.factors < KEPT:
            yield from descent.go(more, LAST_RATE, LAST_RATE, total)
    yield from descent.go(LAST_STEPS, LAST_RATE, 0.0, total)


def shorten(descent: Descent) -> Iterator["Step | tuple[Metric, Metric]"]:
    """Leave out one factor after another, with some steps for those that are left; yield after each
    step, and each time the metric with the base that it lost.
    """
    more = max(MORE_STEPS, descent.tasks)
    total = more * descent.removable
    while (base := descent.leave_out()) is not None:
        yield from descent.go(more, LAST_RATE, 0.0, total)
        yield descent.metric, base


class Step(NamedTuple):
    """How far a descent is."""

    done: int
    total: int
