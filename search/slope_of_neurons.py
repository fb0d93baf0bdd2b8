"""The derivative of a loss by the exponents of a metric where whole neurons go.

A neuron's score is the sum of its weights' scores, so its logarithm moves by their logarithms'
mean, weighted by the scores. What it is worth is q, summed over the weights that take its output:
only these are masked here, since a neuron without inputs has no gradient that says what it would
bring.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from prunevolve.pruning.masks import Neurons, mlps_of, of_neurons
from prunevolve.pruning.ranking import lowest_of_rows, zeroed
from prunevolve.search.slope import Ground, Logs, Slope, mean_of, middles, nearness, sum_of


def slope_of(ground: Ground, logs: Logs) -> Slope:
    """Return the derivative of one task's loss by the exponents of some bases."""
    kind = SlopeOfNeurons if isinstance(ground.target.group, Neurons) else Slope
    return kind(ground, logs)


class SlopeOfNeurons(Slope):
    """The same where the target's group is one of neurons, which compete within their MLP."""

    def _masked(self, sums: Tensor) -> Iterator[tuple[str, Tensor, Callable[[Tensor], None]]]:
        master = self.ground.master
        self.ground.store.restore(master)
        for mlp in mlps_of(master).values():
            gone, near, values = self._of_mlp(mlp)
            behind = next(layer for layer, rows in mlp.items() if not rows)
            take = partial(self._take_neurons, behind, near, values, sums)
            yield behind, zeroed(master[behind], gone), take

    def _near_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        for mlp in mlps_of(self.ground.master).values():
            _, near, values = self._of_mlp(mlp)
            yield near, values[None]

    def _of_mlp(self, mlp: Mapping[str, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return which neurons go, (1, neurons), how near each is to the threshold, the same, and
        the derivative of its log score by each term's factor, (neurons, terms), fp32.
        """
        group = self.ground.target.group
        assert isinstance(group, Neurons)
        scored = group.scored(mlp)
        logs = {x: self._logs.matrices(x) | self._logs.vectors(x) for x in scored}
        scores = {x: sum_of(logs[x], self._factors) for x in scored}
        highest, parts = max(x.max() for x in scores.values()), []
        for layer in scored:
            weighted = scores[layer].sub_(highest).exp_()  # of no metric they overflow then
            each = [weighted, *(weighted * logs[layer][term] for term in self._logs.terms)]
            parts.append(torch.stack([of_neurons(x, mlp[layer]) for x in each], 1))
        sums, sparsity = torch.stack(parts).sum(0), self.ground.target.sparsity
        total = sums[:, 0].log()[None]
        gone = lowest_of_rows(total, group.removed(total.shape[1], sparsity))
        near = nearness(total.clone(), middles(total, gone))
        return gone, near, sums[:, 1:] / sums[:, :1]

    def _take_neurons(
        self, layer: str, near: Tensor, values: Tensor, sums: Tensor, live: Tensor
    ) -> None:
        gradient, live.grad = live.grad, None
        assert gradient is not None
        worth = (self.ground.master[layer] * gradient).float().sum(0, keepdim=True)
        pulled = near * (worth - mean_of(worth, near))
        by_term = torch.cat([pulled, near]) @ values
        sums += torch.cat([by_term, torch.stack([pulled.sum(), near.sum()])[:, None]], 1).cpu()
