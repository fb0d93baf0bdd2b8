"""How a script starts and ends: its options, signals, `--json` and exit codes."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn, ParamSpec

import typer

Arguments = ParamSpec("Arguments")

Answer = dict[str, object]  # what `--json` prints

DONE, BROKEN, USAGE, INTERRUPTED, WRONG_FOLDER, NOTHING_EVALUATED = range(6)
REASONS = ("done", "broken", "usage", "interrupted", "folder", "nothing evaluated")  # in `--json`

_CODES = """\
Exit codes:
  0 done
  2 usage or config
  3 interrupted, resumable
  4 the folder does not fit this request
  5 no evaluation succeeded"""


def _called(name: str) -> str:
    by_name = Path(sys.argv[0]).name.startswith("prunevolve-")
    is_here = (Path(__file__).resolve().parents[1] / f"run_{name}.py").is_file()
    return f"python run_{name}.py" if is_here and not by_name else f"prunevolve-{name}"


SEARCH, PRUNE = _called("search"), _called("prune")
"""How the two commands are called where this runs: as installed, or from a checkout."""

NOTHING_WRITTEN = "interrupted before anything was written: run the same command again"

# Read by libraries that the commands import, unless the user has set it.
_ENVIRONMENT = {
    # An unreachable Hugging Face hub is asked for 3 seconds at a time, not 10, in silence.
    "HF_HUB_ETAG_TIMEOUT": "3",
    "HF_HUB_VERBOSITY": "error",
    # torch asks Linux for huge pages, since each page of a large new tensor is a page fault: a
    # sixth to a fifth of the time of pruning a 7B model.
    "THP_MEM_ALLOC_ENABLE": "1",
}

JSON_OPTION = typer.Option(
    "--json", metavar="", help="Print one JSON object at the end, everything else to stderr."
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prunevolve {metadata.version('prunevolve')}")
        raise SystemExit(DONE)


VERSION_OPTION = typer.Option(
    "--version", metavar="", help="Print the version.", callback=_print_version, is_eager=True
)

# What installs a library that is missing; the extra `search` for all others.
_EXTRAS = {"lm_eval": "zero-shot", "tensorboard": "trackers"}


class Resumable(RuntimeError):
    """Raised to end a run that can be resumed; the message is one line."""


class FolderError(ValueError):
    """A folder does not fit what is asked of it."""


def check_run(folder: Path) -> None:
    """Raise FolderError if a folder is no run's."""
    if not (folder / "config.yaml").is_file():
        raise FolderError(f"{folder} is not a run folder: it has no config.yaml")


def check_new_run(folder: Path) -> None:
    """Raise FolderError if the folder of a new run exists and is not an empty one."""
    # A kill at the start leaves the lock behind.
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else [".lock"]
    if folder.is_file() or names not in ([], [".lock"]):
        way_on = f", or --resume {folder}" if (folder / "config.yaml").is_file() else ""
        raise FolderError(f"--out {folder} is not an empty folder: name another{way_on}")


_signals: list[int] = []  # that `interruptible` turned into a KeyboardInterrupt


@contextmanager
def interruptible(guarded: bool = False) -> Iterator[None]:
    """Let the first signal raise KeyboardInterrupt; a second does what Python does by itself.

    They are Ctrl-C, SIGTERM, which clusters send before they kill, and SIGHUP, which a closed
    terminal sends, except under nohup. Under a guard, which kills at the second, others are
    ignored: who stops a job may send one to each of its processes.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    report = sys.unraisablehook

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def report_others(lost: "sys.UnraisableHookArgs") -> None:
        if not (_signals and isinstance(lost.exc_value, KeyboardInterrupt)):  # `check_interrupt`
            report(lost)

    def interrupt(number: int, frame: FrameType | None) -> None:
        restore()
        for other in numbers if guarded else ():
            signal.signal(other, signal.SIG_IGN)
        _signals.append(number)
        raise KeyboardInterrupt

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report
        restore()
        _signals.clear()


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if a signal's was lost: Python drops what a callback raises.

    One is `__del__`, another what an import calls when a module's lock goes.
    """
    if _signals:
        raise KeyboardInterrupt


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


def _missing(error: BaseException | None) -> str:
    """Return the library that is missing; the error of a lazy import has its name in a cause."""
    while error and not (isinstance(error, ModuleNotFoundError) and error.name):
        error = error.__cause__ or error.__context__
    return str(getattr(error, "name", "a library")).partition(".")[0]


def make_app(command: Callable[Arguments, Answer], examples: tuple[str, ...]) -> typer.Typer:
    """Return the Typer application of a command whose mistakes and interrupts end in one line.

    The help lists examples and exit codes below the options.
    """

    @wraps(command)
    def reported(*args: Arguments.args, **options: Arguments.kwargs) -> Answer:
        try:
            return command(*args, **options)
        except Resumable as error:
            return failed(INTERRUPTED, error)
        except ValueError as error:
            return failed(WRONG_FOLDER if isinstance(error, FolderError) else USAGE, error)
        except ModuleNotFoundError as error:
            library = _missing(error)
            way_out = f"pip install 'prunevolve[{_EXTRAS.get(library, 'search')}]'"
            return failed(USAGE, f"{library} must be installed for this: {way_out}")
        except KeyboardInterrupt:
            return interrupted(NOTHING_WRITTEN)
        except BrokenPipeError:  # which Click would end with 1
            return outcome(INTERRUPTED, error="the output was closed")

    app = typer.Typer(
        pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    lines = ["Examples:", *(f"  {example}" for example in examples), "", _CODES]
    app.command(epilog="\n".join(lines))(reported)
    return app


def run_to_end(app: typer.Typer, guarded: bool = False) -> NoReturn:
    """Run a script's application, whose command returns what `--json` prints, and exit.

    A reader that is gone is as an interrupt. See `interruptible` for `guarded`.
    """
    as_json = "--json" in sys.argv[1:]  # also if the rest cannot be parsed
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with interruptible(guarded), redirect_stdout(sys.stderr) if as_json else nullcontext():
            try:
                result = app(standalone_mode=False)
            except typer.TyperException as error:
                result = failed(USAGE, error.format_message())
        if as_json and isinstance(result, dict):
            print(json.dumps(result))
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        result, nowhere = INTERRUPTED, os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):  # or what is still buffered would fail again at exit
            os.dup2(nowhere, number)
    sys.exit(result["exit"] if isinstance(result, dict) else result)  # --help returns a code


def leave(end: SystemExit) -> NoReturn:
    """End the process at once: to take some thousand modules apart takes more than a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(end.code or 0))
