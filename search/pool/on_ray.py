"""Evaluations on Ray: one actor for each GPU, or some CPU actors with the threads divided.

The only file that imports ray. An actor is an `Evaluator`, built from plain values; statistics
reach it through the object store, which CPU actors on one node share without a copy. Lost actors
are made anew and their candidate is given again, so a fault delays an outcome and never changes it.
"""

import hashlib
import logging
import os
import secrets
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import search
from search.fitness import Evaluator, Setup, ZerosAndOverlap, timed
from search.pool.protocol import Arrival, LossRequest, MaskRequest
from search.population import Candidate, Outcome

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

ATTEMPTS = 3
"""How often a candidate is given to a worker before it counts as failed."""

_WAIT_SECONDS = 0.5


class _Worker:
    """An evaluator in an actor; every result is made of plain values and numpy arrays."""

    def __init__(
        self, setup: dict[str, Any], windows: list[dict[str, np.ndarray]], code: str
    ) -> None:
        if code != code_digest():
            raise RuntimeError(
                f"this worker runs other code than the driver ({Path(search.__file__).parent}): "
                "install the driver's version on every node"
            )
        tokens = [{k: torch.from_numpy(v.copy()) for k, v in texts.items()} for texts in windows]
        self._evaluator = Evaluator(Setup(windows=tuple(tokens), **setup))

    def ready(self) -> bool:
        return True

    def evaluate(self, candidate: Candidate) -> tuple[Outcome, dict[str, float]]:
        try:
            return timed(self._evaluator, candidate)
        except (RuntimeError, ArithmeticError, MemoryError) as error:
            # torch reports a device's faults, memory among them, as RuntimeError.
            return Outcome("failed", reason=f"{type(error).__name__}: {str(error)[:200]}"), {}

    def call(self, method: str, *arguments: Any) -> Any:
        result = getattr(self._evaluator, method)(*arguments)
        if isinstance(result, dict) and any(isinstance(v, Tensor) for v in result.values()):
            return {name: _to_array(tensor) for name, tensor in result.items()}
        return result

    def use_statistics(self, subject: int, arrays: dict[str, np.ndarray]) -> None:
        tensors = {k: _read_only_tensor(a) for k, a in arrays.items()}
        self._evaluator.use_statistics(subject, tensors)


class RayPool:
    """A pool of workers on a local or running Ray cluster.

    Args:
        setup: What every worker is built from.
        address: `local`, `auto` or a cluster's address.
        workers: How many; None for one for each GPU, or for each `cpus` cores.
        cpus: Cores of a worker, and its torch threads.
        gpus: GPUs of a worker; a fraction shares one.

    Raises:
        ValueError: If there is no cluster at the address, or it cannot hold one worker.
    """

    def __init__(
        self, setup: Setup, address: str, workers: int | None, cpus: int, gpus: float
    ) -> None:
        _connect(address, cpus, workers, gpus)
        available = ray.cluster_resources()
        room = int(available.get("GPU", 0) // gpus if gpus else available.get("CPU", 0) // cpus)
        if room < 1:
            raise ValueError(
                f"no worker fits: each takes {cpus} CPUs and {gpus} GPUs, and Ray has "
                f"{available.get('CPU', 0):g} and {available.get('GPU', 0):g}; lower "
                "ray.cpus_per_worker or ray.gpus_per_worker"
            )
        fields = {k: v for k, v in vars(setup).items() if k != "windows"}
        windows = [{k: tokens.numpy() for k, tokens in texts.items()} for texts in setup.windows]
        self._build = ray.remote(_Worker).options(num_cpus=cpus, num_gpus=gpus).remote
        self._arguments = (fields, ray.put(windows), code_digest())
        self._statistics: dict[int, Any] = {}
        self._actors = [self._new_actor() for _ in range(min(workers or room, room))]
        _get([actor.ready.remote() for actor in self._actors], "starting")
        self._idle = deque(range(len(self._actors)))
        self._queue: deque[tuple[Candidate, int]] = deque()
        self._running: dict[Any, tuple[int, Candidate, int]] = {}

    def __len__(self) -> int:
        return len(self._actors)

    def submit(self, candidate: Candidate) -> None:
        """Give a candidate to an idle worker, or queue it."""
        self._queue.append((candidate, 1))
        self._dispatch()

    def next_outcome(self) -> Arrival | None:
        """Return a candidate's outcome, or None after half a second without one."""
        ready, _ = ray.wait(list(self._running), timeout=_WAIT_SECONDS)
        if not ready:
            return None
        worker, candidate, attempt = self._running.pop(ready[0])
        timing: dict[str, float] = {}
        try:
            outcome, timing = ray.get(ready[0])
        except ray.exceptions.RayActorError as error:
            self._actors[worker] = self._new_actor()
            outcome = Outcome(
                "failed", reason=f"worker lost {attempt} times: {type(error).__name__}"
            )
            if attempt < ATTEMPTS:
                self._queue.appendleft((candidate, attempt + 1))
                outcome = None
        self._idle.append(worker)
        self._dispatch()
        if outcome is None:
            return None
        return Arrival(candidate.index, outcome, timing | {"worker": worker} if timing else {})

    def collect_statistics(self, subject: int) -> dict[str, Tensor]:
        """Collect a model's statistics, by `X/layer`."""
        return _to_tensors(self._call_each("collect_statistics", [(subject,)])[0])

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Put a model's statistics into the object store and hand them to every worker."""
        shared = ray.put({name: _to_array(tensor) for name, tensor in tensors.items()})
        self._statistics[subject] = shared
        futures = [actor.use_statistics.remote(subject, shared) for actor in self._actors]
        _get(futures, "taking the statistics")

    def probe_tensors(self, subject: int) -> dict[str, Tensor]:
        """Return the fingerprint's probe of a model."""
        return _to_tensors(self._call_each("probe_tensors", [(subject,)])[0])

    def model_digest(self, subject: int) -> str:
        """Return a hash of a model's dense weights that are pruned."""
        return str(self._call_each("model_digest", [(subject,)])[0])

    def losses(self, requests: Sequence[LossRequest]) -> list[list[float] | None]:
        """Return each window's mean NLL, for each request in order."""
        return self._call_each("losses", [(r.task, r.role, r.criterion) for r in requests])

    def zeros_and_overlap(self, requests: Sequence[MaskRequest]) -> list[ZerosAndOverlap]:
        """Return zeros and mask overlap by layer, for each request in order."""
        return self._call_each("zeros_and_overlap", [(r.task, r.one, r.other) for r in requests])

    def _call_each(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method once for each tuple of arguments, over the workers; results in order.

        Raises:
            ValueError: If a call fails; one line with the cause.
        """
        futures = [
            self._actors[i % len(self._actors)].call.remote(method, *arguments)
            for i, arguments in enumerate(calls)
        ]
        return _get(futures, method)

    def close(self) -> None:
        """End the workers, and Ray with them if it was started here."""
        ray.shutdown()

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            candidate, attempt = self._queue.popleft()
            worker = self._idle.popleft()
            future = self._actors[worker].evaluate.remote(candidate)
            self._running[future] = (worker, candidate, attempt)

    def _new_actor(self) -> Any:
        actor = self._build(*self._arguments)
        for subject, shared in self._statistics.items():
            actor.use_statistics.remote(subject, shared)
        return actor


def code_digest() -> str:
    """Return a hash of the source of everything that an evaluation runs."""
    root = Path(search.__file__).parent.parent
    digest = hashlib.sha256()
    for package in ("evaluation", "pruning", "search"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _connect(address: str, cpus: int, workers: int | None, gpus: float) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address == "local":
        # A token of our own for this one cluster: Ray would write one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        cores = max(os.cpu_count() or 1, cpus * (1 if gpus else workers or 1))
        ray.init(num_cpus=cores, _node_ip_address="127.0.0.1", include_dashboard=False, **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ValueError(
            f"no Ray cluster at ray.address {address!r}: start one with `ray start --head`, or "
            "set ray.address=local"
        ) from error


def _get(futures: list[Any], doing: str) -> list[Any]:
    """Wait for results that the run cannot do without; one line with the cause if one fails."""
    try:
        return list(ray.get(futures))
    except ray.exceptions.RayError as error:
        lines = str(getattr(error, "cause", None) or error).strip().splitlines()
        raise ValueError(f"a worker failed in {doing}: {lines[-1].strip()[:300]}") from error


def _to_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: _to_tensor(array.copy()) for name, array in arrays.items()}


def _to_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor for the object store; numpy has no bf16, whose bits go as int16."""
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    array: np.ndarray = bits.cpu().numpy()
    return array


def _to_tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def _read_only_tensor(array: np.ndarray) -> Tensor:
    # The object store's memory is shared and read-only. Statistics are never written to, so the
    # tensor looks at it without a copy, and torch's warning about that is not for us.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return _to_tensor(array)
