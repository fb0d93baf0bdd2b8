"""`--allocation fitted`: trials of an allocation in the result's work folder, each a pruned model.

Losses and costs are put aside as soon as they are known, so that a killed run goes on where it was.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from statistics import fmean

from torch import Tensor

from prunevolve.evaluation.perplexity import losses_of
from prunevolve.pruning.checkpoint import Checkpoint
from prunevolve.pruning.fitted import Costs, fit
from prunevolve.pruning.leaves import GRADIENT
from prunevolve.pruning.output.folder import WorkFolder
from prunevolve.pruning.progress import Progress
from prunevolve.pruning.pruner import found_statistics, prune, shapes_of
from prunevolve.pruning.recipe import ZERO, Allocation, Recipe, score_layer
from prunevolve.pruning.spool import Spool
from prunevolve.pruning.store import FolderStore
from prunevolve.pruning.walk import Texts, walk_dense

HELD_BACK = 4
"""One calibration window in so many gives no gradients but the loss that a step must lower."""


def _table(shares: Mapping[str, float]) -> Allocation:
    return Allocation(None, lambda shapes, score, target: shares)


class Trials:
    """Models that are pruned with one allocation after the other, and what is asked of them.

    Args:
        recipe: Its masks alone are fitted: what it does to the weights that stay comes afterwards.
        calibration: Token ids, (N, T); 2 or more windows.
        states: Returns a place for hidden states.
        statistics: Of the dense model; those that are missing are added.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: FolderStore,
        calibration: Tensor,
        states: Callable[[], Spool],
        statistics: Spool,
        work: WorkFolder,
        progress: Progress,
    ) -> None:
        self._folder = work.path / "fit"
        self._asked, self._store, self._states = recipe, store, states
        self._recipe = replace(recipe, refinement=None, update=ZERO, training=None)
        self._statistics, self._work = statistics, work
        self._calibration, self._held_back = calibration, calibration[::HELD_BACK]
        self._taught = calibration[[i for i in range(len(calibration)) if i % HELD_BACK]]
        known = work.known()
        self._losses: list[float] = known.get("fit losses", [])
        self._costs: list[Mapping[str, float]] = known.get("fit costs", [])
        self._past_losses, self._past_costs = iter([*self._losses]), iter([*self._costs])
        self._in_folder: Mapping[str, float] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            progress(f"fit {1 + len(self._losses)}: {stage}", done, total)

        self._progress = on_progress

    def fitted(self) -> Recipe:
        """Return the recipe with an allocation that is fitted to it."""
        shares = fit(shapes_of(self._store.model), self._recipe.target, self.loss, self.costs)
        shutil.rmtree(self._folder, ignore_errors=True)
        return replace(self._asked, allocation=_table(shares))

    def loss(self, shares: Mapping[str, float]) -> float:
        """Return the mean loss on the windows held back, in nats per token."""
        known = next(self._past_losses, None)
        if known is None:
            known = self._prune(shares)
            self._losses.append(known)
            self._work.keep("fit losses", self._losses)
        return known

    def costs(self, shares: Mapping[str, float]) -> Mapping[str, float]:
        """Return what one more weight costs in each layer of the model with these shares."""
        known = next(self._past_costs, None)
        if known is None:
            if self._in_folder != shares:  # only if a killed run goes on
                self._prune(shares)
            known = self._measure_costs(shares)
            self._costs.append(known)
            self._work.keep("fit costs", self._costs)
        return known

    def _prune(self, shares: Mapping[str, float]) -> float:
        """Prune the model into the folder and return its loss on the windows held back."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        losses: list[float] = []

        def measure(
            name: str, states: Iterator[Tensor], logits: Callable[[Tensor], Iterator[Tensor]]
        ) -> None:
            losses.extend(losses_of(states, logits, self._held_back).tolist())

        store = self._store.on(self._store.checkpoint, self._folder)
        recipe = replace(self._recipe, allocation=_table(shares))
        texts = Texts(self._calibration, {"pruned": self._held_back}, measure)
        prune(store, recipe, texts, self._states(), self._statistics, self._progress)
        store.write_outside()
        self._in_folder = shares
        return fmean(losses)

    def _measure_costs(self, shares: Mapping[str, float]) -> Mapping[str, float]:
        dense, metric, target = self._store, self._recipe.metric, self._recipe.target
        pruned = dense.on(Checkpoint(self._folder), self._folder)
        by_factors = target.group.whole_model

        def score(layer: str) -> Tensor:
            statistics = found_statistics(layer, metric.leaves, self._statistics, dense.device)
            scores = score_layer(metric, layer, dense.weight(layer), statistics)
            return scores * shares[layer] if by_factors else scores

        fractions = {
            layer: target.sparsity if by_factors else shares[layer]
            for block in reversed(dense.blocks)  # the way back
            for layer in dense.layers[block]
        }
        costs = Costs(dense.weight, score, fractions, target)
        walk_dense(
            pruned,
            Texts(self._taught),
            dict.fromkeys(pruned.blocks, frozenset({GRADIENT})),
            self._states(),
            costs.add,
            None,
            self._progress,
        )
        return costs.by_layer
