"""Measure how much there is to read: lines, files, long functions, classes, `Any`, keys, words.

One row each for the core, the tests, and benchmarks with scripts; keys and words are of the whole
project. Only files that git knows are counted. `--root` measures another checkout.
"""

import ast
import json as json_text
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LONG = (40, 50, 60)
MOST_PARAMETERS = 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main(
    root: Annotated[Path, typer.Option(help="The checkout to measure.")] = ROOT,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print the table."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files = [path for name in listed.splitlines() if (path := root / name).is_file()]
    parts: dict[str, list[Path]] = {"core": [], "tests": [], "benchmarks, scripts": []}
    for path in files:
        if path.suffix == ".py":
            parts[_part_of(path.relative_to(root))].append(path)
    figures: dict[str, dict[str, int]] = {name: _measure(paths) for name, paths in parts.items()}
    documents = [path for path in files if path.suffix == ".md"]
    figures["whole project"] = {
        "search keys": _count_keys(root / "configs/schema.py", "Search"),
        "words of Markdown": sum(len(path.read_text("utf-8").split()) for path in documents),
    }
    headings = list(dict.fromkeys(name for part in figures.values() for name in part))
    table = Table("", *figures)
    for heading in headings:
        table.add_row(heading, *(str(part.get(heading, "")) for part in figures.values()))
    Console(highlight=False, width=110).print(table)
    if json:
        json.write_text(json_text.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _part_of(path: Path) -> str:
    named = {
        "tests": "tests",
        "benchmarks": "benchmarks, scripts",
        "scripts": "benchmarks, scripts",
    }
    return named.get(path.parts[0], "core")


def _measure(paths: list[Path]) -> dict[str, int]:
    """Return the figures of some Python files."""
    trees = [ast.parse(path.read_text("utf-8")) for path in paths]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, Function)]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in functions]
    return {
        "lines": sum(len(path.read_text("utf-8").splitlines()) for path in paths),
        "files": len(paths),
        **{f"functions over {most} lines": sum(n > most for n in lengths) for most in LONG},
        f"functions with over {MOST_PARAMETERS} parameters": sum(
            len(list(_parameters(node))) > MOST_PARAMETERS for node in functions
        ),
        "classes": sum(isinstance(node, ast.ClassDef) for node in nodes),
        "Any": sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes),
    }


def _parameters(function: Function) -> Iterator[ast.arg]:
    """Yield a function's parameters, other than the instance or class that it belongs to."""
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        if argument.arg not in ("self", "cls"):
            yield argument


def _count_keys(schema: Path, section: str) -> int:
    """Return the keys of a section of the config; those of a section inside count, too."""
    tree = ast.parse(schema.read_text("utf-8"))
    fields = {
        node.name: [field for field in node.body if isinstance(field, ast.AnnAssign)]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }

    def keys_of(name: str) -> int:
        types = [ast.unparse(field.annotation) for field in fields[name]]
        return sum(keys_of(kind) if kind in fields else 1 for kind in types)

    return keys_of(section)


if __name__ == "__main__":
    typer.run(main)
