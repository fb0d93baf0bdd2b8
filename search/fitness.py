"""Metric text to outcome: prune, measure, restore. The only place where the two siblings meet.

An `Evaluator` holds one model with a master copy of its dense weights, its statistics and the
token windows, all loaded once. Candidates are pruned by `pruning` and measured by `evaluation`.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evaluation.perplexity import perplexity, window_losses
from pruning.calibration import Statistics, collect
from pruning.masks import Target
from pruning.metric import Metric
from pruning.models import decoder_blocks, linear_layers, load_model
from pruning.pruner import LayerScores, prune_copy, restore
from search.fingerprint import take_probe, tensors_digest
from search.population import Candidate, Outcome


@dataclass(frozen=True)
class Setup:
    """What an evaluator is built from: plain values alone, so that any machine can build it.

    Attributes:
        model: `embedded`, a folder or a hub id.
        dtype: Of weights and forward passes.
        device: A torch device.
        threads: torch threads.
        windows: Token ids by role (calibration, fitness, selection, report), each (N, T).
        sparsity: Fraction of the weights to remove.
        pattern: (kept, length), or None for unstructured sparsity.
        stages: Fitness windows after which a candidate may be stopped, ascending.
        slack: A stop needs this much more NLL rise than the threshold's, as a fraction.
        hopeless: NLL rise over dense, nats per token, that always stops.
    """

    model: str
    dtype: str
    device: str
    threads: int
    windows: Mapping[str, Tensor]
    sparsity: float
    pattern: tuple[int, int] | None
    stages: tuple[int, ...]
    slack: float
    hopeless: float


@dataclass
class Evaluator:
    """One resident model that evaluates candidates, one after the other."""

    setup: Setup
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        torch.set_num_threads(self.setup.threads)
        self._model = load_model(self.setup.model, self.setup.dtype, self.setup.device)
        self._model.requires_grad_(False)
        self._layers = linear_layers(self._model)
        self._master = {name: layer.weight.clone() for name, layer in self._layers.items()}
        self._dense = window_losses(self._model, self.setup.windows["fitness"])

    def collect_statistics(
        self, leaves: frozenset[str] = frozenset({"X", "G"})
    ) -> dict[str, Tensor]:
        """Collect statistics on the calibration windows, use them, return them by `X/layer`."""
        windows = self.setup.windows["calibration"]
        found = collect(self._model, self._layers, windows, leaves).to_tensors()
        self.use_statistics(found)
        return found

    def use_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """Use statistics that were collected elsewhere; moved to the device once."""
        self.statistics = Statistics.from_tensors(tensors, self.setup.device)

    def probe_tensors(self) -> dict[str, Tensor]:
        """Return the fingerprint's probe; see `search.fingerprint`."""
        blocks = decoder_blocks(self._model)
        return take_probe(self._master, self.statistics, blocks).to_tensors()

    def model_digest(self) -> str:
        """Return a hash of the dense weights that are pruned."""
        return tensors_digest(self._master)

    def evaluate(self, candidate: Candidate) -> Outcome:
        """Prune, measure on the fitness windows stage by stage, restore."""
        try:
            with self.pruned(candidate.metric, candidate.group):
                return self._measure(candidate.stop_above)
        except ValueError as error:
            # Scores that no mask can be made of: the metric's fault, found only on all layers.
            return Outcome("degenerate", reason=str(error))

    def losses(self, role: str, metric: str | None, group: str) -> list[float] | None:
        """Return each window's mean NLL on a text, dense if `metric` is None.

        None if the metric is degenerate on this model.
        """
        windows = self.setup.windows[role]
        if metric is None:
            return window_losses(self._model, windows).tolist()
        try:
            with self.pruned(metric, group):
                return window_losses(self._model, windows).tolist()
        except ValueError:
            return None

    @contextmanager
    def pruned(self, metric: str, group: str) -> Iterator[None]:
        """While open, the model is pruned; then its weights are the dense ones, bit for bit."""
        target = Target(self.setup.sparsity, group, self.setup.pattern)
        scores: Mapping[str, Tensor]
        scores = LayerScores(Metric.parse(metric), self._master, self.statistics)
        try:
            with torch.inference_mode():
                if group == "model" and not self.setup.pattern:
                    # Asked for three times each: a resident model has the memory to keep them.
                    scores = dict(scores)
                prune_copy(self._layers, self._master, scores, target)
            yield
        finally:
            restore(self._layers, self._master)

    def _measure(self, stop_above: float | None) -> Outcome:
        windows = self.setup.windows["fitness"]
        losses = torch.empty(0, dtype=torch.float64)
        for end in (*self.setup.stages, len(windows)):
            part = windows[len(losses) : end]
            losses = torch.cat([losses, window_losses(self._model, part)])
            tokens = losses.numel() * windows.shape[1]
            if not torch.isfinite(losses).all():
                return Outcome("degenerate", None, tokens, "the loss is not finite")
            if end >= len(windows):
                break
            rise = (losses - self._dense[: len(losses)]).mean().item()
            if reason := self._stop_reason(rise, stop_above):
                return Outcome("stopped", None, tokens, reason)
        return Outcome("evaluated", losses.mean().item(), tokens)

    def _stop_reason(self, rise: float, stop_above: float | None) -> str:
        """Compare rises over the dense model: they vary far less by window than losses do."""
        limit = self.setup.hopeless
        if stop_above is not None:
            allowed = max(0.0, stop_above - self._dense.mean().item()) * (1 + self.setup.slack)
            limit = min(limit, allowed)
        return f"NLL rise {rise:.4f} above {limit:.4f}" if rise > limit else ""


@dataclass
class InProcessPool:
    """Evaluations in this process, one when asked: for tests and for `ray.workers: 0`."""

    evaluator: Evaluator
    waiting: deque[Candidate] = field(default_factory=deque)
    timings: dict[int, dict[str, Any]] = field(default_factory=dict)

    def submit(self, candidate: Candidate) -> None:
        """Take a candidate; it is evaluated when an outcome is asked for."""
        self.waiting.append(candidate)

    def next_outcome(self) -> tuple[int, Outcome] | None:
        """Evaluate the oldest submitted candidate."""
        if not self.waiting:
            return None
        candidate = self.waiting.popleft()
        began = time.monotonic()
        outcome = self.evaluator.evaluate(candidate)
        self.timings[candidate.index] = {"seconds": time.monotonic() - began, "worker": 0}
        return candidate.index, outcome

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the evaluator and return its result."""
        return getattr(self.evaluator, method)(*arguments)

    def call_each(self, method: str, calls: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method once for each tuple of arguments; results in the same order."""
        return [self.call(method, *arguments) for arguments in calls]

    def share_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """Give statistics to the evaluator."""
        self.evaluator.use_statistics(tensors)


def perplexity_of(losses: list[float]) -> float:
    """Return the perplexity that per-window losses in nats per token make."""
    return perplexity(torch.tensor(losses, dtype=torch.float64))
