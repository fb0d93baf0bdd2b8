import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from pruning.request import Subject, make_recipe
from safetensors.torch import load_file, save_file
from toy_models import FAMILIES, toy_model

from pruning.masks import Layer, Model, NOfM, Row, Target
from pruning.metric import Metric
from pruning.metric_file import ResolvedMetric, resolve_metric
from pruning.models import linear_layers, load_tokenizer
from pruning.pruner import prune
from pruning.result import (
    FolderMismatchError,
    Perplexities,
    check_output_folder,
    count_layers,
    save_result,
    verify_result,
)

PLACE = {"corpus": "/home/me/own.txt", "split": "all", "windows": 2, "length": 8, "tokens": 16}
PERPLEXITIES = Perplexities(10.0, 12.5, PLACE | {"seed": None, "dtype": "float32"})
HALF_OF_ROWS = Target(0.5, Row())
NO_WINDOWS = torch.empty(0, 8, dtype=torch.int64)
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return load_tokenizer(str(tiny_llama_dir))


def saved(folder, tokenizer, target=HALF_OF_ROWS, numbers=PERPLEXITIES, name="own/toy", **options):
    """Prune a toy model by magnitude, save it, and return its report."""
    model = toy_model("llama")
    metric = ResolvedMetric(Metric("W"), target.group_name or "row", "formula")
    prune(model, metric.metric, target, NO_WINDOWS)
    subject = Subject(name, model.config, tokenizer, "float32", "cpu", 8)
    recipe = make_recipe(subject, metric, target, "one-shot", None)
    return save_result(model, tokenizer, folder, recipe, target, numbers, **options)


def altered(folder: Path, name: str, **changes) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def refusal(folder) -> str:
    with pytest.raises(FolderMismatchError) as caught:
        verify_result(folder)
    return str(caught.value)


def test_save_result_reports_every_layer_and_the_asked_names(tmp_path, tokenizer):
    report = saved(tmp_path, tokenizer, warnings=["a warning"])
    layers = report.pop("layers")
    assert report == {
        "metric": "W",
        "pattern": "unstructured",
        "sparsity": 0.5,
        "dense_perplexity": 10.0,
        "pruned_perplexity": 12.5,
        "perplexity_of": {**PLACE, "seed": None, "dtype": "float32"},
        "warnings": ["a warning"],
    }
    assert len(layers) == 14
    assert layers[0] == {"name": FIRST, "zeros": 128, "size": 256, "pattern_ok": True}
    assert json.loads((tmp_path / "pruning_report.json").read_text())["layers"] == layers


def test_save_result_splits_weights_into_shards_with_their_checksums(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, shard_size="4KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}
    assert len(sums) > 2
    assert json.loads((tmp_path / "pruning_recipe.json").read_text())["sha256"] == sums
    verify_result(tmp_path)


def test_save_result_recipe_is_a_metric_file(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, Target(0.5, Layer()))
    resolved = resolve_metric(str(tmp_path / "pruning_recipe.json"))
    assert (resolved.metric.text, resolved.group) == ("W", "layer")


def test_save_result_card_names_the_base_and_no_license_nor_path(
    tmp_path, tokenizer, tiny_llama_dir
):
    saved(tmp_path, tokenizer, Target(0.5, NOfM(2, 4)), name=str(tiny_llama_dir))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "tiny-llama"
    assert card.data.license is None
    assert card.data.tags == ["prunevolve", "pruning", "sparse", "2:4"]
    assert "| model | perplexity (own.txt, split all, 2 windows of 8 = 16 tokens, float32) |" in (
        card.text
    )
    assert "| dense | 10 |\n| pruned | 12.5 |" in card.text
    assert "Zeros take the same space on disk" in card.text


def test_save_result_writes_null_for_a_perplexity_that_is_not_finite(tmp_path, tokenizer):
    report = saved(
        tmp_path, tokenizer, numbers=Perplexities(10.0, math.inf, PERPLEXITIES.provenance)
    )
    assert report["pruned_perplexity"] is None
    assert "| pruned | not finite |" in (tmp_path / "README.md").read_text()


def test_save_result_warns_of_a_layer_above_nine_tenths_zeros(tmp_path, tokenizer):
    report = saved(tmp_path, tokenizer, Target(0.95, Layer()))
    assert report["warnings"][0] == f"layer {FIRST} is 94.9% zeros"  # int(0.95 * 256) = 243


def test_save_result_refuses_a_dense_model(tmp_path, tokenizer):
    model = toy_model("llama")
    recipe = {"model": "m", "metric": "W", "group": "row", "calibration": None}
    with pytest.raises(FolderMismatchError, match=f"layer {FIRST} is not 0.5 per row"):
        save_result(model, tokenizer, tmp_path, recipe, HALF_OF_ROWS, PERPLEXITIES)
    assert not (tmp_path / "pruning_report.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_count_layers_finds_every_family_under_its_saved_names(tmp_path, family):
    model = toy_model(family)
    layers = linear_layers(model)
    for i, layer in enumerate(layers.values()):
        layer.weight.data.fill_(1.0).view(-1)[: i + 1] = 0.0
    model.save_pretrained(tmp_path)
    counts = count_layers(tmp_path, list(layers), Target(0.0, Row()))
    assert [count.zeros for count in counts] == list(range(1, len(layers) + 1))


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
        (Target(1 / 3, NOfM(2, 3)), [[0, 0, 0, 0], [0, 0, 0, 0]], False),
    ],
)
def test_count_layers_judges_each_comparison_group(tmp_path, target, rows, holds):
    save_file({"a.weight": torch.tensor(rows).float()}, tmp_path / "model.safetensors")
    assert count_layers(tmp_path, ["a"], target)[0].pattern_ok is holds


@pytest.mark.parametrize(
    "target", [HALF_OF_ROWS, Target(0.5, Layer()), Target(0.5, Model()), Target(0.5, NOfM(4, 8))]
)
def test_verify_result_accepts_what_was_saved(tmp_path, tokenizer, target):
    report = saved(tmp_path, tokenizer, target)
    assert verify_result(tmp_path) == report


def test_verify_result_names_the_layer_that_lost_zeros(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weight = weights[f"{FIRST}.weight"]
    weight[weight == 0] = torch.tensor([1.0] + [0.0] * 127)
    save_file(weights, path, metadata={"format": "pt"})
    assert f"layer {FIRST} has 127 zeros of 256, the report says 128 of 256" in refusal(tmp_path)


def test_verify_result_names_the_file_whose_kept_weights_changed(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({name: weight * 2 for name, weight in weights.items()}, path)
    assert "file model.safetensors has sha256 " in refusal(tmp_path)


def test_verify_result_refuses_a_shard_cut_short_or_missing(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in refusal(tmp_path)
    path.unlink()
    assert f"has no weight of layer {FIRST}" in refusal(tmp_path)


def test_verify_result_refuses_a_folder_without_a_report(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    (tmp_path / "pruning_report.json").unlink()
    assert "has no pruning_report.json: no finished pruned model" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pruning_report.json", {"sparsity": 0.6}, "sparsity is 0.5 in the recipe, 0.6 in the rep"),
        ("pruning_report.json", {"layers": []}, "has no pruned layer"),
        ("pruning_report.json", {"layers": [{"name": "a"}]}, "was altered (TypeError"),
        ("pruning_report.json", {"layers": 3}, "was altered (TypeError"),
        ("pruning_recipe.json", {"group": "column"}, "was altered (ValueError: group must be"),
        ("pruning_recipe.json", {"sha256": {}}, "the recipe says none"),
        ("pruning_recipe.json", {"sha256": None}, "was altered (TypeError"),
        ("pruning_recipe.json", {"sha256": {"../x": "0"}}, "file ../x has sha256 none"),
    ],
)
def test_verify_result_names_what_was_altered_in_the_papers(
    tmp_path, tokenizer, name, changes, message
):
    saved(tmp_path, tokenizer)
    altered(tmp_path, name, **changes)
    assert message in refusal(tmp_path)


def test_check_output_folder_takes_a_new_or_an_empty_one(tmp_path):
    check_output_folder(tmp_path, 1)
    check_output_folder(tmp_path / "a" / "b", 1)
    assert list(tmp_path.iterdir()) == []


def test_check_output_folder_names_what_does_not_fit(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FolderMismatchError, match="is not empty: name a new folder"):
        check_output_folder(tmp_path, 1)
    with pytest.raises(FolderMismatchError, match="file is a file; name a new folder"):
        check_output_folder(file, 1)
    with pytest.raises(FolderMismatchError, match="file is a file; name a new folder"):
        check_output_folder(file / "below", 1)
    with pytest.raises(FolderMismatchError, match=r"needs 1000000000\.0 GB, and its disk has "):
        check_output_folder(tmp_path / "new", 10**18)
