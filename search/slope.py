"""The derivative of a loss by the exponents of a metric, through the mask that the metric makes.

A metric is a product of powers, so its log score is a sum of exponents times logarithms of factors.
In a model that is pruned by it one backward pass gives q = w dL/d(w m) of every weight w, kept or
not, m being the mask. Summed near the threshold, q times a factor's logarithm, less its mean there
since the threshold moves so that the sparsity stays, is the derivative of the loss by the factor's
exponent; those that stand at 0 have one, too.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from prunevolve.pruning.ranking import DegenerateScores, up_to
from prunevolve.pruning.statistics import TERMINALS, of_layer
from prunevolve.pruning.store import ResidentStore
from prunevolve.pruning.stream import gradient_at_head
from prunevolve.pruning.weights import zeroed
from prunevolve.search.breeding.product import Exponents, exponents_of
from prunevolve.search.logarithms import log_scores, near_sums

BAND = 0.5  # of log scores on both sides of a threshold, in which weights count as near, fading
ROWS = 16  # of the smallest layer, as evenly of others: for a model's threshold, what factors do
TINY = 1e-20  # least magnitude whose logarithm is taken

_ONE = Metric.constant(1)
_ALL = slice(None)


def terms_of(base: Metric) -> Exponents:
    """Return terms and multiples: the sum of the terms' logarithms is that of a base.

    A product's terms are its factors', and a scale over the layer is one of its own, a number.
    """
    terms: Exponents = {}
    for part, exponent in exponents_of(base, relative=False).items():
        match part:
            case Metric("divrms", (x, y)):
                inner = terms_of(x) | {Metric("divrms", (_ONE, y)): 1.0}
            case _:
                inner = {part: 1.0}
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
    """Logarithms of terms in one model; of those that are no matrices they are kept."""

    def __init__(self, ground: Ground, terms: Sequence[Metric]) -> None:
        self._master, self._statistics = ground.master, ground.statistics
        self._terminals = frozenset[str]().union(*(term.terminals for term in terms))
        self._matrices = [term for term in terms if term.shape == MATRIX]
        rest = [term for term in terms if term.shape != MATRIX]
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

    def plain(self, layer: str, rows: slice = _ALL) -> list[tuple[Metric, Tensor]] | None:
        """Return one or two matrices, of which `search.logarithms` takes the logarithms, for the
        terms that are matrices; None if these are more, or grown, or not on the CPU.
        """
        names, weight = [term.name for term in self._matrices], self._master[layer]
        if weight.device.type != "cpu" or not 1 <= len(names) <= 2 or not {*names} <= {"W", "G"}:
            return None
        there = {"W": weight, **of_layer(self._statistics, layer, names)}
        return [(term, there[term.name][rows]) for term in self._matrices]

    def _computed(
        self, layer: str, terms: Sequence[Metric], rows: slice = _ALL
    ) -> dict[Metric, Tensor]:
        weight = self._master[layer]
        there = {"W": weight, **of_layer(self._statistics, layer, self._terminals)}
        values: dict[Metric, Tensor] = {}
        for name, tensor in there.items():
            part = (tensor if tensor.shape[0] == 1 else tensor[rows]).float()
            values[Metric(name)] = part.abs() if name == "W" else part
        return {term: _log(term, values, weight.device) for term in terms}


class Slope:
    """The derivative of one task's loss by the exponents of some bases."""

    def __init__(self, ground: Ground, logs: Logs, parts: Sequence[Exponents]) -> None:
        self.ground, self._logs = ground, logs
        self._terms = all_terms(parts)
        rows = [[terms.get(term, 0.0) for term in self._terms] for terms in parts]
        self._multiples = torch.tensor(rows, dtype=torch.float64)  # (bases, terms)

    def derivative(self, exponents: Tensor, windows: Tensor, weights: Tensor) -> Tensor:
        """Return the derivative of the loss by each exponent, (bases,), fp64, on the CPU.

        Windows are token ids, (n, T), their losses weighted. Raises DegenerateScores if it is not
        finite. The model is left pruned.
        """
        ground, model = self.ground, self.ground.store.model
        factors, threshold = self._metric(exponents)
        sums = torch.zeros(2, len(self._terms) + 1, dtype=torch.float64)
        with ExitStack() as stack:
            for layer, weight, take in self._masked(factors, threshold, sums):
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
        derivative: Tensor = self._multiples @ by_term
        return derivative

    def covariance(self, exponents: Tensor) -> Tensor:
        """Return the covariance of the bases' logarithms near the threshold, (bases, bases)."""
        group = self.ground.target.group
        count, size = torch.zeros((), dtype=torch.float64), len(self._multiples)
        total, squares = torch.zeros(size).double(), torch.zeros(size, size).double()
        for near, values in self._near_values(*self._metric(exponents)):
            if not group.whole_model:
                values = values - mean_of(values, near[..., None])
            inside = near > 0
            bases = values[inside].double().cpu() @ self._multiples.T
            shares = near[inside].double().cpu()[:, None]
            count, total = count + shares.sum(), total + (shares * bases).sum(0)
            squares += bases.T @ (shares * bases)
        mean = total / count.clamp(min=TINY)
        return squares / count.clamp(min=TINY) - torch.outer(mean, mean)

    def _metric(self, exponents: Tensor) -> tuple[dict[Metric, float], float]:
        """Return the terms of the metric with these exponents of its bases, and its threshold over
        all layers, from some rows of each; 0 for other groups.
        """
        target, layers = self.ground.target, self.ground.master
        factors = dict(zip(self._terms, (exponents @ self._multiples).tolist(), strict=True))
        if not target.group.whole_model:
            return factors, 0.0
        sample = [self._scores(x, factors, self._sampled()).flatten().cpu() for x in layers]
        scores = torch.cat(sample)
        last = max(1, int(target.sparsity * len(scores)))
        return factors, scores.kthvalue(last).values.item()

    def _masked(
        self, factors: Mapping[Metric, float], threshold: float, sums: Tensor
    ) -> Iterator[tuple[str, Tensor, Callable[[Tensor], None]]]:
        """Yield layers, their masked weights, and what takes the live weight with its gradient."""
        for layer, weight in self.ground.master.items():
            masked = zeroed(weight, self._mask(self._scores(layer, factors), threshold))
            yield layer, masked, partial(self._take, layer, factors, threshold, sums)

    def _near_values(
        self, factors: Mapping[Metric, float], threshold: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield how near weights are to their group's threshold, (groups, members), and their
        logarithms, (groups, members, terms), of some rows of each layer.
        """
        group, rows = self.ground.target.group, self._sampled()
        for layer in self.ground.master:
            logs = self._logs.matrices(layer, rows) | self._logs.vectors(layer, rows)
            scores = sum_of(logs, factors)
            each = [group.rows(logs[term].expand_as(scores)) for term in self._terms]
            yield self._near(scores, threshold), torch.stack(each, -1)

    def _take(
        self,
        layer: str,
        factors: Mapping[Metric, float],
        threshold: float,
        sums: Tensor,
        live: Tensor,
    ) -> None:
        """Add up a layer's part of the derivative once its gradient is there, and drop that."""
        gradient, live.grad = live.grad, None
        assert gradient is not None
        group, vectors = self.ground.target.group, self._logs.vectors(layer)
        worth = (self.ground.master[layer] * gradient).float()
        plain = self._logs.plain(layer) if group.whole_model else None
        if plain:
            factors = {term: factor / BAND for term, factor in factors.items()}
            by_row, by_column = _sides(vectors, factors, worth)
            by_row -= threshold / BAND
            found = near_sums(_with(factors, plain), by_row, by_column, worth)
            sums += self._by_term(vectors, [term for term, _ in plain], *found)
            return
        matrices = self._logs.matrices(layer)
        scores = sum_of(matrices | vectors, factors)
        near = self._near(scores, threshold)
        pulled = near * group.rows(worth)
        if not group.whole_model:
            pulled -= near * mean_of(group.rows(worth), near)
        both = torch.stack([pulled.reshape(worth.shape), near.reshape(worth.shape)])
        products = torch.stack([(both * x).sum((1, 2)) for x in matrices.values()], 1)
        sides = both.sum(2, keepdim=True), both.sum(1, keepdim=True)
        sums += self._by_term(vectors, [*matrices], *sides, products)

    def _by_term(
        self,
        vectors: Mapping[Metric, Tensor],
        matrices: Sequence[Metric],
        by_row: Tensor,
        by_column: Tensor,
        products: Tensor,
    ) -> Tensor:
        """Return two sums of weighted weights times each term's logarithms, and times 1, (2, terms
        + 1), fp64, from sums by row, (2, out, 1), by column, (2, 1, in), and with matrices.
        """
        found = dict(zip(matrices, products.T, strict=False))
        whole = by_column.sum(2, keepdim=True)
        for term, vector in vectors.items():
            by = by_row if vector.shape[0] > 1 else by_column if vector.shape[1] > 1 else whole
            found[term] = (by * vector).sum((1, 2))
        parts = [*(found[term] for term in self._terms), whole[:, 0, 0]]
        return torch.stack([part.double().cpu() for part in parts], 1)

    def _scores(self, layer: str, factors: Mapping[Metric, float], rows: slice = _ALL) -> Tensor:
        """Return log scores of some rows of a layer, (out, in), fp32."""
        logs, vectors = self._logs, self._logs.vectors(layer, rows)
        if plain := logs.plain(layer, rows):
            return log_scores(_with(factors, plain), *_sides(vectors, factors, plain[0][1]))
        return sum_of(logs.matrices(layer, rows) | vectors, factors)

    def _sampled(self) -> slice:
        """Return which rows of each layer stand for all: one in so many, the same for all."""
        fewest = min(len(weight) for weight in self.ground.master.values())
        return slice(None, None, max(1, fewest // ROWS))

    def _mask(self, scores: Tensor, threshold: float) -> Tensor:
        target = self.ground.target
        if target.group.whole_model:
            return up_to(scores, threshold, scores.numel())[0]
        return target.group.mask(scores, target.sparsity)

    def _near(self, scores: Tensor, threshold: float) -> Tensor:
        """Return how near weights are to their group's threshold, 0 to 1, a group in a row.

        Scores are overwritten.
        """
        group, rows = self.ground.target.group, self.ground.target.group.rows(scores)
        if group.whole_model:
            return nearness(rows, threshold)
        return nearness(rows, middles(rows, group.rows(self._mask(scores, threshold))))


def middles(rows: Tensor, mask: Tensor) -> Tensor:
    """Return what is between the last that goes and the first that stays of each row, (rows, 1)."""
    last = rows.masked_fill(~mask, -math.inf).amax(1, keepdim=True)
    first = rows.masked_fill(mask, math.inf).amin(1, keepdim=True)
    return (last + first) / 2


def nearness(rows: Tensor, middle: Tensor | float) -> Tensor:
    """Return how near log scores are to a threshold, 0 to 1; they are overwritten."""
    rows = rows.sub_(middle).div_(BAND)
    return torch.addcmul(rows.new_ones(()), rows, rows, value=-1).clamp_(min=0)


def all_terms(parts: Iterable[Exponents]) -> tuple[Metric, ...]:
    """Return the terms of several bases."""
    return tuple(dict.fromkeys(term for terms in parts for term in terms))


def _with(
    factors: Mapping[Metric, float], plain: Sequence[tuple[Metric, Tensor]]
) -> list[tuple[Tensor, float]]:
    """Return two matrices with their factors; the second one counts nothing if there is one."""
    pairs = [(matrix, factors[term]) for term, matrix in plain]
    return pairs if len(pairs) == 2 else [*pairs, (plain[0][1], 0.0)]


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
