"""Generate the tables of docs/METRICS.md and configs/schema.json from code."""

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from prunevolve.configs.schema import json_schema
from prunevolve.pruning.baselines import BASELINES, FOUND, PUBLISHED, Baseline
from prunevolve.pruning.masks import GROUPS, group_of
from prunevolve.pruning.operators import (
    EXTENDED,
    MATRIX,
    NO_UNITS,
    RELEASE,
    TWINS,
    Operator,
    Shape,
    Units,
)
from prunevolve.pruning.statistics import LEAF_SETS, LEAVES, STATISTICS, Leaf, need_backward

ROOT = Path(__file__).parents[1]
METRICS, SCHEMA = ROOT / "docs/METRICS.md", ROOT / "configs/schema.json"
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
        METRICS: with_tables(read(METRICS), tables()),
        SCHEMA: json.dumps(json_schema(), indent=2) + "\n",
    }


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
    extended = {name: row for name, row in EXTENDED.items() if name not in RELEASE}
    operators = ("operator", "operands", "result of matrices", "units of the result", "meaning")
    leaves = ("leaf", "shape", "units", "meaning", "needs", "set")
    named = ("name", "formula", "group", "units", "source")
    others = {name: row for name, row in PUBLISHED.items() if name not in BASELINES}
    return {
        "leaves": _table(leaves, (_leaf_row(*row) for row in LEAVES.items())),
        "release": _table(operators, (_operator_row(*row) for row in RELEASE.items())),
        "extended": _table(operators, (_operator_row(*row) for row in extended.items())),
        "twins": _table(operators, (_operator_row(*row) for row in TWINS.items())),
        "groups": _table(("group", "the weights that compete"), map(_group_row, GROUPS)),
        "baselines": _table(named, (_named_row(*row) for row in BASELINES.items())),
        "published": _table(named, (_named_row(*row) for row in others.items())),
        "found": _table(named, (_named_row(*row) for row in FOUND.items())),
    }


def _leaf_row(name: str, leaf: Leaf) -> tuple[str, ...]:
    needs = "nothing"
    if name in STATISTICS:
        needs = f"a {'backward' if need_backward(frozenset([name])) else 'forward'} pass per window"
    if leaf.gram:
        needs += ", and `(in, in)` of memory per layer"
    smallest = next(set_name for set_name, leaves in LEAF_SETS.items() if name in leaves)
    return f"`{name}`", _shape(leaf.shape), str(leaf.units), leaf.meaning, needs, smallest


def _operator_row(name: str, operator: Operator) -> tuple[str, ...]:
    result = operator.typing.shape(*[MATRIX] * operator.arity)
    return f"`{name}`", str(operator.arity), _shape(result), _unit_rule(operator), operator.meaning


def _unit_rule(operator: Operator) -> str:
    """Return the units of an operator's result in those of its operands, [x] and [y]."""
    # Two operands of units that share nothing, so that the result tells them apart.
    units = operator.units(*(Units(w=1), Units(x=1))[: operator.arity], over=MATRIX)
    if units is None:
        return (
            "those of both, which must be equal"
            if operator.arity == 2
            else "none, and x must have none"
        )
    if units == NO_UNITS:
        return "none"
    return re.sub("[wx]", lambda unit: {"w": "[x]", "x": "[y]"}[unit[0]], str(units))


def _group_row(name: str) -> tuple[str, ...]:
    return f"`{name}`", " ".join((inspect.getdoc(group_of(name)) or "").split())


def _named_row(name: str, named: Baseline) -> tuple[str, ...]:
    try:
        units = str(named.criterion.metric.units)
    except ValueError:
        units = "a sum of different ones"
    return f"`{name}`", f"`{named.text}`", named.group, units, named.source


def _shape(shape: Shape) -> str:
    return f"`({'out' if shape.by_row else 1}, {'in' if shape.by_column else 1})`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells).replace("| --- ", "|---")


if __name__ == "__main__":
    main()
