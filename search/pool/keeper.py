"""A private Ray for one search, of which nothing remains when the search ends.

Ray's own clean-up runs in the driver, so a kill -9 of the driver leaves processes behind. A keeper
prevents that: the driver starts this file as a script, the script starts Ray, and every Ray process
descends from it. The keeper is a child subreaper, so orphans stay its descendants; when the driver
asks or dies, it kills them all and removes the folder. It runs in its own session, so a terminal's
Ctrl-C or hangup never reaches Ray.
"""

import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Set before ray is imported: otherwise it replaces 127.0.0.1 by this machine's outer address."""

START_SECONDS = 180.0

_ADDRESS, _LOG = "address", "start.log"  # in the folder
_LOOK_SECONDS = 0.1
_END_SECONDS = 10.0
_LONGEST_PARENT = 16
"""In characters. Ray creates sockets in it, whose paths are limited to 103 characters on macOS."""
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@contextmanager
def own_ray(cpus: int) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Start a Ray for this process alone; it is gone afterwards, however this process ends.

    Args:
        cpus: CPUs that it offers.

    Yields:
        The address of its head, host:port on the loopback interface; and the environment variables
        that a process needs to connect.

    Raises:
        ValueError: If Ray does not start; one line with Ray's reason.
    """
    folder = Path(_short_folder(), f"prunevolve-{secrets.token_hex(4)}")
    login = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-P", __file__, "keep", str(folder), str(os.getpid()), str(cpus)]
    process = subprocess.Popen(
        command,
        env=_environment(login),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        # Ray job settings in the environment concern the cluster that runs the job, not this one.
        yield _address(process, folder), {**login, "RAY_JOB_CONFIG_JSON_ENV_VAR": None}
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_END_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)  # Exists only if the keeper itself was killed.


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _LONGEST_PARENT else "/tmp"


def _environment(login: dict[str, str]) -> dict[str, str]:
    """Return the environment of Ray's processes: the user's, without addresses and credentials.

    RAY_ADDRESS and the like are dropped; settings, which are lower case after RAY_, are kept.
    """
    inherited = {k: v for k, v in os.environ.items() if not re.match("RAY_[A-Z]", k)}
    fixed = {
        **LOOPBACK,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    # At Ray's default of 15, a worker that competes for a core gets a fiftieth of it.
    return {"RAY_worker_niceness": "0", **inherited, **fixed, **login}


def _address(process: subprocess.Popen[str], folder: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not (folder / _ADDRESS).exists():
        if process.poll() is not None:
            reason = process.communicate()[0].strip().splitlines()
            raise ValueError(f"Ray does not start here: {reason[-1] if reason else 'no reason'}")
        if time.monotonic() > deadline:
            raise ValueError(f"Ray has not started within {START_SECONDS:g} s")
        time.sleep(_LOOK_SECONDS)
    return (folder / _ADDRESS).read_text(encoding="ascii")


def keep(folder: Path, driver: int, cpus: int) -> str:
    """Keep Ray running until SIGTERM or until the driver or Ray ends; the script's first half.

    Args:
        folder: Created here, accessible to this user only; everything Ray writes goes into it.
        driver: The driver's process id.
        cpus: CPUs that Ray offers.

    Returns:
        The last line that Ray printed while it started.
    """
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A function rather than SIG_IGN, which Ray's processes would inherit.
        signal.signal(number, lambda number, _: signals.append(number))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder.mkdir(mode=0o700)
    command = [sys.executable, "-P", __file__, "start", str(folder), str(os.getpid()), str(cpus)]
    with (folder / _LOG).open("wb") as log:
        ray = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    while os.getppid() == driver and not signals and ray.poll() is None:
        time.sleep(_LOOK_SECONDS)
    lines = (folder / _LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    _kill_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    return lines[-1] if lines else ""


def _kill_descendants() -> None:
    """Kill and reap until none is left; the next round catches any that were just forked."""
    while True:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        try:
            os.wait()
        except ChildProcessError:
            return


def start(folder: Path, keeper: int, cpus: int) -> None:
    """Start Ray, write its head's address, and run as long as the keeper; the second half."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=cpus,
        _temp_dir=str(folder / "r"),  # Ray makes it world-accessible, but not the folder around it.
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    unfinished = folder / f"{_ADDRESS}.new"
    unfinished.write_text(context.address_info["gcs_address"], encoding="ascii")
    unfinished.rename(folder / _ADDRESS)
    while os.getppid() == keeper:
        time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
    arguments = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if sys.argv[1] == "keep":
        print(keep(*arguments))
    else:
        start(*arguments)
