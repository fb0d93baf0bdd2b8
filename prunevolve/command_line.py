"""How a script starts and ends: its options, signals, `--json` and exit codes."""

import errno
import json
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, ParamSpec

import typer
from typer.core import TyperCommand

Arguments = ParamSpec("Arguments")

Answer = dict[str, object]
"""What `--json` prints."""

DONE, BROKEN, USAGE, INTERRUPTED, WRONG_FOLDER, NOTHING_EVALUATED = range(6)
"""Exit codes."""

REASONS = ("done", "broken", "usage", "interrupted", "folder", "nothing evaluated")
"""The exit codes' names in `--json`, in their order."""

NOTHING_WRITTEN = "interrupted before anything was written: run the same command again"

_ENVIRONMENT = {
    "HF_HUB_ETAG_TIMEOUT": "3",
    "HF_HUB_VERBOSITY": "error",
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Read by libraries that the commands import, unless the user has set it.

An unreachable Hugging Face hub is asked for 3 seconds at a time, not 10, and without a line for
each attempt. torch asks Linux for huge pages, since each page of a large new tensor is a page
fault: a sixth to a fifth of the time of pruning a 7B model.
"""

JSON_OPTION = typer.Option(
    "--json", help="Print one JSON object at the end, everything else to stderr."
)


class Resumable(RuntimeError):
    """Raised to end a run that can be resumed; the message is one line."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the first signal raise KeyboardInterrupt; a second does what Python does by itself.

    The signals are Ctrl-C, SIGTERM, which clusters send before they kill, and SIGHUP, which a
    closed terminal sends, except under nohup.
    """
    closed = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    numbers = (signal.SIGINT, signal.SIGTERM, *closed)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupt(number: int, frame: FrameType | None) -> None:
        restore()
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        restore()


def _discard_output() -> None:
    """Let the text that is still buffered go nowhere: a flush at exit would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def outcome(code: int, **content: object) -> Answer:
    """Return what `--json` prints: the exit code, its name, and the given content."""
    return {"exit": code, "reason": REASONS[code], **content}


def failed(code: int, error: Exception | str) -> Answer:
    """Print an error as one line; return what `--json` prints for it."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    return outcome(code, error=line)


def interrupted(line: str) -> Answer:
    """Print how to go on after an interrupt; return what `--json` prints for it."""
    print(line, file=sys.stderr)
    return outcome(INTERRUPTED, error=line)


class _Command(TyperCommand):
    """A command whose help shows no type for a flag."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options."""
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


def make_app(
    command: Callable[Arguments, Answer],
    examples: tuple[str, ...],
    exit_codes: Mapping[int, str],
) -> typer.Typer:
    """Return the Typer application of one command.

    A mistake or an interrupt that the command raises ends in one line. The help lists examples and
    exit codes below the options.
    """

    @wraps(command)
    def reported(*args: Arguments.args, **options: Arguments.kwargs) -> Answer:
        try:
            return command(*args, **options)
        except Resumable as error:
            return failed(INTERRUPTED, error)
        except ValueError as error:
            return failed(getattr(error, "exit_code", USAGE), error)
        except ModuleNotFoundError as error:
            return failed(USAGE, error)
        except KeyboardInterrupt:
            return interrupted(NOTHING_WRITTEN)
        except OSError as error:
            return _without_reader(error)

    app = typer.Typer(
        pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    codes = [f"  {code} {meaning}" for code, meaning in exit_codes.items()]
    lines = ["Examples:", *(f"  {example}" for example in examples), "", "Exit codes:", *codes]
    app.command(cls=_Command, epilog="\n".join(lines))(reported)
    return app


def _without_reader(error: OSError) -> Answer:
    """Return the outcome of a run that found its pipe or terminal closed; raise other errors."""
    if error.errno not in (errno.EPIPE, errno.EIO):
        raise error
    _discard_output()
    return outcome(INTERRUPTED, error="the output was closed")


def version_option() -> Any:
    """Return the option `--version`, which prints the version and exits."""
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
        with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
            return str(tomllib.load(file)["project"]["version"])
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return metadata.version("prunevolve")


def run_to_end(app: typer.Typer) -> NoReturn:
    """Run a script's application, whose command returns what `--json` prints, and exit.

    A mistake in the options is reported in one line.
    """
    as_json = "--json" in sys.argv[1:]  # also if the rest cannot be parsed
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with interruptible(), redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = app(standalone_mode=False)
    except typer.TyperException as error:
        result = failed(USAGE, error.format_message())
    if not isinstance(result, dict):
        sys.exit(result)  # --help and the like return an exit code
    try:
        if as_json:
            print(json.dumps(result))
        sys.stdout.flush()
    except OSError as error:
        result = _without_reader(error)
    sys.exit(result["exit"])
