"""The backend on Ray: messages to a process that is connected to Ray in the driver's place.

Ray hangs a process that has lost its head or its node, ends it after a while without a word, and
takes over its signals. So the driver itself never connects: a child process does
(`ray_process.py`), and if that ends or falls silent, the run ends with one line.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from configs.schema import Ray
from search.fitness import Setup
from search.pool.pool import PoolError
from search.pool.requests import (
    CollectStatistics,
    Ended,
    Event,
    Reply,
    Request,
    Started,
    UseStatistics,
)
from search.resident import unwatched

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

LOCAL = "local"
FOLDERS = Path("/tmp")
"""Where local Rays have their folders, `prunevolve-PROCESS-...`; sockets' paths must be short."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Set before ray is imported: otherwise it replaces 127.0.0.1 by this machine's outer address."""

SILENCE_SECONDS = 20.0
"""After this time without a message, of which one comes every second, Ray is given up."""

_END_SECONDS = 5.0
_MAIN = "from search.pool.ray_process import main; main()"


@dataclass(frozen=True)
class Prepare:
    """Tells the process what workers are built from; it answers `Stored`.

    Attributes:
        setup: Without its windows.
        windows: Those windows.
        ray: The resources of a worker, and the number of workers.
        actor: The class of the workers; None for `ray_process.Worker`.
    """

    setup: Setup
    windows: tuple[Arrays, ...]
    ray: Ray
    actor: type | None


@dataclass(frozen=True)
class Hire:
    """Tells the process to start a worker."""

    worker: int


@dataclass(frozen=True)
class Give:
    """Tells the process to give a worker a request."""

    worker: int
    request: Request[Any]


@dataclass(frozen=True)
class Dismiss:
    """Tells the process to kill a worker."""

    worker: int


@dataclass(frozen=True)
class Part:
    """One of the tensors that belong to the next message; all in one would take twice the memory.

    They belong to a `Reply`, or to statistics that go into the object store, answered by `Stored`.
    """

    name: str
    array: Array


@dataclass(frozen=True)
class Stored:
    """Tells the driver that the object store holds what it was to hold."""


@dataclass(frozen=True)
class Room:
    """Tells the driver how many workers all nodes hold if empty, and besides all that runs now."""

    whole: int
    free: int


@contextmanager
def ray_backend(setup: Setup, ray: Ray, actor: type | None = None) -> Iterator["RayBackend"]:
    """Start or join Ray, and end or leave it afterwards.

    Args:
        setup: What workers are built from.
        ray: Where Ray is, and what a worker needs of it.
        actor: The class of the workers, if it is not `ray_process.Worker`.

    Raises:
        ValueError: If there is no cluster, it does not answer or refuses the token; one line.
    """
    backend = RayBackend(ray)
    try:
        backend.connect(setup, actor)
        yield backend
    finally:
        backend.close()


class RayBackend:
    """Workers that are Ray's actors: one per GPU, or several that divide the cores."""

    def __init__(self, ray: Ray) -> None:
        self._ray = ray
        is_local = ray.address == LOCAL
        self._head, login = (LOCAL, {}) if is_local else _find_cluster(ray.address)
        self._connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, str(theirs.fileno()), self._head],
            env=_environment(is_local) | login,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,  # a terminal's Ctrl-C or hangup must not reach Ray
        )
        theirs.close()
        self._hired = 0
        self._workers: set[int] = set()
        self._starting: set[int] = set()
        self._room = Room(0, 0)
        self._others = 0
        self._early: list[Event] = []
        self._parts: Arrays = {}
        self._silent = 0.0

    def connect(self, setup: Setup, actor: type | None) -> None:
        """Say what workers are built from, and wait until Ray is ready for them."""
        windows = tuple(to_arrays(tokens) for tokens in setup.windows)
        try:
            self._send(Prepare(replace(setup, windows=()), windows, self._ray, actor))
            self._wait_until_stored()
        except PoolError as error:
            raise ValueError(str(error)) from error

    def hire(self, most: int) -> Sequence[int]:
        """Begin to start workers on the nodes that have room."""
        self._early = list(self.events(0.0))  # the room may have changed since the last look
        if not self._starting:
            # Free resources mean something only once every starting worker has taken its own.
            self._others = max(0, self._room.whole - len(self._workers) - self._room.free)
        room = min(most, self._room.whole - len(self._workers) - self._others)
        hired = range(self._hired + 1, self._hired + room + 1)
        for worker in hired:
            self._send(Hire(worker))
        self._hired += len(hired)
        self._workers.update(hired)
        self._starting.update(hired)
        return hired

    def give(self, worker: int, request: Request[Any]) -> None:
        """Send a request to a worker."""
        if isinstance(request, CollectStatistics):
            request = replace(request, progress=unwatched)
        self._send(Give(worker, request))

    def dismiss(self, worker: int) -> None:
        """Kill a worker's process."""
        self._forget(worker)
        self._send(Dismiss(worker))

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the events that arrived, waiting at most this long for the first one."""
        events, self._early = self._early, []
        wait = 0.0 if events else seconds
        while self._connection.poll(wait):
            wait = self._silent = 0.0
            message = self._receive()
            if isinstance(message, Event):
                events.append(message)
        # Counted in waits: the clock runs on while this process is suspended.
        self._silent += wait
        if self._silent > SILENCE_SECONDS:
            raise PoolError(f"Ray ({self._head}) has not answered for {SILENCE_SECONDS:g} s")
        return events

    def share(self, request: Request[None]) -> Request[None]:
        """Put statistics into the object store, which all workers on a node read without a copy."""
        if not isinstance(request, UseStatistics):
            return request
        for name, array in to_arrays(request.tensors).items():
            self._send(Part(name, array))
        stored = replace(request, tensors={})
        self._send(stored)
        self._wait_until_stored()
        return stored

    def close(self) -> None:
        """Disconnect; of a local Ray nothing is left."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.kill()
        self._process.wait()
        self._log.close()
        clear_killed()

    def _forget(self, worker: int) -> None:
        self._workers.discard(worker)
        self._starting.discard(worker)

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._lost() from error

    def _receive(self) -> object:
        """Return the next message; a reply with the parts before it."""
        try:
            message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        match message:
            case Part(name, array):
                self._parts[name] = array
            case Room():
                self._room = message
            case Started(worker):
                self._starting.discard(worker)
            case Ended(worker):
                self._forget(worker)
            case Reply() if self._parts:
                parts, self._parts = self._parts, {}
                return replace(message, result=to_tensors(parts))
        return message

    def _wait_until_stored(self) -> None:
        while not isinstance(message := self._receive(), Stored):
            if isinstance(message, Event):
                self._early.append(message)

    def _lost(self) -> PoolError:
        """Return why the process ended, from its exit code and what it or Ray wrote."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")
        if re.search("AuthenticationError|authentication token", said):
            return PoolError(
                f"the Ray cluster at {self._head} refuses this token: set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's"
            )
        if "No node info found" in said:
            return PoolError(
                f"the Ray cluster at {self._head} has no node on this machine: run the search on "
                "one of its nodes, or make this one of them with "
                f"`ray start --address={self._head}`"
            )
        reason = (said.strip().splitlines() or ["it gave no reason"])[-1].strip()[:300]
        code = self._process.returncode
        if code is not None and code < 0:
            reason = "the process that is connected to it was killed"
        if code == -signal.SIGALRM:
            reason = "it accepts connections but does not answer: is it a live Ray head?"
        return PoolError(f"Ray ({self._head}) failed: {reason}")


def _find_cluster(address: str) -> tuple[str, dict[str, str]]:
    """Return a cluster's host:port and the environment variables needed to connect to it.

    Args:
        address: host:port, or `auto`: RAY_ADDRESS, or the file of the last `ray start` here.

    Raises:
        ValueError: If nothing names a cluster, or nothing listens at its address.
    """
    login: dict[str, str] = {}
    source = f"ray.address {address!r}"
    if address == "auto" and os.environ.get("RAY_ADDRESS", "auto") != "auto":
        address = os.environ["RAY_ADDRESS"]
        source = f"RAY_ADDRESS {address!r}"
    elif address == "auto":
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        path = Path(folder, "ray", "ray_current_cluster")
        if not path.is_file():
            raise ValueError(
                "ray.address 'auto' finds no cluster: RAY_ADDRESS is not set and `ray start` left "
                "no address here; start one with `ray start --head`, or set ray.address=local"
            )
        address = path.read_text(encoding="utf-8").strip()
        source = f"{path}, {address!r},"
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or token.exists()):
            login = {"RAY_AUTH_MODE": "token"}  # as `ray start` does
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}", address):
        raise ValueError(
            f"{source} must be local, auto or host:port, the address that `ray start --head` prints"
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _END_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address} ({error}): start one with `ray start --head`, or "
            "set ray.address=local"
        ) from error
    return address, login


def _environment(is_local: bool) -> dict[str, str]:
    """Return the environment of the process: ours, and for a local Ray without others' addresses.

    RAY_ADDRESS and the like are dropped; settings, which are lower case after RAY_, are kept.
    """
    fixed = {
        **LOOPBACK,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # it finds what we find
    }
    if not is_local:
        return os.environ | fixed
    inherited = {k: v for k, v in os.environ.items() if not re.match("RAY_[A-Z]", k)}
    login = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # At Ray's default of 15, a worker that competes for a core gets a fiftieth of it.
    defaults = {"RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return defaults | inherited | fixed | login


def to_arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return tensors for messages; numpy has no bf16, so its bits are sent as int16."""
    bits = {k: t.view(torch.int16) if t.dtype == torch.bfloat16 else t for k, t in tensors.items()}
    return {name: tensor.cpu().numpy() for name, tensor in bits.items()}


def to_tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """Return tensors that share the arrays' memory."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {k: t.view(torch.bfloat16) if t.dtype == torch.int16 else t for k, t in tensors.items()}


def holds(value: object, kind: type[np.ndarray] | type[Tensor]) -> bool:
    """Return whether a value is a mapping of arrays or of tensors."""
    return isinstance(value, dict) and any(isinstance(part, kind) for part in value.values())


def clear_killed() -> None:
    """Remove what local Rays have left whose process was killed: other processes, and the folder.

    The process is named by the folder, and leads the session of all others.
    """
    for folder in FOLDERS.glob("prunevolve-*-*"):
        leader = folder.name.split("-")[1]
        if leader.isdecimal() and not psutil.pid_exists(int(leader)):
            kill_session(int(leader))
            shutil.rmtree(folder, ignore_errors=True)


def kill_session(leader: int) -> None:
    """Kill the processes of a session, except this one; also those that are forked meanwhile."""
    for _ in range(50):
        if not (members := list(_session(leader))):
            return
        for process in members:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)


def _session(leader: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            is_other = os.getsid(process.pid) == leader and process.pid != os.getpid()
            if is_other and process.status() != psutil.STATUS_ZOMBIE:
                yield process
