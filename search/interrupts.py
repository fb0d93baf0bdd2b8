"""Signals that end a run: the first asks it to stop, a second or a long silence ends it at once.

Imported before anything that takes long, so only the standard library stands here.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

INTERRUPTED = 3
"""Exit code of a run that was interrupted and can be resumed."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what clusters send before they kill; a terminal that was closed."""

PATIENCE = 8.0
"""Seconds after the first signal in which a run comes to its end by itself."""


def install() -> None:
    """Let the first signal raise KeyboardInterrupt in the main thread, and watch what follows.

    To be called again after a library took the signals for itself; does nothing outside the main
    thread, which alone can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    sys.excepthook = _hook
    for number in SIGNALS:
        signal.signal(number, _stop)
    if not any(thread.name == _watch.__name__ for thread in threading.enumerate()):
        # The byte arrives at once, also while the main thread is in a library's own code, where
        # no Python handler runs.
        inner, outer = socket.socketpair()
        outer.setblocking(False)
        signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)
        threading.Thread(
            target=_watch, args=(inner, outer), name=_watch.__name__, daemon=True
        ).start()


def leave() -> NoReturn:
    """End the process at once, in one line, where there is no run to speak of."""
    with suppress(OSError):
        print("interrupted before the run began", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Leave where an interrupt came while modules were imported; show anything else."""
    if issubclass(kind, KeyboardInterrupt):
        leave()
    sys.__excepthook__(kind, error, trace)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(inner: socket.socket, outer: socket.socket) -> None:
    """Wait for a signal's byte; then end the process at the next, or when time is up."""
    while inner.recv(1)[0] not in SIGNALS:
        pass
    inner.settimeout(PATIENCE)
    began = time.monotonic()
    try:
        while inner.recv(1)[0] not in SIGNALS:
            inner.settimeout(max(0.1, PATIENCE - (time.monotonic() - began)))
    except TimeoutError:
        pass
    # Everything in the run folder is whole at any instant.
    os._exit(INTERRUPTED)


class Unbreakable:
    """A text stream that goes on when what reads it is gone: from then on it writes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, if anybody can read it."""
        try:
            return self._stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, if anybody can read it."""
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _silence(self) -> None:
        # In the stream's place, so that what is buffered has somewhere to go at the end, too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
