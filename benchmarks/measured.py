"""A process's time and peak memory, measured from outside, and the time that the disk alone takes.

Linux only: memory is read from /proc, and the page cache is dropped with posix_fadvise, which
needs no privileges.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

POLL_SECONDS = 0.02
"""Time between two readings of a process's memory."""

_BUFFER = 8 * 2**20
_KIB_PER_GIB = 2**20
_LOG_LINES = 15


@dataclass(frozen=True)
class Measured:
    """A process's time and memory.

    Attributes:
        seconds: From start to end.
        peak_gib: Highest sum of anonymous and shared memory read, in GiB. This is what the process
            itself holds: pages of mapped files, which the system can reclaim, are left out.
        peak_with_files_gib: Highest resident memory by the system's own count, in GiB.
        killed: Whether `measure` killed it before it ended.
    """

    seconds: float
    peak_gib: float
    peak_with_files_gib: float
    killed: bool


def measure(command: Sequence[str], log: Path, kill_after: float | None = None) -> Measured:
    """Run a command in the project's root and watch its memory.

    Args:
        command: A program and its arguments.
        log: File to which its output is appended.
        kill_after: Seconds after which it is killed with SIGKILL; None lets it end.

    Raises:
        RuntimeError: If its exit code is not 0; the message has the last lines of its output.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    peak = peak_with_files = 0
    killed = False
    with log.open("ab") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                sizes = _memory_kib(process.pid)
                peak = max(peak, sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))
                peak_with_files = max(peak_with_files, sizes.get("VmHWM", 0))
                if kill_after is not None and time.perf_counter() - began >= kill_after:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
                killed = True
    seconds = time.perf_counter() - began
    if process.returncode != 0 and not killed:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise RuntimeError("\n".join([f"code {process.returncode} of {' '.join(command)}", *lines]))
    return Measured(seconds, peak / _KIB_PER_GIB, peak_with_files / _KIB_PER_GIB, killed)


def drop_cache(folder: Path) -> None:
    """Ask the system to drop a folder's files from the page cache."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(folder: Path, copy: Path) -> float:
    """Return the seconds to read a folder's files and write them once, with fsync.

    The copy is made in a plain loop, with a cold page cache, and then removed.
    """
    drop_cache(folder)
    copy.mkdir()
    began = time.perf_counter()
    for path in _files(folder):
        with path.open("rb", buffering=0) as source, (copy / path.name).open("wb", 0) as target:
            shutil.copyfileobj(source, target, _BUFFER)
            os.fsync(target.fileno())
    seconds = time.perf_counter() - began
    drop_cache(folder)
    drop_cache(copy)
    shutil.rmtree(copy)
    return seconds


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _memory_kib(pid: int) -> dict[str, int]:
    """Return the sizes in /proc/PID/status by name, in KiB; empty if the process has ended."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) for name, size, _ in fields}
