"""Ray itself: a local one is started and ended, a cluster is joined and left.

Ray reads the environment when it is imported, so it is imported here only once that is prepared.
"""

import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from prunevolve.configs.schema import Ray
from prunevolve.search.pool import guard

LOCAL = "local"
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or it replaces 127.0.0.1 by an outer address
    "RAY_USAGE_STATS_ENABLED": "0",
}

_LOCAL_SETTINGS = {
    # At Ray's default of 15, a worker that competes for a core gets a fiftieth of it.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_CONNECT_SECONDS, _END_SECONDS = 5.0, 5.0


@contextmanager
def connected(config: Ray) -> Iterator[str]:
    """Start or join Ray, and yield its address; end or leave it afterwards.

    Raises ValueError, in one line, if there is no cluster, or it does not let this process in.
    """
    if config.address != LOCAL:
        head = _find_cluster(config.address)
        settings = os.environ | SETTINGS
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        if config.address == "auto" and ("RAY_AUTH_TOKEN" in os.environ or token.exists()):
            settings.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does
        with _environment(settings), _joined(head):
            yield head
        return
    # Others' addresses, RAY_ADDRESS and the like, are dropped; settings, in lower case, stay.
    kept = {k: v for k, v in os.environ.items() if not re.match("RAY_[A-Z]", k)}
    # A local Ray listens only on loopback, with its own token, in a private folder.
    # Its sockets' paths must be short.
    prefix = f"prunevolve-{os.getpid()}-"
    with (
        TemporaryDirectory(prefix=prefix, dir="/tmp", ignore_cleanup_errors=True) as folder,
        guard.start_sweeper(folder),
        _environment(_LOCAL_SETTINGS | kept | SETTINGS | _own_token()),
        _joined(
            LOCAL,
            num_cpus=max(os.cpu_count() or 1, config.cpus_per_worker * (config.workers or 1)),
            _temp_dir=f"{folder}/r",  # Ray makes it world-accessible, not the folder around it
            include_dashboard=False,
        ),
    ):
        yield LOCAL


@cache
def _own_token() -> dict[str, str]:
    """Return settings with a token, the same as long as the process: Ray reads them only once."""
    if "ray" in sys.modules:
        return {}  # too late
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _joined(address: str, **options: object) -> Iterator[None]:
    """Connect this process to Ray, and disconnect it afterwards even if Ray hangs."""
    import ray

    if ray.is_initialized():
        raise ValueError("this process is connected to Ray already: call ray.shutdown() first")
    handler = signal.getsignal(signal.SIGTERM)
    guard.tell("joins")
    with TemporaryFile() as log:
        try:
            with _standard_error_to(log.fileno()):
                ray.init(address, log_to_driver=False, logging_level="critical", **options)
        except SystemExit as error:  # of Ray's own handler of SIGTERM, while it starts
            raise KeyboardInterrupt from error
        except Exception as error:
            log.seek(0)
            raise ValueError(_refusal(address, f"{log.read().decode()}\n{error}")) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has set its own
    try:
        yield
    finally:
        leaving = threading.Thread(target=ray.shutdown, daemon=True)
        leaving.start()
        leaving.join(_END_SECONDS)
        guard.tell("quiet")


@contextmanager
def _standard_error_to(file: int) -> Iterator[None]:
    """Let a file have what Ray writes on the standard error; not through Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _refusal(head: str, output: str) -> str:
    """Return in one line why Ray could not be started or joined."""
    if re.search("AuthenticationError|[Aa]uthentication token", output):
        return (
            f"the Ray cluster at {head} refuses this token: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's"
        )
    if "No node info found" in output:
        return (
            f"the Ray cluster at {head} has no node on this machine: run the search on one of its "
            f"nodes, or make this one of them with `ray start --address={head}`"
        )
    return f"Ray ({head}) failed: {last_line(output) or 'it gave no reason'}"


def last_line(output: str) -> str:
    """Return the last line that is not empty, shortened: in what Ray says it is the cause."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _find_cluster(address: str) -> str:
    """Return a cluster's host:port; raise ValueError if nothing listens there.

    `auto` is RAY_ADDRESS, or what the last `ray start` here wrote down. Ray would take two minutes
    to find that nothing listens, and for `auto` would also join another search's Ray here.
    """
    head = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if head == "auto":
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        file = Path(folder, "ray", "ray_current_cluster")
        head = file.read_text(encoding="utf-8").strip() if file.is_file() else "any known address"
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError, ValueError) as error:
        raise ValueError(
            f"no Ray cluster answers at {head} (ray.address {address!r}): start one with "
            "`ray start --head`, which prints its host:port, or set ray.address=local"
        ) from error
    return head
