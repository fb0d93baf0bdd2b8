"""The guard of a search: the process that the user started, around the driver, which is its child.

Ray ends a process that has lost its node, or hangs it with its head, and leaves the processes and
the folder of a local Ray behind if it is killed. So the guard passes signals on; if the driver ends
without an exit code of its own, or Ray does not answer it any more, the guard kills it, says how to
resume, and exits with 3. What a local Ray leaves is removed by `sweeper`, a process that waits for
the end of the one that started it.
"""

import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import IO

# Without a word for so long, once it began to speak, or to join Ray, the driver is given up.
SILENCE_SECONDS, _JOIN_SECONDS = 20.0, 60.0
_CLEAN_ROUNDS = 30  # tenths of a second without anything new: a process may come late
_INTERRUPTED = 3
_DIE_WITH_PARENT = 1  # Linux's prctl(PR_SET_PDEATHSIG)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_to_guard: int | None = None  # in the driver, if there is a guard


def around(drive: Callable[[], object]) -> None:
    """Run a function that ends in SystemExit in a child process; exit as it does."""
    sent: list[int] = []
    read, write = os.pipe()
    guard = os.getpid()
    sys.stdout.flush()
    # Signals wait until each process knows what to do with them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    driver = os.fork()

    def forward(number: int, frame: object) -> None:
        sent.append(number)
        with suppress(ProcessLookupError):
            os.kill(driver, number if len(sent) == 1 else signal.SIGKILL)

    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            # Until the driver listens itself, it ends without a word.
            signal.signal(number, forward if driver else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if driver:
        os.close(write)
        sys.exit(_watch(driver, read, sent))
    os.close(read)
    os.setsid()  # a terminal's Ctrl-C must not reach Ray's processes
    with suppress(AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    if os.getppid() != guard:
        sys.exit(_INTERRUPTED)
    global _to_guard
    _to_guard = write
    try:
        drive()
    except SystemExit as end:
        from prunevolve.command_line import leave  # not before a signal can be handed on

        tell(f"exit {end.code or 0}")
        leave(end)


def tell(word: str) -> None:
    """Tell the guard, if there is one, how Ray is and how this ends.

    `joins`: Ray starts, and must answer within a minute; `answers`: it answered; `quiet`: it
    is no longer used; `resume HOW`: how to go on; `exit CODE`: the end.
    """
    if _to_guard is not None:
        with suppress(OSError):  # it was killed: a signal follows
            os.write(_to_guard, f"{word}\n".encode())


def _watch(driver: int, read: int, sent: list[int]) -> int:
    """Wait for the end of the driver, which was sent some signals; return the exit code."""
    told: dict[str, str] = {}
    patience = math.inf  # seconds until the next word must come
    while True:
        # Counted in waits: the clock runs on while this process is suspended.
        if not select.select([read], [], [], 1.0)[0]:
            patience -= 1.0
            if patience <= 0:
                os.kill(driver, signal.SIGKILL)
            continue
        if not (words := os.read(read, 1 << 16).decode().split("\n")[:-1]):
            break  # the driver has ended
        for word in words:
            kind, _, rest = word.partition(" ")
            told[kind] = rest
            limits = {"joins": _JOIN_SECONDS, "answers": SILENCE_SECONDS, "exit": SILENCE_SECONDS}
            patience = limits.get(kind, math.inf)
    status = os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1])
    if "exit" in told:
        return int(told["exit"])
    way_on = told.get("resume", "")
    if patience <= 0:
        why = f"error: Ray has not answered for {SILENCE_SECONDS:g} s or more"
    elif sent and not way_on:
        why = "interrupted before anything was written: run the same command again"
    elif sent:
        why = "interrupted"
    elif status < 0:
        why = f"error: the search was killed by {signal.Signals(-status).name}"
    elif "joins" not in told:
        return status  # it has said itself what was wrong
    else:
        why = "error: Ray ended the search: its head or its node is gone"
    with suppress(OSError):
        print(f"{why}; {way_on}" if way_on else why, file=sys.stderr)
    return _INTERRUPTED


def start_sweeper(folder: str) -> IO[bytes]:
    """Start a process that removes a local Ray and its folder once what is returned is closed."""
    sweeper = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert sweeper.stdin
    return sweeper.stdin


def _sweep(folder: Path) -> None:
    """Wait until nobody holds the other end of the standard input; end once nothing is left."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    spared = {os.getpid(), os.getppid()}  # the latter may live on, without Ray
    sys.stdin.buffer.read()
    clean = 0
    while clean < _CLEAN_ROUNDS:
        users = [process for process in _users(folder) if process not in spared]
        for process in users:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        clean = 0 if users or folder.exists() else clean + 1
        rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def _users(folder: Path) -> Iterator[int]:
    """Yield the processes with an open file in a folder: all of Ray's have their logs there."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(file.readlink().is_relative_to(folder) for file in (process / "fd").iterdir()):
                yield int(process.name)


if __name__ == "__main__":
    _sweep(Path(sys.argv[1]))
