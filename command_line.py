"""What the command lines of both scripts have in common: help, version, errors, JSON, own name.

Imports nothing of ours and nothing that takes long, so that `--help` answers at once.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

USAGE = 2
"""Exit code of a mistake in the request."""

_SCRIPTS = {"run_search": "prunevolve-search", "run_prune": "prunevolve-prune"}
"""The scripts and their console entries."""


class _Command(TyperCommand):
    """A command whose help names no type where an option takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


def application(command: Callable[..., None]) -> typer.Typer:
    """Return a script's application of one command: `-h`, shell completion, plain errors."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prunevolve {metadata.version('prunevolve')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version),
]
"""The type of an option `--version`, whose default is False."""

Json = Annotated[
    bool,
    typer.Option("--json", help="At the end print one JSON object; all else goes to stderr."),
]
"""The type of an option `--json`, whose default is False."""


def fail(error: Exception | str, code: int) -> int:
    """Print an error as one line and return the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def print_json(result: Mapping[str, object]) -> None:
    """Print what a script came to as one JSON object, on stdout."""
    print(json.dumps(result, ensure_ascii=False))


def called(script: str) -> str:
    """Return how to call a script, spelled as this process was called.

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
    found = shutil.which(program.stem)
    if program.stem in _SCRIPTS.values() and (not found or Path(found) != program.absolute()):
        return shlex.quote(str(program.with_name(entry)))
    return entry
