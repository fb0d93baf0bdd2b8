"""What the documents name exists, and what is generated is what the code makes."""

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch
from doc_examples import blocks_of
from toy_models import toy_model, weights_of

from prunevolve import prune
from prunevolve.configs.schema import Config
from prunevolve.pruning.models import FAMILIES
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


def test_readme_says_what_the_two_real_models_are():
    made = text_of("scripts/make_model.py")
    for what in ("SmolLM2-135M-Instruct", "Gemma-3-270M", "Q4_1", "Q4_K_M"):
        assert what in text_of("README.md") and what.lower() in made.lower()


def test_apply_names_the_models_that_are_supported_and_the_transformers():
    (line,) = [x for x in text_of("docs/APPLY.md").splitlines() if x.startswith("**Models**")]
    named, _, by = line.partition(", by ")
    words = re.findall(r"\b[a-z]+\d?(?:_text)?\b", named.partition(" is ")[2])
    assert {*words} - {"or"} == {*FAMILIES}
    assert '"transformers>=5.6,<6"' in text_of("pyproject.toml")
    assert by.startswith("transformers 5.6 or later of version 5.")


def test_zeros_are_set_again_as_apply_says():
    pruned = toy_model("llama")
    prune(pruned, "magnitude", sparsity=0.5)
    merged = copy.deepcopy(pruned)
    with torch.no_grad():
        for weight in merged.parameters():
            weight += 0.01
    (block,) = (x for x in blocks_of(ROOT / "docs/APPLY.md") if "merged" in x)
    exec(block, {"merged": merged, "pruned": pruned})
    layers = weights_of(pruned)
    for name, weight in weights_of(merged).items():
        assert torch.equal(weight == 0, layers[name] == 0)
