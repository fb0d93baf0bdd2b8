"""Whole neurons of the MLPs: which go, what the narrower model computes, and its files."""

import json
import shutil
import signal
from collections import defaultdict
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import pytest
import search_process
import torch
from refusals import refusal
from toy_models import (
    FAMILIES,
    assert_same_tensors,
    change_json,
    tensors_of,
    toy_model,
    toy_windows,
    weights_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunevolve import prune, run_prune
from prunevolve.evaluation.windows import Text
from prunevolve.pruning import store
from prunevolve.pruning.masks import Neurons, Target, resolve_target
from prunevolve.pruning.models import linear_layers, load_model
from prunevolve.pruning.run.job import LEAST_HELD_BACK
from prunevolve.pruning.sparsegpt import compensate

WIDTH, GONE, LEFT = 96, 32, 64
BEHIND = ("down_proj", "fc2")
BEFORE = ("gate_proj", "up_proj", "gate_up_proj", "fc1")


def lowest(scores, outputs):
    """Return the neurons of an MLP that go, each given by all weights or those of its output."""
    total = [0.0] * WIDTH
    for layer, matrix in scores.items():
        for (i, row), j in product(enumerate(matrix.tolist()), range(matrix.shape[1])):
            if layer.endswith(BEHIND):
                total[j] += row[j]
            elif not outputs:
                total[i % WIDTH] += row[j]
    return set(sorted(range(WIDTH), key=lambda neuron: abs(total[neuron]))[:GONE])


def split(name, tensor, gone):
    """Return what goes of a layer's weight or bias and what stays, as indices of the tensor."""
    side = 1 if name.endswith(tuple(f"{x}.weight" for x in BEHIND)) else 0
    places = range(tensor.shape[side])
    parts = ([x for x in places if (x % WIDTH in gone) == goes] for goes in (True, False))
    return [(slice(None), part) if side else part for part in parts]


@pytest.mark.parametrize(("share", "left"), [(0.2, 64), (0.5, 64), (0.6, 32), (0.8, 32)])
def test_width_is_the_nearest_multiple_of_32_if_that_is_narrower(share, left):
    layers = {"mlp.fc1": torch.Size((WIDTH, 3)), "mlp.fc2": torch.Size((3, WIDTH))}
    Neurons().check(layers, share)
    assert Neurons().width(layers, share) == (WIDTH, left)
    for refused in (0.1, 0.9):
        message = refusal(Neurons().check, layers, refused)
        assert message.endswith(f"neurons of the 96 in each MLP, and not all; got {refused}")


def test_model_that_cannot_become_narrower_is_refused_and_stays_as_it_is():
    model = toy_model("llama")
    for block in model.model.layers:
        block.mlp = torch.nn.Identity()
    before = weights_of(model)
    message = refusal(lambda: prune(model, "W", pattern="neurons"))
    named = "pattern neurons must be of MLPs with layers named gate_proj, up_proj, fc1, "
    assert message.startswith(named)
    assert_same_tensors(weights_of(model), before)


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        (("neurons", None, None, "row"), Target(0.2, Neurons())),
        (("neurons", 0.4, None, "outputs"), Target(0.4, Neurons(True))),
        (("neurons", 0.4, None, "row", 64), Target(0.4, Neurons(multiple=64))),
        (("neurons", 0.4, "layer", "outputs"), Target(0.4, Neurons())),
        (("neurons", None, "outputs", "model"), Target(0.2, Neurons(True))),
        (("neurons", None, "row", "row"), "group must be layer or outputs with pattern neurons"),
        (("neurons", None, "model", "row"), "config has one width for all blocks; got 'model'"),
        (("unstructured", None, "outputs", "row"), "got 'outputs': that is of --pattern neurons"),
        (("unstructured", None, None, "outputs"), "got 'outputs': that is of --pattern neurons"),
    ],
    ids=str,
)
def test_target_is_a_fifth_of_the_neurons_in_a_group_of_theirs(asked, target):
    if isinstance(target, str):
        assert target in refusal(resolve_target, *asked)
    else:
        assert resolve_target(*asked) == target


# What the narrower model computes


def wide(family, **settings):
    width = {"ffn_dim" if family.startswith("opt") else "intermediate_size": WIDTH}
    model, generator = toy_model(family, **width, **settings), torch.Generator().manual_seed(2)
    for layer in linear_layers(model).values():
        layer.weight.data.mul_(4).floor_().add_(0.5).div_(4)  # exact sums, and many ties
        if layer.bias is not None:
            layer.bias.data.normal_(generator=generator)
    return model


CASES = [*((family, {}) for family in FAMILIES), ("llama", {"mlp_bias": True})]


@pytest.mark.parametrize(("family", "settings"), CASES, ids=str)
@pytest.mark.parametrize("group", [None, "outputs"])
@torch.no_grad()
def test_narrower_model_has_the_bits_and_the_logits_of_one_with_zeros(family, settings, group):
    zeros, model, mlps = wide(family, **settings), wide(family, **settings), defaultdict(dict)
    report = prune(model, "sub(W, 0.25)", pattern="neurons", group=group)
    assert (report.pattern, report.group, report.sparsity) == ("neurons", group, 0)
    for name, weight in weights_of(zeros).items():
        if name.endswith(BEHIND + BEFORE):
            mlps[name.rpartition(".")[0]][name] = weight.abs() - 0.25  # sums have both signs
    gone = {x: lowest(mlp, group == "outputs") for mlp in mlps.values() for x in mlp}
    expected = {name: tensor.clone() for name, tensor in zeros.state_dict().items()}
    for name in [f"{x}.{kind}" for x in gone for kind in ("weight", "bias")]:
        if name in expected and not name.endswith(("down_proj.bias", "fc2.bias")):
            goes, kept = split(name, expected[name], gone[name.rpartition(".")[0]])
            expected[name] = expected[name][kept]
            if name.endswith(".weight"):
                zeros.get_parameter(name)[goes] = 0
    assert_same_tensors(model.state_dict(), expected)
    windows = toy_windows()
    torch.testing.assert_close(model(windows).logits, zeros(windows).logits, atol=1e-5, rtol=1e-5)
    type(model)(model.config).load_state_dict(expected)
    for name, layer in linear_layers(model).items():
        assert (layer.out_features, layer.in_features) == layer.weight.shape, name


def test_columns_that_stay_make_up_for_those_that_go_as_a_ridge_regression_says():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(40, 40, generator=generator)
    inputs = torch.randn(300, 40, generator=generator) @ mixed
    weight, gram = torch.randn(24, 40, generator=generator), inputs.T @ inputs
    gone, before = torch.arange(40) % 3 == 1, (weight.clone(), gram.clone())
    found, grown = compensate(weight, gone[None], gram)
    kept, lost = inputs[:, ~gone].double(), inputs[:, gone].double() @ weight[:, gone].double().T
    root = (0.01 * kept.square().sum(0).mean()).sqrt()  # rows that pull all changes towards 0
    rows = torch.cat([kept, root * torch.eye(kept.shape[1]).double()])
    change = torch.linalg.lstsq(rows, torch.cat([lost, 0 * rows[300:, :24]])).solution
    expected = weight.double().masked_fill(gone, 0)
    expected[:, ~gone] += change.T
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    assert grown == 0 and not found[:, gone].any()
    errors = [((x - weight) @ inputs.T).norm() for x in (found, weight.masked_fill(gone, 0))]
    assert errors[0] < 0.9 * errors[1]
    rows = torch.arange(24)[:, None] % 4 == 0
    for mask in (rows, torch.zeros(1, 1, dtype=torch.bool)):
        assert torch.equal(compensate(weight, mask, gram)[0], weight.masked_fill(mask, 0))
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


# From the command line


def call(code=0, **options):
    words = (["--" + name.replace("_", "-"), value] for name, value in options.items())
    given = [word for pair in words for word in pair if word is not True]
    return search_process.started(run_prune, *given, code=code)


SMALL = {
    **{"pattern": "neurons", "samples": 3, "seqlen": 16, "eval_windows": 4},
    **{"corpus": "embedded", "split": "calibration[:9%]"},
    **{"eval_corpus": "embedded", "eval_split": "report[:9%]"},
}
WAYS = {
    "llama": {"metric": "fisher"},
    "phi3": {"metric": "wanda-sp", "update": "sparsegpt"},
    "opt": {"metric": "flap", "update": "sparsegpt"},
    "gemma3": {"metric": "magnitude", "update": "reconstruct"},
}
families = pytest.mark.parametrize("family", WAYS)


@pytest.fixture(scope="module")
def mixed():
    """Let three tenths of every update stay, so that blocks are written again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunevolve.pruning.walk.part_chosen", lambda *losses: 0.3)
        yield


@pytest.fixture(scope="module")
def made(mixed, tiny_llama_dir, tmp_path_factory):
    """Return a saved model of a family with a tokenizer, its pruned folder, and what was said."""

    @cache
    def of(family):
        folder = tmp_path_factory.mktemp(family)
        dense, out = folder / "dense", folder / "out"
        wide(family, vocab_size=256).save_pretrained(dense)
        for path in tiny_llama_dir.glob("tokenizer*"):
            shutil.copy(path, dense)
        said = call(model=dense, out=out, **SMALL, **WAYS[family])
        return SimpleNamespace(dense=dense, out=out, said="".join(said))

    return of


def paper(folder, name):
    return json.loads((folder / f"pruning_{name}.json").read_text())


@families
def test_files_are_what_memory_gives_and_transformers_loads_them(made, family):
    folders = made(family)
    loaded, info = AutoModelForCausalLM.from_pretrained(folders.out, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(folders.out)
    model = load_model(str(folders.dense), "float32")
    windows, held_back = (
        Text("embedded", "calibration[:9%]", count, 16, seed).cut(tokenizer).tokens
        for count, seed in ((3, 0), (LEAST_HELD_BACK, 1))
    )
    prune(model, windows=windows, held_back=held_back, pattern="neurons", **WAYS[family])
    assert_same_tensors(loaded.state_dict(), model.state_dict())


@families
def test_plan_and_report_say_how_much_smaller_it_is(made, family):
    sizes, folders = [], made(family)
    for folder in (folders.dense, folders.out):
        tensors = tensors_of(folder).values()
        sizes.append([sum(x.numel() for x in tensors), sum(x.nbytes for x in tensors)])
    less = 1 - sizes[1][0] / sizes[0][0]
    plan = f"plan: {LEFT} of {WIDTH} neurons of each MLP stay, and all heads; {less:.1%} of "
    assert less > 0.05 and plan in folders.said
    told = paper(folders.out, "report")["size"].values()
    assert [[x[name] for x in told] for name in ("dense", "pruned")] == sizes
    index = json.loads((folders.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes[1][1]


@families
def test_result_is_as_reported_until_the_configs_width_is_altered(made, family, tmp_path):
    told = json.loads(call(evaluate=made(family).out, json=True)[0])
    assert told["perplexity"] == paper(made(family).out, "report")["pruned_perplexity"]
    out = shutil.copytree(made(family).out, tmp_path / "out")
    assert "neurons; counts and checksums are as reported" in call(verify=out)[0]
    config = json.loads((out / "config.json").read_text())
    width = {"ffn_dim" if family == "opt" else "intermediate_size": LEFT}
    inner = config.get("text_config", config)
    assert inner | width == inner
    inner |= dict.fromkeys(width, WIDTH)
    change_json(out / "config.json", **{"text_config": inner} if inner is not config else inner)
    _, err = call(code=4, verify=out)
    assert err.splitlines()[-1].startswith(f"error: '{out}' is not as it was saved: ")


@families
def test_interrupted_run_resumes_to_the_same_bytes(made, family, tmp_path, monkeypatch):
    def interrupted(written, mixes, path, tensors, **how):
        if path.parent.with_name("result.before").exists() == mixes:
            written.append(path)
            if len(written) == 2:  # the first is whole then, whichever block it is
                signal.raise_signal(signal.SIGINT)
        return write(path, tensors, **how)

    folders, out, write = made(family), tmp_path / "out", store.write_tensors
    asked = {"model": folders.dense, "out": out, **SMALL, **WAYS[family]}
    for mixes in [False, True] if "update" in asked else [False]:  # as blocks are written again
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_tensors", partial(interrupted, [], mixes))
            call(code=3, **asked)
        assert not (out / "pruning_report.json").exists() and list(out.rglob("*.safetensors"))
        asked = {"resume": out}
    call(**asked)
    assert paper(out, "recipe") == paper(folders.out, "recipe")  # with sums of all files


@families
def test_result_is_pruned_again_to_two_of_four(made, family, tmp_path):
    again = {**SMALL, "pattern": "2:4", "metric": "wanda", "out": tmp_path / "again"}
    call(model=made(family).out, **again)
    assert "% zeros, 2:4; counts and checksums are as " in call(verify=again["out"])[0]
    before, after = tensors_of(made(family).out), tensors_of(again["out"])
    assert {x: y.shape for x, y in after.items()} == {x: y.shape for x, y in before.items()}
    assert all(x["zeros"] * 2 >= x["size"] for x in paper(again["out"], "report")["layers"])
