"""What the documents name exists, and what is generated is what the code makes."""

import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import search_process
from doc_examples import PLACED, blocks_of, put_in

from prunevolve.configs.schema import Config
from prunevolve.pruning.run.options import Request

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "docs/ARCHITECTURE.md", "docs/METRICS.md"),
    *("docs/CLUSTER.md", "docs/APPLY.md", "docs/EXTENDING.md", "docs/PYTHON.md"),
    "docs/TABLES.md",
]
GENERATED = runpy.run_path(str(ROOT / "scripts/write_generated.py"))["generated"]
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.*-]*|[\w-]+\.(?:py|md|toml))`")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", GENERATED(), ids=lambda path: path.name)
def test_generated_file_is_what_the_code_makes(path):
    made = GENERATED()[path]
    assert path.read_text(encoding="utf-8") == made, "run scripts/write_generated.py"


def test_named_paths_exist():
    named = {path for document in DOCUMENTS for path in PATH.findall(text_of(document))}
    made_later = ("runs/", "models/", "failures/")
    there = {path for path in named if any(ROOT.glob(path.rstrip("/")))}
    assert len(there) > 20
    assert {path for path in named - there if not path.startswith(made_later)} == set()


def test_what_comments_cite_in_the_log_is_there():
    log, cited = text_of("docs/LOG.md"), []
    for folder in ("configs", "evaluation", "pruning", "search", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            words = re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text(encoding="utf-8"))
            cited += re.findall(r"docs/LOG\.md(?:: ([^)]+))?\)", words)
    assert len(cited) >= 4
    for title in cited:
        assert re.search(rf"^## [\d-]+: {re.escape(title)}$", log, flags=re.MULTILINE), title


def test_named_make_targets_exist():
    makefile = text_of("Makefile")
    for document in DOCUMENTS:
        for target in re.findall(r"(?:`|^)make (\w+)", text_of(document), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (document, target)


def test_named_config_keys_exist():
    for document in [*DOCUMENTS, "cluster/slurm.sh"]:
        for section, key in re.findall(r"\b(ray|search|fitness)\.([a-z_]+)=", text_of(document)):
            assert key in Config.model_fields[section].annotation.model_fields, (document, key)


@pytest.mark.parametrize("script", ["run_search.py", "run_prune.py"])
def test_named_options_exist(script):
    file = "search/command.py" if script == "run_search.py" else script
    source = (ROOT / file).read_text(encoding="utf-8")
    if script == "run_prune.py":
        source += "".join(f"    {name}:" for name in Request.model_fields)
    for document in DOCUMENTS:
        for line in re.findall(rf"{script} (--.*)", text_of(document)):
            for option in re.findall(r"--([a-z-]+)", line):
                name = option.replace("-", "_")
                assert f"    {name}:" in source or f'"--{option}"' in source, (document, option)


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/LOG.md"])
def test_links_lead_to_files_and_headings(document):
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\((?!https://)([^)\s]+)\)", text_of(document)):
        file, _, anchor = target.partition("#")
        page = folder / file if file else ROOT / document
        assert page.exists(), target
        if anchor:
            headings = re.findall("^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            # GitHub's: lower case, no punctuation, hyphens for spaces.
            anchors = [re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings]
            assert anchor in anchors, target


@pytest.mark.slow
def test_recipes_of_extending_add_what_works(tmp_path):
    root, page = tmp_path / "extended", ROOT / "docs/EXTENDING.md"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("configs", "docs", "evaluation", "prunevolve", "pruning", "search"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / "tests/helpers", root / "tests/helpers", ignore=ignored)
    for module in ROOT.glob("*.py"):
        shutil.copy(module, root)
    for block in blocks_of(page):
        if PLACED.match(block):  # it says where
            put_in(root, block)
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests/helpers'}"}
    command = [sys.executable, "tests/helpers/doc_examples.py", str(page)]
    done = search_process.run(command, cwd=root, env=environment)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr
