"""Where a running Ray cluster is, and whether it lets us in.

The probe runs in a separate process with a deadline: a wrong address or token makes Ray hang for
minutes, or abort the process that connects.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from search.pool.keeper import LOOPBACK

AUTO = "auto"
PROBE_SECONDS = 6

_IMPORT_SECONDS = 120
_CONNECT_SECONDS = 5
_PROBE = f"""
import os, signal, sys
import ray
signal.alarm({PROBE_SECONDS})
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="critical")
ray.shutdown()
"""
_QUICK = {
    **LOOPBACK,
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_gcs_server_request_timeout_seconds": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Shortens Ray's timeouts, so that it reports its own reason before our deadline."""


def resolve(address: str) -> tuple[str, dict[str, str | None]]:
    """Return a cluster's host:port and the environment variables needed to connect to it.

    Args:
        address: host:port, or `auto`: RAY_ADDRESS, or the file of the last `ray start` here.

    Raises:
        ValueError: If nothing names a cluster, or its address is not host:port.
    """
    login: dict[str, str | None] = {}
    source = f"ray.address {address!r}"
    if address == AUTO and os.environ.get("RAY_ADDRESS", AUTO) != AUTO:
        address = os.environ["RAY_ADDRESS"]
        source = f"RAY_ADDRESS {address!r}"
    elif address == AUTO:
        address, source = _last_started()
        if "RAY_AUTH_MODE" not in os.environ and _has_token():
            login = {"RAY_AUTH_MODE": "token"}  # As `ray start` does.
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}", address):
        raise ValueError(
            f"{source} must be local, auto or host:port, the address that `ray start --head` prints"
        )
    return address, login


def _last_started() -> tuple[str, str]:
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    path = Path(folder, "ray", "ray_current_cluster")
    if not path.is_file():
        raise ValueError(
            "ray.address 'auto' finds no cluster: RAY_ADDRESS is not set and `ray start` left no "
            "address here; start one with `ray start --head`, or set ray.address=local"
        )
    address = path.read_text(encoding="utf-8").strip()
    return address, f"{path}, {address!r},"


def _has_token() -> bool:
    variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return (
        any(os.environ.get(name) for name in variables)
        or (Path.home() / ".ray" / "auth_token").exists()
    )


def probe(address: str, login: Mapping[str, str | None]) -> None:
    """Connect to a cluster and disconnect again, in a separate process.

    Raises:
        ValueError: If it does not answer, refuses the token, has no node on this machine, or runs
            another version; one line.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address} ({error}): start one with `ray start --head`, or "
            "set ray.address=local"
        ) from error
    variables = {**os.environ, **_QUICK, **login}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROBE, address],
        env={name: value for name, value in variables.items() if value is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_IMPORT_SECONDS,
        start_new_session=True,
    )
    if done.returncode:
        raise ValueError(_reason(address, done.returncode, done.stderr))


def _reason(address: str, code: int, stderr: str) -> str:
    """Return why we cannot connect, as one line."""
    if re.search("AuthenticationError|authentication token", stderr):
        return (
            f"the Ray cluster at {address} refuses this token: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's"
        )
    if code == -signal.SIGALRM:
        return (
            f"the Ray cluster at {address} accepts connections but does not answer within "
            f"{PROBE_SECONDS} s: is it a live Ray head? `ray status --address={address}`"
        )
    if "No node info found" in stderr:
        return (
            f"the Ray cluster at {address} has no node on this machine: run the search on one of "
            f"its nodes, or make this one of them with `ray start --address={address}`"
        )
    lines = stderr.strip().splitlines() or [f"exit code {code}"]
    return f"the Ray cluster at {address} cannot be used: {lines[-1].strip()[:300]}"
