"""How a script starts and ends: signals while it loads, `--help`, `--version`, `--json`.

Imported before anything else, so that what it guards is all that comes after: the standard library
alone stands at its top.
"""

import json
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

DONE, USAGE, INTERRUPTED, WRONG_FOLDER = 0, 2, 3, 4
"""Exit codes."""

REASONS = {DONE: "done", USAGE: "usage", INTERRUPTED: "interrupted", WRONG_FOLDER: "folder"}
"""What `--json` calls them."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what clusters send before they kill."""

_NOTHING_BEGUN = "interrupted before anything was written: run the same command again"
_CLEAN_LINE = b"\r\x1b[K\x1b[?25h"
"""Clears a terminal's line and shows the cursor, which a spinner hides."""


def leave_on_signals() -> None:
    """From now on let a signal end the process at once, in one line and with exit code 3.

    For the time in which nothing is written: an exception in the midst of an import may come out as
    any other, or not at all.
    """
    for number in SIGNALS:
        signal.signal(number, _leave)


@contextmanager
def guarded() -> Iterator[None]:
    """While open, treat signals as `leave_on_signals`; afterwards as before."""
    before = [signal.getsignal(number) for number in SIGNALS]
    leave_on_signals()
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def raise_on_signals() -> None:
    """From now on let a signal raise KeyboardInterrupt, so that work can be left in order."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    # By the descriptors: the streams may be in the midst of a write.
    os.write(2, (_CLEAN_LINE if os.isatty(2) else b"") + f"{_NOTHING_BEGUN}\n".encode())
    if wants_json():
        os.write(1, f"{json.dumps(outcome(INTERRUPTED, error=_NOTHING_BEGUN))}\n".encode())
    os._exit(INTERRUPTED)


def wants_json() -> bool:
    """Tell whether the command line has `--json`, also where it cannot be parsed."""
    return "--json" in sys.argv[1:]


def outcome(code: int, **content: object) -> dict[str, Any]:
    """Return what `--json` prints: exit code, its reason, and what there is to tell."""
    return {"exit": code, "reason": REASONS[code], **content}


def make_app(command: Callable[..., Mapping[str, Any]], examples: tuple[str, ...]) -> "typer.Typer":
    """Return the Typer application of one command.

    It has `-h`, shell completion, and examples below its options; an option that is no more than a
    flag shows no type.
    """
    import typer
    from typer.core import TyperCommand

    class Command(TyperCommand):
        def get_params(self, ctx: Any) -> list[Any]:
            """Return the options, flags without a type."""
            params = super().get_params(ctx)
            for param in params:
                if getattr(param, "is_flag", False):
                    param.metavar = ""
            return params

    app = typer.Typer(
        pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    # Typer takes a single line break away.
    app.command(cls=Command, epilog="\n\n".join(("Examples:", *examples)))(command)
    return app


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is wanted: the callback of `--version`."""
    if wanted:
        print(f"prunevolve {version()}")
        raise SystemExit(DONE)


def version() -> str:
    """Return the version: of the checkout that this file stands in, or what is installed."""
    try:
        with (Path(__file__).parent / "pyproject.toml").open("rb") as file:
            return str(tomllib.load(file)["project"]["version"])
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return metadata.version("prunevolve")


def prune() -> None:
    """Run `run_prune.py` as a console script, guarded from its first import on."""
    leave_on_signals()
    from run_prune import main

    main()
