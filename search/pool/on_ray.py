"""The backend on Ray: messages to a process that is connected to Ray in the driver's place.

Ray hangs a process that has lost its head or its node, ends it after a while without a word, and
takes over its signals. So the driver itself never connects: a child process does
(`ray_process.py`), and if that ends or falls silent, the run ends with one line.
"""

import math
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

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from prunevolve.configs.schema import Ray
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.pool import PoolError
from prunevolve.search.pool.requests import (
    ROOT,
    Ended,
    Event,
    Reply,
    Request,
    Started,
    UseStatistics,
)

Array = npt.NDArray[np.generic]
Arrays = dict[str, Array]

LOCAL = "local"
FOLDERS = Path("/tmp")
"""Where local Rays have their folders, `prunevolve-PROCESS-...`; sockets' paths must be short."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Set before ray is imported: otherwise it replaces 127.0.0.1 by this machine's outer address."""

SILENCE_SECONDS = 20.0
"""After this time without a message, of which one comes every second, Ray is given up."""

_END_SECONDS = 5.0
_MAIN = "from prunevolve.search.pool.ray_process import main; main()"


# What the driver calls for.


@dataclass(frozen=True)
class Prepare:
    """Start or join Ray, and store what workers are built from.

    Attributes:
        setup: What workers are built from.
        actor: The class of the workers; None for `ray_process.Worker`.
    """

    setup: Experiment
    ray: Ray
    actor: type | None


@dataclass(frozen=True)
class Hire:
    """Begin to start workers, at most so many, on the nodes that have room."""

    most: int


@dataclass(frozen=True)
class Give:
    """Give a worker a request."""

    worker: int
    request: Request[object]


@dataclass(frozen=True)
class Dismiss:
    """Kill a worker."""

    worker: int


@dataclass(frozen=True)
class Share:
    """Put the parts that came before into the object store, as a model's statistics."""

    subject: int


@dataclass(frozen=True)
class Part:
    """A tensor of what comes next, either way: all in one message would take twice the memory."""

    name: str
    array: Array


Call = Prepare | Hire | Give | Dismiss | Share | Part


# What the process sends, besides parts and events; None means only that it is there.


@dataclass(frozen=True)
class Answer:
    """The answer to `Prepare`, `Share` and `Hire`, which has the numbers of the hired workers."""

    workers: Sequence[int] = ()


@contextmanager
def ray_backend(setup: Experiment, ray: Ray, actor: type | None = None) -> Iterator["RayBackend"]:
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
        self._events: list[Event] = []
        self._parts: Arrays = {}
        self._silent = 0.0

    def connect(self, setup: Experiment, actor: type | None) -> None:
        """Say what workers are built from, and wait until Ray is ready for them."""
        try:
            self._call(Prepare(setup, self._ray, actor))
        except PoolError as error:
            raise ValueError(str(error)) from error

    def hire(self, most: int) -> Sequence[int]:
        """Begin to start workers on the nodes that have room."""
        return self._call(Hire(most), SILENCE_SECONDS)

    def give(self, worker: int, request: Request[object]) -> None:
        """Send a request to a worker."""
        self._send(Give(worker, request))

    def dismiss(self, worker: int) -> None:
        """Kill a worker's process."""
        self._send(Dismiss(worker))

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the events that arrived, waiting at most this long for the first one."""
        wait = 0.0 if self._events else seconds
        while self._is_heard(wait, SILENCE_SECONDS):
            wait = 0.0
            self._receive()
        events, self._events = self._events, []
        return events

    def share(self, request: Request[None]) -> Request[None]:
        """Put statistics into the object store, which all workers on a node read without a copy."""
        if not isinstance(request, UseStatistics):
            return request
        for name, array in to_arrays(request.tensors).items():
            self._send(Part(name, array))
        self._call(Share(request.subject))
        return replace(request, tensors={})

    def close(self) -> None:
        """Disconnect; of a local Ray nothing is left."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.kill()
        self._process.wait()
        self._log.close()
        clear_killed()

    def _send(self, call: Call) -> None:
        try:
            self._connection.send(call)
        except OSError as error:
            raise self._lost() from error

    def _call(self, call: Call, limit: float = math.inf) -> Sequence[int]:
        """Send, and return the answer; events that come before it are kept."""
        self._send(call)
        while True:
            if self._is_heard(1.0, limit) and (answer := self._receive()):
                return answer.workers

    def _is_heard(self, seconds: float, limit: float) -> bool:
        """Wait for a message; raise PoolError if there was none for the seconds of the limit."""
        if self._connection.poll(seconds):
            self._silent = 0.0
            return True
        # Counted in waits: the clock runs on while this process is suspended.
        self._silent += seconds
        if self._silent > limit:
            raise PoolError(f"Ray ({self._head}) has not answered for {SILENCE_SECONDS:g} s")
        return False

    def _receive(self) -> Answer | None:
        """Take the next message: keep an event, or a part until its reply; return an answer."""
        try:
            message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        match message:
            case Answer():
                return message
            case Part(name, array):
                self._parts[name] = array
            case Reply() if self._parts:
                self._events.append(replace(message, result=to_tensors(self._parts)))
                self._parts = {}
            case Started() | Reply() | Ended():
                self._events.append(message)
        return None

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
        # It finds what we find, and our own package first.
        "PYTHONPATH": os.pathsep.join([str(ROOT.parent), *filter(None, sys.path)]),
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
