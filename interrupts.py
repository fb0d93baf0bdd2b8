"""Signals that end a run: the first asks it to stop, a second or a long silence ends it at once.

While a script loads, before there is a run, `command_line.py` has them.
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
"""Seconds after the first signal in which a run comes to its end by itself."""


class Resumable(RuntimeError):
    """What ends a run that can be resumed; the message is one line."""


@contextmanager
def stoppable() -> Iterator[None]:
    """While open, let the first signal raise KeyboardInterrupt in the main thread, and watch.

    Does nothing outside the main thread, which alone can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # The byte arrives at once, also while the main thread is in a library's own code, where no
    # Python handler runs.
    inner, outer = socket.socketpair()
    outer.setblocking(False)
    before = signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _stop) for number in SIGNALS}
    watch = threading.Thread(target=_watch, args=(inner,), daemon=True)
    watch.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        outer.close()
        watch.join()
        inner.close()


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(inner: socket.socket) -> None:
    """Wait for a signal's byte; then end the process at the next, or when time is up."""
    if not _signal_came(inner, None):
        return
    if _signal_came(inner, PATIENCE):
        # Everything in the run folder is whole at any instant.
        os._exit(INTERRUPTED)


def _signal_came(inner: socket.socket, seconds: float | None) -> bool:
    """Wait for the byte of a signal of ours, or until time is up; False if the end is closed."""
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
