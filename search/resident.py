"""A model that stays loaded while candidates come and go: pruned from a master copy, measured.

Here pruning and evaluation, which do not know each other, meet.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.divergence import final_hidden, window_divergences
from evaluation.perplexity import window_losses
from pruning.leaves import STATISTICS, Statistics
from pruning.masks import Target, select
from pruning.memory import give_back_freed_memory
from pruning.metric import Metric
from pruning.models import DTYPES, decoder_blocks, load_model, with_weights
from pruning.progress import Progress
from pruning.pruner import prune
from pruning.recipe import LayerScores, Recipe
from pruning.store import ResidentStore, all_layers
from pruning.walk import Texts, walk_dense
from search.fingerprint import take_probe, tensors_digest


def unwatched(stage: str, done: int, total: int) -> None:
    """Tell nobody how far a walk is."""


@dataclass(frozen=True)
class Subject:
    """A model to prune: `embedded`, a folder or a hub id, and the dtype of its forward passes."""

    model: str
    dtype: str


@dataclass(frozen=True)
class Memory:
    """What is held beside a model, and where; see `configs.schema.Memory`.

    Attributes:
        statistics: Dtype of the statistics that are matrices: `float32` or `bfloat16`.
        master: Where the dense copy is: on the `device`, or on the `host`.
        scores: `keep` or `recompute` all layers' scores while one threshold is sought.
    """

    statistics: str = "float32"
    master: str = "device"
    scores: str = "keep"


@dataclass(frozen=True)
class Weights:
    """A model that is sent to workers, as plain values.

    Attributes:
        config: Its config, as transformers writes it.
        tensors: Its parameters and buffers by name, tied ones once.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Resident:
    """One loaded model with a master copy of its dense weights and its token windows.

    Args:
        windows: Token ids by role (calibration, fitness, selection, report), each (N, T).
        objective: `nll` or `kl`, what `measure` returns of a window.
        memory: What is held beside the model, and where.
        weights: The model's own, shared with other workers on this node; None to load them.
    """

    def __init__(
        self,
        subject: Subject,
        windows: Mapping[str, Tensor],
        device: str,
        objective: str,
        memory: Memory,
        weights: Weights | None = None,
    ) -> None:
        self.windows = windows
        self.memory = memory
        self.statistics = Statistics()
        if weights:
            model = with_weights(weights.config, subject.dtype, weights.tensors, device)
        else:
            model = load_model(subject.model, subject.dtype, device)
        self.store = ResidentStore(model.requires_grad_(False))
        on_host = memory.master == "host"
        if device == "cpu":
            # What was loaded is the dense copy: it is shared with the node's other workers, in the
            # object store or by the file that it is mapped from. The model's layers are its own.
            self.master = {name: self.store.dense(name) for name in all_layers(self.store)}
            self.store.own(self.master)
        else:
            self.master = self.store.copies_on_host() if on_host else self.store.copies()
        self._device = device
        self._pruned: tuple[Metric, Target] | None = None
        began = time.perf_counter()
        hidden = final_hidden(self.store, windows["fitness"]) if objective == "kl" else None
        self._hidden = hidden
        # The dense model's distance to itself is nothing, up to rounding.
        self.dense = self.measure(0, None) if hidden is None else torch.zeros(len(hidden)).double()
        self.seconds = time.perf_counter() - began

    def collect_statistics(
        self,
        leaves: frozenset[str],
        role: str = "calibration",
        progress: Progress = unwatched,
    ) -> dict[str, Tensor]:
        """Collect statistics on one of the texts and return them by `X/layer`.

        Each block's are rounded as `memory.statistics` says as soon as they are there and wait on
        the host, so that the device holds one block's fp32 sums at a time.
        """
        self.restore()
        found: dict[str, Tensor] = {}

        def keep(statistics: Statistics) -> None:
            rounded = statistics.rounded(DTYPES[self.memory.statistics])
            found.update({key: tensor.cpu() for key, tensor in rounded.to_tensors().items()})

        walk_dense(
            self.store,
            Texts(self.windows[role]),
            dict.fromkeys(self.store.blocks, leaves & STATISTICS),
            {},
            keep,
            lambda block, module: None,
            progress,
        )
        return found

    def use_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """Prune by these statistics from now on; moved to the device once."""
        self.restore()
        self.statistics = Statistics()  # the device has no room for two
        give_back_freed_memory()  # what this process took if it collected them itself
        self.statistics = Statistics.from_tensors(tensors, self._device)

    def probe_tensors(self) -> dict[str, Tensor]:
        """Return the fingerprint's probe; see `search.fingerprint`."""
        blocks = decoder_blocks(self.store.model)
        return take_probe(self.master, self.statistics, blocks).to_tensors()

    def digest(self) -> str:
        """Return a hash of the dense weights that are pruned."""
        return tensors_digest(self.master)

    def measure(self, start: int, end: int | None) -> Tensor:
        """Return the objective of fitness windows `start` to `end`, (n,), nats per token."""
        part = self.windows["fitness"][start:end]
        if self._hidden is None:
            return window_losses(self.store, part)
        return window_divergences(self.store, part, self._hidden[start:end])

    def losses(self, role: str) -> list[float]:
        """Return each window's mean NLL on one of the texts, in nats per token."""
        return window_losses(self.store, self.windows[role]).tolist()

    def prune(self, metric: Metric, target: Target) -> None:
        """Prune the model as asked, whatever it was before.

        Raises:
            DegenerateScores: If no mask can be made of the scores.
        """
        if self._pruned != (metric, target):
            self.restore()
            with torch.inference_mode():
                prune(
                    self.store,
                    Recipe(metric, target),
                    Texts(self.windows["fitness"][:0]),  # all statistics are there
                    statistics=self.statistics.to_tensors(),
                    keep_scores=self.memory.scores == "keep",
                )
            self._pruned = (metric, target)

    def restore(self) -> None:
        """Make the weights the dense ones again, bit for bit."""
        self._pruned = None
        self.store.restore(self.master)

    @contextmanager
    def pruned(self, metric: Metric, target: Target) -> Iterator[None]:
        """While open, the model is pruned; then it is dense."""
        try:
            self.prune(metric, target)
            yield
        finally:
            self.restore()

    # As a decorator: a `with` would leave the mode on wherever the generator is suspended.
    @torch.inference_mode()
    def masks(self, metric: Metric, target: Target) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer's name and mask, True where a weight goes; the model stays as it is."""
        weights = _OnDevice(self.master, self._device)
        scores = LayerScores(metric, weights, self.statistics.of)
        # A model's threshold asks for each layer three times.
        keep = target.group.whole_model and self.memory.scores == "keep"
        yield from select(dict(scores) if keep else scores, target)


@dataclass(frozen=True)
class _OnDevice(Mapping[str, Tensor]):
    """Tensors by name, each brought to a device when it is asked for."""

    tensors: Mapping[str, Tensor]
    device: str

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
