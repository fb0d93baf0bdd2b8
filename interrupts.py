"""Signals that end a run: the first asks it to stop; a second, or a slow stop, ends it at once.

While a script loads, before there is a run, `command_line.py` handles signals.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from command_line import INTERRUPTED, SIGNALS

PATIENCE = 8.0
"""Seconds that a run has after the first signal to end by itself."""


class Resumable(RuntimeError):
    """Raised to end a run that can be resumed; the message is one line."""


@contextmanager
def stoppable() -> Iterator[None]:
    """While open, let a signal raise KeyboardInterrupt; a second or a slow stop ends the process.

    Does nothing outside the main thread, since only that can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # The byte arrives at once, even while the main thread runs native code, where no Python
    # handler can run.
    inner, outer = socket.socketpair()
    outer.setblocking(False)
    old_descriptor = signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _stop) for number in SIGNALS}
    watch = threading.Thread(target=_watch, args=(inner,), daemon=True)
    watch.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_descriptor)
        outer.close()
        watch.join()
        inner.close()


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(inner: socket.socket) -> None:
    """Wait for a signal's byte; then end the process at the next one, or when time is up."""
    if not _signal_came(inner, None):
        return
    if _signal_came(inner, PATIENCE):
        # Safe, because every file in the run folder is complete at any moment.
        os._exit(INTERRUPTED)


def _signal_came(inner: socket.socket, seconds: float | None) -> bool:
    """Wait for the byte of one of `SIGNALS`, or until time is up; False if the socket is closed."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        inner.settimeout(None if end is None else max(0.01, end - time.monotonic()))
        try:
            byte = inner.recv(1)
        except TimeoutError:
            return True
        if not byte or byte[0] in SIGNALS:
            return bool(byte)


class Unbreakable:
    """A text stream that survives the loss of its reader: from then on it discards its text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, or discard it if the reader is gone."""
        try:
            return self._stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        """Write the buffered text, or discard it if the reader is gone."""
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _silence(self) -> None:
        # The descriptor is replaced, so that buffered text can still be flushed at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
