"""A crew on Ray: one actor for each GPU, or some CPU actors with the cores divided.

An actor is an `Evaluator` built from plain values. What is large goes through the object store,
which all actors on a node look at without a copy: windows, statistics, and weights if the driver
sends them.
"""

import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import search
from pruning.models import load_model
from pruning.progress import Progress
from search.fitness import Evaluator, Setup
from search.pool.cluster import Cluster, LostCluster, pinned, ray
from search.pool.crew import (
    PACKAGES,
    Call,
    Ended,
    Event,
    Fault,
    Reply,
    Started,
    attempt,
    perform,
)
from search.resident import Weights

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


class _Worker:
    """An evaluator in an actor; what it returns is made of plain values and numpy arrays."""

    def start(
        self, setup: Setup, windows: list[Arrays], code: str, *shipped: Any
    ) -> tuple[tuple[str, ...], float] | Fault:
        """Load the models.

        Args:
            setup: Without its windows.
            code: Digest of the driver's source.
            shipped: Of each model, its config and its tensors; empty if workers load them.
        """
        return attempt(lambda: self._start(setup, windows, code, shipped))

    def do(self, method: str, *arguments: Any) -> tuple[object, dict[str, float]]:
        """Do a call, as `search.pool.crew.perform`."""
        tensors = [_to_tensors(a) if _holds(a, np.ndarray) else a for a in arguments]
        result, timing = perform(self._evaluator, method, tensors)
        return (_to_arrays(result) if _holds(result, Tensor) else result), dict(timing)

    def _start(
        self, setup: Setup, windows: list[Arrays], code: str, shipped: Sequence[Any]
    ) -> tuple[tuple[str, ...], float]:
        if code != code_digest():
            raise ValueError(
                f"a worker runs other code than the driver ({Path(search.__file__).parent}): "
                "install the driver's version on every node"
            )
        texts = tuple(_to_tensors(arrays) for arrays in windows)
        weights = [
            Weights(config, _to_tensors(arrays))
            for config, arrays in zip(shipped[::2], shipped[1::2], strict=True)
        ]
        self._evaluator = Evaluator(replace(setup, windows=texts), weights)
        return self._evaluator.digests, self._evaluator.seconds


class RayCrew:
    """Actors on a Ray cluster.

    Args:
        cluster: The one that this process is connected to.
        setup: What every worker is built from.
        cpus: Cores of a worker, and its torch threads.
        gpus: GPUs of a worker; a fraction shares one.
        ship_model: Whether workers get the models from here, and once a node.
    """

    def __init__(
        self, cluster: Cluster, setup: Setup, cpus: int, gpus: float, ship_model: bool
    ) -> None:
        self._cluster = cluster
        self._cpus, self._gpus = cpus, gpus
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Worker)
        windows = [_to_arrays(texts) for texts in setup.windows]
        models = [_shipped(subject) for subject in setup.subjects] if ship_model else []
        self._arguments = [
            replace(setup, windows=()),
            ray.put(windows),
            code_digest(),
            *chain.from_iterable(models),
        ]
        self._hired = 0
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._starting: set[int] = set()
        self._futures: dict[Any, int] = {}
        self._room: Counter[str] = Counter()
        self._others: Counter[str] = Counter()

    def room(self) -> int:
        """Return how many more workers the nodes that are there have a place for."""
        mine = Counter(self._nodes.values())
        starting = {self._nodes[worker] for worker in self._starting}
        self._room = Counter()
        for node, capacity in self._cluster.capacities(self._cpus, self._gpus).items():
            if node not in starting:
                # What is free is only known once all that start there have their place.
                self._others[node] = max(0, capacity.whole - mine[node] - capacity.free)
            self._room[node] = capacity.whole - mine[node] - self._others[node]
        return (+self._room).total()

    def hire(self) -> int:
        """Begin to start a worker on the node that has most room; see `room`."""
        node = max(self._room, key=lambda name: self._room[name])
        self._room[node] -= 1
        self._hired += 1
        actor = self._actor.options(scheduling_strategy=pinned(node)).remote()
        self._actors[self._hired] = actor
        self._nodes[self._hired] = node
        self._starting.add(self._hired)
        self._futures[actor.start.remote(*self._arguments)] = self._hired
        return self._hired

    def give(self, worker: int, call: Call) -> None:
        """Send a call to a worker."""
        future = self._actors[worker].do.remote(call.method, *call.arguments)
        self._futures[future] = worker

    def dismiss(self, worker: int) -> None:
        """Kill a worker's process."""
        actor = self._actors.pop(worker, None)
        self._nodes.pop(worker, None)
        self._starting.discard(worker)
        self._futures = {f: other for f, other in self._futures.items() if other != worker}
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what came back, waiting at most so long for the first of it."""
        self._cluster.check()
        if not self._futures:
            time.sleep(seconds)
            return []
        try:
            ready, rest = ray.wait(list(self._futures), timeout=seconds)
            if ready and rest:
                ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
            return [self._event(future) for future in ready]
        except SystemExit as error:  # Ray's way to say that this machine's node is gone
            raise LostCluster("Ray's node on this machine is gone") from error

    def share(self, tensors: Mapping[str, Tensor]) -> object:
        """Put tensors into the object store; an actor that gets the reference has them."""
        return ray.put(_to_arrays(tensors))

    def watch(self, progress: Progress) -> None:
        """An actor says nothing before its call is over."""

    def wish(self, workers: int) -> None:
        """Ask an autoscaler for room for so many workers."""
        self._cluster.wish(workers, self._cpus, self._gpus)

    def _event(self, future: Any) -> Event:
        worker = self._futures.pop(future)
        starting = worker in self._starting
        try:
            result = ray.get(future)
        except ray.exceptions.RayError as error:
            return self._ended(worker, _fault_of(error, starting))
        if not starting:
            result, timing = result
            return Reply(worker, _to_own(result) if _holds(result, np.ndarray) else result, timing)
        if isinstance(result, Fault):
            return self._ended(worker, result)
        self._starting.discard(worker)
        return Started(worker, *result)

    def _ended(self, worker: int, fault: Fault) -> Ended:
        self.dismiss(worker)
        return Ended(worker, fault)


def _fault_of(error: Exception, starting: bool) -> Fault:
    """Return what it means that Ray has no result of a call."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return Fault("crowded", "Ray ended it: its node lacked memory")
    unable = isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.RuntimeEnvSetupError)
    if starting and (unable or getattr(error, "actor_init_failed", False)):
        # Such as a node without this project, or with other versions of what it needs.
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Fault("refused", lines[-1].strip()[:300])
    if isinstance(error, ray.exceptions.RayActorError):
        return Fault("lost", "its process or its node was lost")
    return Fault("lost", f"Ray has no result of it ({type(error).__name__})")


def code_digest() -> str:
    """Return a hash of the source of everything that an evaluation runs."""
    root = Path(search.__file__).parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _shipped(subject: Any) -> tuple[Any, Any]:
    """Return a model's config and its tensors in the object store."""
    model = load_model(subject.model, subject.dtype, "cpu")
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return model.config.to_dict(), ray.put(_to_arrays(tensors))


def _holds(value: object, kind: type) -> bool:
    return isinstance(value, dict) and any(isinstance(part, kind) for part in value.values())


def _to_arrays(tensors: Any) -> Arrays:
    """Return tensors for the object store; numpy has no bf16, whose bits go as int16."""
    bits = {k: t.view(torch.int16) if t.dtype == torch.bfloat16 else t for k, t in tensors.items()}
    return {name: tensor.cpu().numpy() for name, tensor in bits.items()}


def _to_tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Return tensors that look at arrays without a copy."""
    # The object store's memory is shared and read-only. Nothing here is ever written to, so that
    # torch's warning about that is not for us.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {k: t.view(torch.bfloat16) if t.dtype == torch.int16 else t for k, t in tensors.items()}


def _to_own(arrays: Arrays) -> dict[str, Tensor]:
    return _to_tensors({name: array.copy() for name, array in arrays.items()})
