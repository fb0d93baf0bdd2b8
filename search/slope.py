"""The derivative of a loss by the exponents of a metric, through the mask that the metric makes.

A metric is a product of powers, so its log score is a sum of exponents times logarithms of factors.
In a model that is pruned by it one backward pass gives q = w dL/d(w m) of every weight w, kept or
not, m being the mask. Summed near the threshold, q times a factor's logarithm, less its mean there
since the threshold moves so that the sparsity stays, is the derivative of the loss by the factor's
exponent; those that stand at 0 have one, too.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prunevolve.pruning.masks import Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import MATRIX
from prunevolve.pruning.ranking import DegenerateScores, up_to, zeroed
from prunevolve.pruning.statistics import TERMINALS, of_layer
from prunevolve.pruning.store import ResidentStore
from prunevolve.pruning.stream import gradient_at_head
from prunevolve.search.breeding.product import Exponents, exponents_of
from prunevolve.search.logarithms import log_scores, near_sums

BAND = 0.5  # of log scores on both sides of a threshold, in which weights count as near, fading
ROWS = 16  # of the smallest layer, as evenly of others: for a model's threshold, what factors do
TINY = 1e-20  # least magnitude whose logarithm is taken

_ONE, _W = Metric.constant(1), Metric("W")
_ALL = slice(None)


def terms_of(base: Metric) -> Exponents:
    """Return terms and multiples: the sum of the terms' logarithms is that of a base.

    A product's terms are its factors', and a scale over the layer is one of its own, a number.
    """
    terms: Exponents = {}
    for part, exponent in exponents_of(base, relative=False).items():
        inner = {part: 1.0}
        if part.name == "divrms":
            x, y = part.operands
            inner = terms_of(x) | {Metric("divrms", (_ONE, y)): 1.0}
        for term, multiple in inner.items():
            terms[term] = terms.get(term, 0.0) + exponent * multiple
    return terms


@dataclass(frozen=True)
class Ground:
    """Where a metric descends: a task, with the windows that are drawn from."""

    store: ResidentStore
    master: Mapping[str, Tensor]  # dense weights by layer
    statistics: Mapping[str, Tensor]  # by `X/layer`
    target: Target
    windows: Tensor  # token ids, (N, T)
    weights: Tensor  # of each window's loss, (N,)
    low_memory: bool  # whether activations are computed again in the backward pass


class Logs:
    """The terms of some bases, and their logarithms in one model; of vectors they are kept."""

    def __init__(self, ground: Ground, bases: Sequence[Metric]) -> None:
        parts = [terms_of(base) for base in bases]
        self.terms = tuple(dict.fromkeys(term for part in parts for term in part))
        multiples = [[part.get(term, 0.0) for term in self.terms] for part in parts]
        self.multiples = torch.tensor(multiples, dtype=torch.float64)  # (bases, terms)
        self._master, self._statistics = ground.master, ground.statistics
        self._terminals = frozenset[str]().union(*(term.terminals for term in self.terms))
        self._matrices = [term for term in self.terms if term.shape == MATRIX]
        rest = [term for term in self.terms if term.shape != MATRIX]
        # By layer and term: (out, 1), (1, in) or (1, 1).
        self._vectors = {layer: self._computed(layer, rest) for layer in self._master}

    def vectors(self, layer: str, rows: slice = _ALL) -> dict[Metric, Tensor]:
        """Return those of terms that are no matrices, in some rows of a layer."""
        vectors = self._vectors[layer].items()
        return {term: x if x.shape[0] == 1 else x[rows] for term, x in vectors}

    def matrices(self, layer: str, rows: slice = _ALL) -> dict[Metric, Tensor]:
        """Return those of terms that are matrices, in some rows of a layer, fp32."""
        if all(term.name in TERMINALS for term in self._matrices):
            return self._computed(layer, self._matrices, rows)
        logs = self._computed(layer, self._matrices)  # a grown term may depend on all rows
        return {term: x[rows] for term, x in logs.items()}

    def plain(self, layer: str, rows: slice = _ALL) -> dict[Metric, Tensor]:
        """Return one or two matrices, of which `search.logarithms` takes the logarithms, for the
        terms that are matrices; none if these are more, or grown, or not on the CPU.
        """
        names, weight = {term.name for term in self._matrices}, self._master[layer]
        if weight.device.type != "cpu" or not names <= {"W", "G"}:
            return {}
        there = {"W": weight, **of_layer(self._statistics, layer, names)}
        return {term: there[term.name][rows] for term in self._matrices}

    def _computed(
        self, layer: str, terms: Sequence[Metric], rows: slice = _ALL
    ) -> dict[Metric, Tensor]:
        weight = self._master[layer]
        there = {"W": weight, **of_layer(self._statistics, layer, self._terminals)}
        values = {Metric(x): (y if y.shape[0] == 1 else y[rows]).float() for x, y in there.items()}
        values[_W] = values[_W].abs()
        return {term: _log(term, values, weight.device) for term in terms}


class Slope:
    """The derivative of one task's loss by the exponents of some bases."""

    def __init__(self, ground: Ground, logs: Logs) -> None:
        self.ground, self._logs = ground, logs
        self._factors: dict[Metric, float] = {}  # of the metric's terms
        self._threshold = 0.0  # over all layers, from some rows of each; 0 for other groups

    def derivative(self, exponents: Tensor, windows: Tensor, weights: Tensor) -> Tensor:
        """Return the derivative of the loss by each exponent, (bases,), fp64, on the CPU.

        Windows are token ids, (n, T), their losses weighted. Raises DegenerateScores if it is not
        finite. The model is left pruned.
        """
        ground, model = self.ground, self.ground.store.model
        self._use(exponents)
        sums = torch.zeros(2, len(self._logs.terms) + 1, dtype=torch.float64)
        with ExitStack() as stack:
            for layer, weight, take in self._masked(sums):
                live = model.get_parameter(f"{layer}.weight")
                live.data = weight
                stack.callback(live.requires_grad_(True).requires_grad_, False)
                stack.callback(live.register_post_accumulate_grad_hook(take).remove)
            if ground.low_memory:
                stack.enter_context(_checkpointed(model))
            stack.enter_context(torch.enable_grad())
            states = model.base_model(input_ids=windows, use_cache=False)[0]
            at_head = [
                weight * gradient_at_head(model, window, state.detach())
                for window, state, weight in zip(windows, states, weights.tolist(), strict=True)
            ]
            states.backward(torch.stack(at_head) / len(windows))
        pulled, near = sums
        # The threshold moves so that the sparsity stays: with the mean of what is near.
        by_term = pulled[:-1] - near[:-1] * (pulled[-1] / near[-1].clamp(min=TINY))
        if not by_term.isfinite().all():
            raise DegenerateScores("the derivative of the loss is not finite")
        derivative: Tensor = self._logs.multiples @ by_term
        return derivative

    def covariance(self, exponents: Tensor) -> Tensor:
        """Return the covariance of the bases' logarithms near the threshold, (bases, bases)."""
        self._use(exponents)
        multiples = self._logs.multiples
        count, size = torch.zeros((), dtype=torch.float64), len(multiples)
        total, squares = torch.zeros(size).double(), torch.zeros(size, size).double()
        for near, values in self._near_values():
            if not self.ground.target.group.whole_model:
                values = values - mean_of(values, near[..., None])
            inside = near > 0
            bases = values[inside].double().cpu() @ multiples.T
            shares = near[inside].double().cpu()[:, None]
            count, total = count + shares.sum(), total + (shares * bases).sum(0)
            squares += bases.T @ (shares * bases)
        mean = total / count.clamp(min=TINY)
        return squares / count.clamp(min=TINY) - torch.outer(mean, mean)

    def _use(self, exponents: Tensor) -> None:
        """Take the metric with these exponents of its bases from now on."""
        target, logs = self.ground.target, self._logs
        self._factors = dict(zip(logs.terms, (exponents @ logs.multiples).tolist(), strict=True))
        if target.group.whole_model:
            rows = self._sampled()
            sample = [self._scores(layer, rows).flatten().cpu() for layer in self.ground.master]
            scores = torch.cat(sample)
            last = max(1, int(target.sparsity * len(scores)))
            self._threshold = scores.kthvalue(last).values.item()

    def _masked(self, sums: Tensor) -> Iterator[tuple[str, Tensor, Callable[[Tensor], None]]]:
        """Yield layers, their masked weights, and what takes the live weight with its gradient."""
        for layer, weight in self.ground.master.items():
            masked = zeroed(weight, self._mask(self._scores(layer)))
            yield layer, masked, partial(self._take, layer, sums)

    def _near_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield how near weights are to their group's threshold, (groups, members), and their
        logarithms, (groups, members, terms), of some rows of each layer.
        """
        group, rows = self.ground.target.group, self._sampled()
        for layer in self.ground.master:
            logs = self._logs.matrices(layer, rows) | self._logs.vectors(layer, rows)
            scores = sum_of(logs, self._factors)
            each = [group.rows(logs[term].expand_as(scores)) for term in self._logs.terms]
            yield self._near(scores), torch.stack(each, -1)

    def _take(self, layer: str, sums: Tensor, live: Tensor) -> None:
        """Add up a layer's part of the derivative once its gradient is there, and drop that.

        Sums are of weighted weights times each term's logarithms, and times 1, (2, terms + 1).
        """
        gradient, live.grad = live.grad, None
        assert gradient is not None
        group, vectors = self.ground.target.group, self._logs.vectors(layer)
        worth = (self.ground.master[layer] * gradient).float()
        if group.whole_model and (plain := self._logs.plain(layer)):
            factors = {term: factor / BAND for term, factor in self._factors.items()}
            by_row, by_column = _sides(vectors, factors, worth)
            by_row -= self._threshold / BAND
            powers = [(matrix, factors[term]) for term, matrix in plain.items()]
            by_row, by_column, products = near_sums(powers, by_row, by_column, worth)
            found = dict(zip(plain, products, strict=True))
        else:
            matrices = self._logs.matrices(layer)
            near = self._near(sum_of(matrices | vectors, self._factors))
            pulled = near * group.rows(worth)
            if not group.whole_model:
                pulled -= near * mean_of(group.rows(worth), near)
            both = torch.stack([pulled.reshape(worth.shape), near.reshape(worth.shape)])
            found = {term: (both * x).sum((1, 2)) for term, x in matrices.items()}
            by_row, by_column = both.sum(2, keepdim=True), both.sum(1, keepdim=True)
        whole = by_column.sum(2, keepdim=True)
        for term, vector in vectors.items():
            by = by_row if vector.shape[0] > 1 else by_column if vector.shape[1] > 1 else whole
            found[term] = (by * vector).sum((1, 2))
        parts = [*(found[term] for term in self._logs.terms), whole[:, 0, 0]]
        sums += torch.stack([part.double().cpu() for part in parts], 1)

    def _scores(self, layer: str, rows: slice = _ALL) -> Tensor:
        """Return log scores of some rows of a layer, (out, in), fp32."""
        factors, vectors = self._factors, self._logs.vectors(layer, rows)
        if plain := self._logs.plain(layer, rows):
            powers = [(matrix, factors[term]) for term, matrix in plain.items()]
            return log_scores(powers, *_sides(vectors, factors, powers[0][0]))
        return sum_of(self._logs.matrices(layer, rows) | vectors, factors)

    def _sampled(self) -> slice:
        """Return which rows of each layer stand for all: one in so many, the same for all."""
        fewest = min(len(weight) for weight in self.ground.master.values())
        return slice(None, None, max(1, fewest // ROWS))

    def _mask(self, scores: Tensor) -> Tensor:
        target = self.ground.target
        if target.group.whole_model:
            return up_to(scores, self._threshold, scores.numel())[0]
        return target.group.mask(scores, target.sparsity)

    def _near(self, scores: Tensor) -> Tensor:
        """Return how near weights are to their group's threshold, 0 to 1, a group in a row.

        Scores are overwritten.
        """
        group = self.ground.target.group
        rows = group.rows(scores)
        if group.whole_model:
            return nearness(rows, self._threshold)
        return nearness(rows, middles(rows, group.rows(self._mask(scores))))


def middles(rows: Tensor, mask: Tensor) -> Tensor:
    """Return what is between the last that goes and the first that stays of each row, (rows, 1)."""
    last = rows.masked_fill(~mask, -math.inf).amax(1, keepdim=True)
    first = rows.masked_fill(mask, math.inf).amin(1, keepdim=True)
    return (last + first) / 2


def nearness(rows: Tensor, middle: Tensor | float) -> Tensor:
    """Return how near log scores are to a threshold, 0 to 1; they are overwritten."""
    rows = rows.sub_(middle).div_(BAND)
    return torch.addcmul(rows.new_ones(()), rows, rows, value=-1).clamp_(min=0)


def _sides(
    vectors: Mapping[Metric, Tensor], factors: Mapping[Metric, float], matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the parts of a matrix's log scores that are the same along a row, (out, 1), and along
    a column, (1, in).
    """
    by_row, by_column = torch.zeros(len(matrix), 1), torch.zeros(1, matrix.shape[1])
    for term, vector in vectors.items():
        (by_column if vector.shape[1] > 1 else by_row).add_(vector, alpha=factors[term])
    return by_row, by_column


def sum_of(logs: Mapping[Metric, Tensor], factors: Mapping[Metric, float]) -> Tensor:
    """Return the sum of logarithms times factors, (out, in), fp32."""
    by_shape: dict[torch.Size, Tensor] = {}  # so that a matrix is added to once for each side
    for term, x in logs.items():
        if (before := by_shape.get(x.shape)) is None:
            by_shape[x.shape] = x * factors[term]
        else:
            before.add_(x, alpha=factors[term])
    *vectors, total = sorted(by_shape.values(), key=Tensor.numel)
    for vector in reversed(vectors):
        total = total.add_(vector) if min(total.shape) > 1 else total + vector
    return total


def _log(term: Metric, values: dict[Metric, Tensor], device: torch.device) -> Tensor:
    if term.name == "exp":
        return term.operands[0].evaluate(values, device)
    return term.evaluate(values, device).clamp(min=TINY).log_()


def mean_of(values: Tensor, near: Tensor) -> Tensor:
    """Return means over the members of each group, weighted by how near they are."""
    return (near * values).sum(1, keepdim=True) / near.sum(1, keepdim=True).clamp(min=TINY)


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """While open, decoder blocks keep only their inputs for the backward pass."""
    blocks = list(model.get_decoder().layers)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
