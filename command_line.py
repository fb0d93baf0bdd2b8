"""How a script starts and ends: signals while it loads, help, version, `--json`, exit codes.

Scripts import this before anything else, so that every later import is guarded. It therefore
imports only the standard library at its top.
"""

import json
import os
import shlex
import shutil
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module, metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import typer

DONE, BROKEN, USAGE, INTERRUPTED, WRONG_FOLDER, NOTHING_EVALUATED = range(6)
"""Exit codes."""

REASONS = {
    DONE: "done",
    BROKEN: "broken",
    USAGE: "usage",
    INTERRUPTED: "interrupted",
    WRONG_FOLDER: "folder",
    NOTHING_EVALUATED: "nothing evaluated",
}
"""The exit codes' names in `--json`."""

_CLOSED = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *_CLOSED)
"""Ctrl-C; what clusters send before they kill; a closed terminal, except under nohup."""

_SCRIPTS = {"run_search": "prunevolve-search", "run_prune": "prunevolve-prune"}
"""The scripts and their console entries."""

_NOTHING_WRITTEN = "interrupted before anything was written: run the same command again"
_CLEAN_LINE = b"\r\x1b[K\x1b[?25h"
"""Clears a terminal's line and shows the cursor, which a spinner hides."""


def leave_on_signals() -> None:
    """From now on, let a signal end the process at once, with one line and exit code 3.

    For as long as nothing has been written: an exception raised during an import may surface as
    another one, or not at all.
    """
    for number in SIGNALS:
        signal.signal(number, _leave)


@contextmanager
def guarded() -> Iterator[None]:
    """While open, handle signals as `leave_on_signals` does; afterwards as before."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    leave_on_signals()
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def raise_on_signals() -> None:
    """From now on, let a signal raise KeyboardInterrupt, so that work can be left in order."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


def leave() -> NoReturn:
    """End the process at once, before it has written anything, with one line and exit code 3."""
    # Written to the descriptors, because a stream may be in the middle of a write.
    os.write(2, (_CLEAN_LINE if os.isatty(2) else b"") + f"{_NOTHING_WRITTEN}\n".encode())
    if wants_json():
        os.write(1, f"{json.dumps(outcome(INTERRUPTED, error=_NOTHING_WRITTEN))}\n".encode())
    os._exit(INTERRUPTED)


def _leave(number: int, frame: FrameType | None) -> None:
    leave()


def wants_json() -> bool:
    """Tell whether the command line has `--json`, even if it cannot be parsed."""
    return "--json" in sys.argv[1:]


def outcome(code: int, **content: object) -> dict[str, Any]:
    """Return what `--json` prints: the exit code, its name, and the given content."""
    return {"exit": code, "reason": REASONS[code], **content}


def failed(code: int, error: Exception | str) -> dict[str, Any]:
    """Print an error as one line; return what `--json` prints for it."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    return outcome(code, error=line)


def make_app(
    command: Callable[..., Mapping[str, Any]],
    examples: tuple[str, ...],
    exit_codes: Mapping[int, str],
) -> "typer.Typer":
    """Return the Typer application of one command.

    It has `-h` and shell completion. Its help lists examples and exit codes below the options, and
    shows no type for a flag.
    """
    import typer
    from typer.core import TyperCommand

    class Command(TyperCommand):
        def get_params(self, ctx: Any) -> list[Any]:
            """Return the options, with no type for flags."""
            params = super().get_params(ctx)
            for param in params:
                if getattr(param, "is_flag", False):
                    param.metavar = ""
            return params

    app = typer.Typer(
        pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    codes = [f"  {code} {meaning}" for code, meaning in exit_codes.items()]
    lines = ["Examples:", *(f"  {example}" for example in examples), "", "Exit codes:", *codes]
    app.command(cls=Command, epilog="\n".join(lines))(command)
    return app


def json_option() -> Any:
    """Return the option `--json`, which `wants_json` reads as well."""
    import typer

    return typer.Option(
        "--json", help="Print one JSON object at the end, everything else to stderr."
    )


def version_option() -> Any:
    """Return the option `--version`, which prints the version and exits."""
    import typer

    return typer.Option(
        "--version", help="Print the version.", callback=_print_version, is_eager=True
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prunevolve {version()}")
        raise SystemExit(DONE)


def version() -> str:
    """Return the version of the checkout that holds this file, or else of the installed package."""
    try:
        with (Path(__file__).parent / "pyproject.toml").open("rb") as file:
            return str(tomllib.load(file)["project"]["version"])
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return metadata.version("prunevolve")


def run_to_end(app: "typer.Typer") -> NoReturn:
    """Run a script's application, whose command returns what `--json` prints, and exit.

    A mistake in the options is reported in one line. Signals are handled as by `leave_on_signals`
    until the command changes that.
    """
    import typer

    as_json = wants_json()
    with guarded(), redirect_stdout(sys.stderr) if as_json else nullcontext():
        try:
            result = app(standalone_mode=False)
        except typer.TyperException as error:
            result = failed(USAGE, error.format_message())
    if not isinstance(result, dict):
        sys.exit(result)  # --help and the like return an exit code
    if as_json:
        print(json.dumps(result))
    sys.exit(result["exit"])


def called(script: str) -> str:
    """Return how to call a script, in the form in which this process was called.

    Args:
        script: `run_search` or `run_prune`.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = Path(sys.argv[0])
    if spec is not None and spec.name in _SCRIPTS:
        return f"python -m {script}"
    if program.stem in _SCRIPTS:
        return f"python {shlex.quote(str(program.with_name(f'{script}.py')))}"
    entry = _SCRIPTS[script]
    on_path = shutil.which(program.stem)
    if program.stem in _SCRIPTS.values() and (not on_path or Path(on_path) != program.absolute()):
        return shlex.quote(str(program.with_name(entry)))
    return entry


def prune() -> None:
    """Run `run_prune.py` as a console script, guarded from its first import."""
    _start("run_prune")


def search() -> None:
    """Run `run_search.py` as a console script, guarded from its first import."""
    _start("run_search")


def _start(script: str) -> None:
    leave_on_signals()
    import_module(script).main()
