"""What the documents name exists: paths, make targets, options of the two scripts."""

import re
from pathlib import Path

import pytest

from pruning.baselines import NAMED
from pruning.leaves import LEAVES
from pruning.operators import OPERATORS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/ARCHITECTURE.md",
    "docs/METRICS.md",
    "docs/CLUSTER.md",
    "docs/EXTENDING.md",
    "docs/PYTHON.md",
]
MADE_LATER = ("runs/", "models/", "failures/")
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.*-]*|[\w-]+\.(?:py|md|toml))`")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths_exist(document):
    named = [path for path in PATH.findall(text_of(document)) if not path.startswith(MADE_LATER)]
    missing = [path for path in named if not any(ROOT.glob(path.rstrip("/")))]
    assert named
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make (\w+)", text_of(document), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("script", ["run_search.py", "run_prune.py"])
def test_named_options_exist(script):
    source = (ROOT / script).read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for line in re.findall(rf"{script} (--.*)", text_of(document)):
            for option in re.findall(r"--([a-z-]+)", line):
                name = option.replace("-", "_")
                assert f"    {name}:" in source or f'"--{option}"' in source, (document, option)


def test_every_module_has_its_line_in_the_readme():
    readme = text_of("README.md")
    for package in ("pruning", "evaluation", "search", "scripts"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            assert path.name == "__init__.py" or f"| `{name}` |" in readme, name


def test_every_leaf_operator_and_named_metric_has_its_row():
    rows = [line for line in text_of("docs/METRICS.md").splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])]
    assert {*LEAVES, *OPERATORS, *NAMED} <= set(named)
    for name, baseline in NAMED.items():
        criterion = baseline.criterion
        start = f"| `{name}` | `{criterion.text}` | {criterion.group} |"
        assert any(row.startswith(start) for row in rows), name
