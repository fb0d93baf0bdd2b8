"""A model that stays loaded for all candidates: pruned, measured, restored from a master copy.

This is where pruning and evaluation meet, which do not know each other.
"""

import ctypes
import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from prunevolve.evaluation.perplexity import window_losses
from prunevolve.pruning.masks import Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import DTYPES, linear_layers, load_model, skeleton
from prunevolve.pruning.operators import MATRIX
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.pruner import collect, prune
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.pruning.store import ResidentStore
from prunevolve.search.experiment import Subject


class Weights(NamedTuple):
    """A model that is sent to workers, as plain values."""

    config: Mapping[str, object]  # as transformers writes it
    tensors: Mapping[str, Tensor]  # parameters and buffers by name, tied ones once


class Resident:
    """One loaded model with a master copy of its dense weights and its token windows.

    Its tasks share a formula's scores. With low memory matrices of statistics are bfloat16, and
    scores are computed anew each time. Given weights are shared with other workers on this node.
    """

    def __init__(
        self, subject: Subject, device: str, low_memory: bool, tasks: int, weights: Weights | None
    ) -> None:
        self.subject, self.tokens, self._device = subject, subject.tokens, device
        self._low_memory, self._tasks = low_memory, tasks
        self.statistics: dict[str, Tensor] = {}
        if weights:
            model = skeleton(AutoConfig.for_model(**weights.config), DTYPES[subject.dtype])
            model.load_state_dict(weights.tensors, strict=False, assign=True)
            model.tie_weights()
            model.to(device)
        else:
            model = load_model(subject.model, subject.dtype, device)
        self.store = ResidentStore(model.requires_grad_(False))
        # The loaded weights themselves: on the CPU the node's workers share them, in the object
        # store or through the mapped file, and pruning replaces the model's weights.
        self.master = {name: self.store.dense(name) for name in linear_layers(model)}
        self._pruned: tuple[Metric, Target] | None = None
        self._scored: Metric | None = None
        self._scores: dict[str, Tensor] = {}
        began = time.perf_counter()
        self.dense = self.dense_losses("fitness")
        self.seconds = time.perf_counter() - began

    def collect_statistics(self, terminals: frozenset[str]) -> dict[str, Tensor]:
        """Collect statistics on the calibration text and return them by `X/layer`.

        Each block's statistics are moved to the host as soon as they are complete, with low memory
        as bfloat16, so that the device holds one block's fp32 sums at a time.
        """
        self.restore()

        def keep(key: str, tensor: Tensor) -> Tensor:
            is_matrix = TERMINALS[key.partition("/")[0]].shape == MATRIX
            # A vector would save little.
            return (tensor.bfloat16() if self._low_memory and is_matrix else tensor).cpu()

        return collect(self.store, self.tokens["calibration"], terminals, keep=keep)

    def use_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """Prune by these statistics from now on; they are moved to the device once."""
        self.restore()
        self.forget_scores()
        self.statistics = {}  # the device may not have room for both
        give_back_freed_memory()  # left over if this process collected them itself
        self.statistics = {key: tensor.to(self._device) for key, tensor in tensors.items()}

    def losses(self, role: str, start: int = 0, end: int | None = None) -> list[float]:
        """Return the mean NLL of a text's windows `start` to `end`, in nats per token."""
        windows, store = self.tokens[role][start:end], self.store
        return window_losses(store.states(windows), store.logits, windows).tolist()

    def dense_losses(self, role: str) -> list[float]:
        """Return `losses` of the dense model; raise ValueError if one is not finite."""
        losses = self.losses(role)
        if not all(map(math.isfinite, losses)):
            name, dtype = self.subject.model, self.subject.dtype
            rule = f"must have finite losses on its {role} text"
            raise ValueError(f"model {name!r} {rule}, got one that is not, in {dtype}: set dtype")
        return losses

    def prune(self, metric: Metric, target: Target) -> None:
        """Prune the model, whatever its state was; DegenerateScores if there is no mask."""
        if self._pruned == (metric, target):
            return
        self.restore()
        if self._scored != metric:
            self._scored, self._scores = metric, {}
        needed_again = target.group.whole_model or self._tasks > 1
        with torch.no_grad():
            prune(
                self.store,
                Procedure(metric, target),
                {},  # all statistics are given
                statistics=self.statistics,
                kept_scores=self._scores if needed_again and not self._low_memory else None,
            )
        self._pruned = (metric, target)

    def forget_scores(self) -> None:
        """Compute scores anew from now on."""
        self._scored, self._scores = None, {}

    def restore(self) -> None:
        """Restore the dense weights, bit for bit."""
        self._pruned = None
        self.store.restore(self.master)


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks; other C libraries are left alone.

    By default it returns every large block to the system, and each page of the next one costs a
    page fault: three quarters of the time of scoring a small model. With this the process holds its
    peak memory until it ends, and more: of 4.1 GiB of a 7B model's blocks, 1.9 were gaps.
    """
    _set_allocator(2**31 - 1, 0)


def free_memory_as_usual() -> None:
    """Undo `keep_freed_memory`: glibc gets its defaults, as it cannot be asked what it had."""
    _set_allocator(128 * 1024, 65536)
    give_back_freed_memory()


def _set_allocator(trim_threshold: int, mmap_max: int) -> None:
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_MAX, mmap_max)
        mallopt(_TRIM_THRESHOLD, trim_threshold)


def give_back_freed_memory() -> None:
    """Return currently free memory to the system, after a step that will not come again."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
