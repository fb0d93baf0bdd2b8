"""The passes that a recipe takes are those that are run."""

import runpy
from pathlib import Path

import pytest
from toy_models import toy_model, toy_windows

from prunevolve import prune
from prunevolve.pruning.run.options import read_recipe

WRITTEN = runpy.run_path(str(Path(__file__).parents[2] / "scripts/write_generated.py"))


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        ("--metric wanda", ["prune"]),
        ("--metric pruner-zero", ["forward", "backward", "measure"]),
        ("--metric snip", ["forward", "backward", "threshold", "prune"]),
        ("--metric gblm --propagation sequential", ["forward", "backward", "prune"]),
        ("--metric wanda --allocation owl", ["forward", "threshold", "prune"]),
        ("--recipe fast", ["forward", "backward", "threshold", "prune"]),
    ],
)
def test_listed_passes_are_run_block_by_block(request_, names):
    assert [one.name for one in WRITTEN["passes"](request_)] == names
    given = dict(zip(request_.replace("--", "").split()[::2], request_.split()[1::2], strict=True))
    options = read_recipe(given["recipe"], None) if "recipe" in given else given
    seen = []
    prune(
        toy_model("llama"),
        options.pop("metric"),
        toy_windows(),
        on_progress=lambda *progress: seen.append(progress),
        **options,
    )
    walks = [name for name in names if name != "threshold"]
    assert seen == [(name, blocks, 2) for name in walks for blocks in (0, 1, 2)]
