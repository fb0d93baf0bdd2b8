"""Runs the examples of a page: `python doc_examples.py PAGE`."""

import ast
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACED = re.compile(r"# (\S+), (above|last in|among) (.*)\n")


def blocks_of(page):
    return BLOCK.findall(Path(page).read_text(encoding="utf-8"))


def run_examples(blocks):
    """Compare values with the comments behind their expressions; return how many they are."""
    namespace = {}
    compared = 0
    for block in blocks:
        if PLACED.match(block):
            continue
        lines = block.splitlines()
        for statement in ast.parse(block).body:
            _, _, expected = lines[statement.end_lineno - 1].partition("  # ")
            source = ast.get_source_segment(block, statement)
            if isinstance(statement, ast.Expr) and expected:
                value = repr(eval(source, namespace))
                assert value == expected, f"{source} is {value}, and the page says {expected}"
                compared += 1
            else:
                exec(source, namespace)
    return compared


def put_in(root, block):
    """Put a block into the file that its first line names, at the place that it names."""
    path, where, name = PLACED.match(block).groups()
    added = block.partition("\n")[2].splitlines()
    lines = (root / path).read_text(encoding="utf-8").splitlines()
    if where == "among":
        at = next(i for i, line in enumerate(lines) if line.startswith(("from ", "import ")))
    else:
        at = next(i for i, line in enumerate(lines) if re.match(rf"{name}\b", line))
    if where == "last in" and lines[at][-1] in "]}":
        lines[at : at + 1] = [f"{lines[at][:-1]},", lines[at][-1]]
    if where == "last in":
        at = next(i for i in range(at, len(lines)) if lines[i] in ("}", ")", "]"))
    elif where == "above":
        added += ["", ""]
    lines[at:at] = added
    (root / path).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(run_examples(blocks_of(sys.argv[1])))
