"""Generate the tables of docs/METRICS.md and docs/ARCHITECTURE.md, and configs/schema.json."""

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from prunevolve.configs.files import BASE
from prunevolve.configs.schema import Config
from prunevolve.pruning.baselines import NAMED, Baseline
from prunevolve.pruning.masks import GROUPS, group_of
from prunevolve.pruning.operators import OPERATORS
from prunevolve.pruning.parse import resolve_metric
from prunevolve.pruning.passes import Pass, passes_of
from prunevolve.pruning.run.job import recipe_of
from prunevolve.pruning.run.options import Request, read_recipe
from prunevolve.pruning.statistics import TERMINALS, Terminal

ROOT = Path(__file__).parents[1]
ARCHITECTURE, METRICS = ROOT / "docs/ARCHITECTURE.md", ROOT / "docs/METRICS.md"
SCHEMA = ROOT / "configs/schema.json"
_MARKED = re.compile(r"(<!-- made by scripts/\w+\.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write the files that are out of date."""
    for path, text in generated().items():
        if read(path) != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} written")


def generated() -> dict[Path, str]:
    """Return the whole text of each file, as generated from code."""
    return {
        ARCHITECTURE: with_tables(read(ARCHITECTURE), {"passes": _passes()}),
        METRICS: with_tables(read(METRICS), tables()),
        SCHEMA: json.dumps(_config_schema(), indent=2) + "\n",
    }


def _config_schema() -> dict[str, object]:
    """Return the JSON schema of a config file, with which editors complete and check keys.

    It requires no key, since a `base` or the experiment may have it.
    """
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    base = {"type": "string", "description": "a config from which missing keys are taken"}
    schema["properties"] = {BASE: base, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def read(path: Path) -> str:
    """Return a file's text, which is empty if there is no file."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """Return a text with each table inserted between its two markers.

    Raises:
        KeyError: If a marker names no table.
    """
    return _MARKED.sub(lambda match: match[1] + tables[match[2]] + match[3], text)


def tables() -> dict[str, str]:
    """Return the tables by the names in their markers."""
    return {
        "terminals": _table(
            ("terminal", "shape", "units", "meaning"),
            (_terminal_row(*row) for row in TERMINALS.items()),
        ),
        "operators": _table(
            ("operator", "meaning"), ((f"`{name}`", row.meaning) for name, row in OPERATORS.items())
        ),
        "groups": _table(("group", "the weights that compete"), map(_group_row, GROUPS)),
        "named": _table(
            ("name", "group and formula", "source"), (_named_row(*row) for row in NAMED.items())
        ),
    }


REQUESTS = (
    "--metric wanda",
    "--metric pruner-zero",
    "--metric snip",
    "--recipe fast",
    "--recipe best",
)
"""Typical requests, whose passes are shown."""


def _passes() -> str:
    """Return a table of the passes that typical requests take."""
    rows = [(f"`{request}`", "<br>".join(map(str, passes(request)))) for request in REQUESTS]
    return _table(("request", "passes"), rows)


def passes(words: str) -> tuple[Pass, ...]:
    """Return the passes of a request, given as options of the command line."""
    given = dict(re.findall(r"--(\S+) (\S+)", words))
    recipe = given.pop("recipe", None)
    request = Request(**(read_recipe(recipe, None) if recipe else given))
    criterion, _ = resolve_metric(str(request.metric))
    made = recipe_of(request, criterion)
    return passes_of(made, made.dense_terminals)


def _terminal_row(name: str, terminal: Terminal) -> tuple[str, ...]:
    sides = (
        f"`({'out' if terminal.shape.by_row else 1}, {'in' if terminal.shape.by_column else 1})`"
    )
    return f"`{name}`", sides, str(terminal.units), terminal.meaning


def _group_row(name: str) -> tuple[str, ...]:
    return f"`{name}`", " ".join((inspect.getdoc(group_of(name)) or "").split())


def _named_row(name: str, named: Baseline) -> tuple[str, ...]:
    return f"`{name}`", f"{named.group}: `{named.text}`", named.source


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells).replace("| --- ", "|---")


if __name__ == "__main__":
    main()
