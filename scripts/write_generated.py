"""Generate parts of docs/METRICS.md and docs/ARCHITECTURE.md, and configs/schema.json."""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prunevolve.configs.files import BASE
from prunevolve.configs.schema import Config
from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.masks import GROUPS, group_of
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import OPERATORS
from prunevolve.pruning.parse import resolve_metric
from prunevolve.pruning.passes import Pass, passes_of
from prunevolve.pruning.run.job import procedure_of
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
        ARCHITECTURE: with_parts(read(ARCHITECTURE), {"passes": _passes()}),
        METRICS: with_parts(read(METRICS), lists()),
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


def with_parts(text: str, parts: Mapping[str, str]) -> str:
    """Return a text with each part inserted between its two markers.

    Raises:
        KeyError: If a marker names no part.
    """
    return _MARKED.sub(lambda match: match[1] + parts[match[2]] + match[3], text)


def lists() -> dict[str, str]:
    """Return the lists by the names in their markers."""
    return {
        "terminals": _list(map(_terminal, TERMINALS.items())),
        "operators": _list(_operators()),
        "groups": _list(f"`{name}`: {_doc(group_of(name))}" for name in GROUPS),
        "named": _list(
            f"`{name}` ({row.group}): `{Metric.parse(row.text).infix}`. {row.source}"
            for name, row in NAMED.items()
        ),
    }


REQUESTS = ("--metric wanda", "--metric pruner-zero", "--recipe fast", "--recipe best")
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
    made = procedure_of(request, criterion)
    return passes_of(made, made.dense_terminals)


def _list(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)


def _terminal(item: tuple[str, Terminal]) -> str:
    name, terminal = item
    rows, columns = terminal.shape.by_row, terminal.shape.by_column
    shape = f"({'out' if rows else 1}, {'in' if columns else 1})"
    return f"`{name}`, `{shape}`, {terminal.units}: {terminal.meaning}"


def _operators() -> Iterator[str]:
    """Yield names and meanings; what reduces a column is named beside what reduces a row."""
    for name, operator in OPERATORS.items():
        if name.startswith("row"):
            yield f"`{name}`, `col{name[3:]}`: {operator.meaning}, the outputs"
        elif not name.startswith("col"):
            yield f"`{name}`: {operator.meaning}"


def _doc(group: object) -> str:
    return " ".join((inspect.getdoc(group) or "").split())


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells).replace("| --- ", "|---")


if __name__ == "__main__":
    main()
