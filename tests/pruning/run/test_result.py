import hashlib
import json
import math
import os
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from refusals import refusal
from safetensors.torch import load_file
from toy_models import change_json, change_weights, toy_model

from prunevolve.command_line import FolderError
from prunevolve.pruning.checkpoint import Checkpoint
from prunevolve.pruning.masks import Layer, Model, NOfM, Row, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import linear_layers
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.run.card import model_card
from prunevolve.pruning.run.options import check_output_folder
from prunevolve.pruning.run.result import save_model, save_report
from prunevolve.pruning.run.verify import Inspector, LayerCount, verify_result
from prunevolve.pruning.store import FolderStore

PLACE = {"corpus": "/home/me/own.txt + c4", "split": "all", "windows": 2, "length": 8, "tokens": 16}
MEASURED = {
    "dense_perplexity": 10.0,
    "pruned_perplexity": 12.5,
    "perplexity_of": PLACE | {"seed": None, "dtype": "float32"},
    "by_text": [],
    "warnings": [],
}
HALF_OF_ROWS = Target(0.5, Row())
SHARD = "model-00002-of-00003.safetensors"
"""Of the first block: the one before it holds all that is in no block."""
REPORT = "pruning_report.json"
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "toy"
    toy_model("llama").save_pretrained(folder)
    return folder


def procedure_of(model, target):
    recipe = {"model": model, "metric": "W", "sparsity": target.sparsity, "calibration": None}
    recipe |= {"update": "none", "propagation": "one-shot"}
    return recipe | {"group": target.group_name, "pattern": target.pattern_text}


@pytest.fixture(scope="module")
def saved(dense):
    def save(folder, target=HALF_OF_ROWS, name=None, **measured):
        config = toy_model("llama").config
        store = FolderStore(Checkpoint(dense), config, "float32", "cpu", folder)
        prune(store, Procedure(Metric("W"), target), {})
        inspector = Inspector(config, [*linear_layers(store.model)], target)
        save_model(store, inspector)
        procedure = procedure_of(name or str(dense), target)
        save_report(folder, procedure, MEASURED | measured, inspector)
        return json.loads((folder / "pruning_report.json").read_text())

    return save


@pytest.fixture(scope="module")
def finished(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    saved(folder)
    return folder


def test_save_result_reports_every_layer_and_records_each_blocks_shard(finished, dense):
    report = verify_result(finished)
    assert report == json.loads((finished / REPORT).read_text())
    layers = report.pop("layers")
    assert report == {"metric": "W", "pattern": "unstructured", "sparsity": 0.5} | MEASURED
    assert len(layers) == 14
    assert layers[0] == {"name": FIRST, "zeros": 128, "size": 256, "pattern_ok": True}
    shards = sorted(finished.glob("*.safetensors"))
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [path.name for path in shards] == names
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}
    assert json.loads((finished / "pruning_recipe.json").read_text())["sha256"] == sums
    index = json.loads((finished / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    weights = load_file(dense / "model.safetensors")
    assert set(index["weight_map"]) == set(weights)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())


def test_save_result_card_shows_the_base_and_no_license_nor_path(tmp_path, saved, tiny_llama_dir):
    saved(tmp_path, Target(0.5, NOfM(2, 4)), name=str(tiny_llama_dir), pruned_perplexity=None)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert str(tiny_llama_dir) not in card and "/home/me" not in card
    assert "# tiny-llama, pruned: 2:4" in card
    assert "pruned perplexity not finite (own.txt + c4, split all" in card


def test_card_has_what_the_hub_reads():
    on_hub, here = procedure_of("owner/tiny", HALF_OF_ROWS), procedure_of("embedded", HALF_OF_ROWS)
    header = {"library_name": "transformers", "tags": ["prunevolve", "pruning", "sparse"]}
    assert ModelCard(model_card(on_hub, MEASURED)).data.to_dict() == {
        "base_model": "owner/tiny",
        **header,
    }
    assert ModelCard(model_card(here, MEASURED)).data.to_dict() == header  # the hub has none


def test_save_result_warns_of_a_layer_above_nine_tenths_zeros(tmp_path, saved):
    report = saved(tmp_path, Target(0.95, Layer()))
    # int(0.95 * 256) = 243 of 256; int(0.95 * 384) = 364 of 384 are fewer.
    assert report["warnings"] == [f"layer {FIRST} is 94.9% zeros, and 13 of 14 are above 90%"]


@pytest.mark.parametrize(
    ("target", "rows", "holds"),
    [
        (Target(0.5, Row()), [[0, 0, 1, 1], [1, 0, 1, 0]], True),
        (Target(0.5, Row()), [[0, 0, 0, 1], [1, 1, 1, 0]], False),
        (Target(0.5, Layer()), [[0, 0, 0, 1], [1, 1, 1, 0]], True),
        (Target(0.5, Layer()), [[0, 0, 1, 1], [1, 1, 1, 0]], False),
        (Target(0.5, Model()), [[1, 1, 1, 1], [1, 1, 1, 1]], True),
        (Target(0.5, NOfM(1, 2)), [[0, 1, 1, 0], [0, 0, 1, 0]], True),
        (Target(0.5, NOfM(1, 2)), [[0, 0, 1, 1], [0, 1, 1, 0]], False),
    ],
)
def test_each_comparison_group_is_judged(target, rows, holds):
    assert LayerCount.of("a", torch.tensor(rows).float(), target).pattern_ok is holds


def first_weight(was_zero, value):
    def change(weights):
        weight = weights[f"{FIRST}.weight"]
        weight[tuple(((weight == 0) == was_zero).nonzero()[0])] = value

    return lambda folder: change_weights(folder, change, SHARD)


def altered(name, **settings):
    return lambda folder: change_json(folder / f"pruning_{name}.json", **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_weight(True, 3.0), f"layer {FIRST} has 127 zeros of 256, the report says 128 of "),
        (first_weight(False, 3.0), f"sha256 of {SHARD} "),
        (first_weight(False, math.nan), f"tensor {FIRST}.weight has a value that is not finite"),
        (altered("recipe", sparsity=0.6), f"layer {FIRST} has 128 zeros of 256"),
        (altered("report", layers=[{"name": "a"}]), "was altered (TypeError"),
        (altered("recipe", sha256={"../x": "0"}), "sha256 of ../x '0', and it is None"),
        (lambda folder: os.truncate(folder / SHARD, 3000), "is not as it was saved: weights file"),
        (lambda folder: (folder / SHARD).unlink(), f"lacks its weights file {SHARD}"),
        (lambda folder: (folder / REPORT).unlink(), f"has no {REPORT}: no finished pruned model"),
    ],
)
def test_verify_result_names_what_changed_or_is_missing(tmp_path, finished, change, message):
    folder = shutil.copytree(finished, tmp_path / "changed")
    change(folder)
    assert message in refusal(verify_result, folder, error=FolderError)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (".", 1, "is not empty: name a new folder"),
        ("begun", 1, "begun' is unfinished: go on with --resume "),
        ("file/below", 1, "file is a file; name a new folder"),
        ("link", 1, "link' is a broken link: name a new folder"),
        ("new", 10**18, r"needs 888\.2 PiB, and its disk has "),
    ],
)
def test_check_output_folder_names_what_does_not_fit(tmp_path, name, size, message):
    (tmp_path / "file").touch()
    (tmp_path / "begun" / ".unfinished").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderError, match=message):
        check_output_folder(tmp_path / name, size)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "begun", "link"}
