"""A model from the hub is found, pruned, recorded and repeated, and searched on, at one commit."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import constants
from search_process import started
from toy_models import toy_model
from toy_setup import small

from prunevolve import run_prune
from prunevolve.search import command as run_search

FIRST, SECOND = "1" * 40, "2" * 40
SMALL = ["model=owner/tiny", "ray.workers=0", "search.population=4", "search.stages=[1]"]
SMALL += ["selection.model=owner/tiny", *small(3, length=16)]


@pytest.fixture
def point_main_at(tiny_llama_dir, tmp_path, monkeypatch):
    """Say at which of two commits, of unlike weights, owner/tiny is on a hub that is a cache."""
    repository = tmp_path / "hub/models--owner--tiny"
    for seed, commit in enumerate((FIRST, SECOND)):
        snapshot = shutil.copytree(tiny_llama_dir, repository / "snapshots" / commit)
        settings = {"vocab_size": 256, "tie_word_embeddings": True}
        toy_model("llama", seed=seed, **settings).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    # Read from the environment when it was imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return (repository / "refs/main").write_text


def test_recipe_repeats_the_commit_it_was_made_from(point_main_at, tmp_path):
    point_main_at(FIRST)
    small = ["--metric", "magnitude", "--seqlen", 16, "--eval-windows", 2]
    started(run_prune, "--model", "owner/tiny", *small, "--out", tmp_path / "made")
    recipe = tmp_path / "made/pruning_recipe.json"
    assert json.loads(recipe.read_text())["revision"] == FIRST

    point_main_at(SECOND)
    started(run_prune, "--recipe", recipe, "--out", tmp_path / "again")
    assert (tmp_path / "again/pruning_recipe.json").read_text() == recipe.read_text()
    started(run_prune, "--recipe", recipe, "--revision", "main", "--out", tmp_path / "other")
    assert json.loads((tmp_path / "other/pruning_recipe.json").read_text())["revision"] == SECOND


@pytest.mark.slow
def test_resume_is_on_the_commit_that_it_began_with(point_main_at, tmp_path):
    out = tmp_path / "run"
    point_main_at(FIRST)
    settings = [f"--set={setting}" for setting in [*SMALL, "search.candidates=4"]]
    started(run_search, "--out", out, *settings)
    # The command that applies the metric names it.
    assert f"<span>--model</span> owner/tiny@{FIRST}" in (out / "report.html").read_text()
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"] == f"owner/tiny@{FIRST}"
    assert config["selection"]["model"] == [f"owner/tiny@{FIRST}"]

    point_main_at(SECOND)
    started(run_search, "--resume", out, "--set", "search.candidates=6")
    assert len((out / "journal.jsonl").read_text(encoding="utf-8").splitlines()) == 6
