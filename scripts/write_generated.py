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
from prunevolve.pruning.passes import Pass, passes_of, procedure_of
from prunevolve.pruning.run.options import Request, read_recipe
from prunevolve.pruning.statistics import TERMINALS

ROOT = Path(__file__).parents[1]
ARCHITECTURE, METRICS = ROOT / "docs/ARCHITECTURE.md", ROOT / "docs/METRICS.md"
SCHEMA = ROOT / "configs/schema.json"
_MARKED = re.compile(r"(<!-- made by scripts/\w+\.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write the files that are out of date."""
    for path, text in generated().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} written")


def generated() -> dict[Path, str]:
    """Return the whole text of each file, as generated from code."""
    return {
        ARCHITECTURE: with_parts(ARCHITECTURE, {"passes": _passes()}),
        METRICS: with_parts(METRICS, lists()),
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


def with_parts(path: Path, parts: Mapping[str, str]) -> str:
    """Return a file's text with each part inserted between its two markers."""
    text = path.read_text(encoding="utf-8")
    return _MARKED.sub(lambda match: match[1] + parts[match[2]] + match[3], text)


def lists() -> dict[str, str]:
    """Return the lists by the names in their markers."""
    groups = {name: " ".join((inspect.getdoc(group_of(name)) or "").split()) for name in GROUPS}
    return {
        "terminals": _list(_terminals()),
        "operators": _list(_operators()),
        "groups": _list(f"`{name}`: {doc}" for name, doc in groups.items()),
        "named": _list(
            f"`{name}` ({row.group}): `{Metric.parse(row.text).infix}`. {row.source}"
            for name, row in NAMED.items()
        ),
    }


REQUESTS = ("--metric wanda", "--metric pruner-zero", "--recipe fast")
"""Typical requests, whose passes are shown."""


def _passes() -> str:
    """Return a table of the passes that typical requests take."""
    rows = [f"| `{x}` | {'<br>'.join(map(str, passes(x)))} |\n" for x in REQUESTS]
    return "".join(["| request | passes |\n|---|---|\n", *rows])


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


def _terminals() -> Iterator[str]:
    for name, terminal in TERMINALS.items():
        by_row, by_column = terminal.shape
        shape = f"({'out' if by_row else 1}, {'in' if by_column else 1})"
        yield f"`{name}`, `{shape}`, {terminal.units}: {terminal.meaning}"


def _operators() -> Iterator[str]:
    """Yield names and meanings; what reduces a column is named beside what reduces a row."""
    for name, operator in OPERATORS.items():
        if name.startswith("row"):
            yield f"`{name}`, `col{name[3:]}`: {operator.meaning}, the outputs"
        elif not name.startswith("col"):
            yield f"`{name}`: {operator.meaning}"


if __name__ == "__main__":
    main()
