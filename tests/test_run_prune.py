import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import search_process
import torch
from filelock import FileLock
from toy_models import change_json, change_weights, tensors_of, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunevolve import collect_statistics, prune, run_prune
from prunevolve.evaluation.windows import Text
from prunevolve.pruning import checkpoint, memory, statistics, store
from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import linear_layers, load_model
from prunevolve.pruning.run import command, result
from prunevolve.pruning.run.job import ONE_KIND
from prunevolve.pruning.run.options import read_recipe
from prunevolve.pruning.run.verify import verify_result
from prunevolve.pruning.store import ResidentStore
from prunevolve.pruning.stream import Stream


def call(code=0, **options):
    """Run the script with options by name, which must end with a code; return what it printed."""
    words = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += ["--" + name.replace("_", "-"), *([one] if one is not True else [])]
    return search_process.started(run_prune, *words, code=code)


@pytest.fixture
def prune_small(tiny_llama_dir, tmp_path):
    """Prune the tiny LLaMA into tmp_path/out with few short windows, options going over these."""

    def run(**options):
        defaults = {"model": tiny_llama_dir, "out": tmp_path / "out"}
        small = {"metric": "wanda", "samples": 3, "seqlen": 16, "eval_windows": 4}
        for text in SHORT:
            small |= text if options.keys().isdisjoint(text) else {}
        return call(**(defaults | small | options))

    return run


SHORT = (
    {"corpus": "embedded", "split": "calibration[:9%]"},
    {"eval_corpus": "embedded", "eval_split": "report[:9%]"},
)
"""Texts that are read in milliseconds."""

KNOWN = {}
"""Checksums of undisturbed runs by their options, and the part of an update if a test chose it."""

TWO_KINDS = {"corpus": ["embedded"] * 2, "split": ["training[:2%]", "calibration[:9%]"]}


def paper(folder: Path, name: str) -> dict:
    return json.loads((folder / f"pruning_{name}.json").read_text())


def test_run_prune_two_of_four_reloads_tied_with_the_reported_perplexity(
    prune_small, tiny_llama_dir, tmp_path
):
    out, _ = prune_small(pattern="2:4")
    report = paper(tmp_path / "out", "report")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    windows = Text("embedded", "report[:9%]", 4, 16).cut(tokenizer).tokens
    for name, folder in (("dense", tiny_llama_dir), ("pruned", tmp_path / "out")):
        assert f"{report[f'{name}_perplexity']:.4f}" in out
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses = [model(input_ids=ids[None], labels=ids[None]).loss for ids in windows]
        expected = torch.stack(losses).mean().exp().item()
        assert report[f"{name}_perplexity"] == pytest.approx(expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for layer in linear_layers(model).values():
        assert ((layer.weight.view(-1, 4) == 0).sum(1) == 2).all()
    assert "14 layers, 50.00% zeros, 2:4; " in call(verify=tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"metric": "W"}', " has no 'sha256': "),
        ("metrik: wanda", " has an unknown option 'metrik': did you mean metric? "),
        ("samples: 0", ": samples = 0: Input should be greater than or equal to 1"),
        ("- wanda", " must hold options, such as metric: wanda"),
        ("metric: [", " is no YAML: "),
    ],
)
def test_run_prune_refuses_an_altered_recipe(tmp_path, content, problem):
    path = tmp_path / f"recipe.{'json' if content.startswith('{') else 'yaml'}"
    path.write_text(content)
    _, err = call(code=2, recipe=path, out=tmp_path / "out")
    assert err.startswith(f"error: recipe {str(path)!r}{problem}")


def test_recipe_is_a_file_of_options(prune_small, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("metric: snip\nsparsity: 0.75\ncorpus: [embedded]\nsplit: ['training[:2%]']\n")
    words = {"recipe": path, "metric": None, "corpus": None}
    out, _ = prune_small(**words, sparsity=0.25, validate=True, json=True)
    options = json.loads(out)["options"]
    said = {"metric": "mul(W, G)", "sparsity": 0.25, "split": ["training[:2%]"], "seqlen": 16}
    assert options | said == options


def test_named_recipe_is_spelled_out_in_the_one_that_is_saved(prune_small, tmp_path):
    _, err = prune_small(metric=None)
    assert "note: no --metric given: --recipe fast, never behind" in err
    saved, asked = paper(tmp_path / "out", "recipe"), read_recipe("fast", "unstructured")
    assert {key: saved[key] for key in asked} == asked | {"metric": NAMED[asked["metric"]].text}


def test_run_prune_in_another_dtype_prints_one_object_of_json_and_saves_the_models_own(
    prune_small, tmp_path
):
    out, err = prune_small(metric="magnitude", dtype="bfloat16", json=True)
    told, report = json.loads(out), paper(tmp_path / "out", "report")
    assert (told["exit"], told["reason"]) == (0, "done")
    assert Path(told["report"]).exists() and Path(told["recipe"]).exists()
    assert told["pruned_perplexity"] == report["pruned_perplexity"]
    assert told["zeros"] == sum(layer["zeros"] for layer in report["layers"])
    assert told["weights"] == sum(layer["size"] for layer in report["layers"])
    assert f"saved: {tmp_path / 'out'} (" in err
    assert report["perplexity_of"]["dtype"] == "bfloat16"
    assert {weight.dtype for weight in tensors_of(tmp_path / "out").values()} == {torch.float32}
    assert json.loads(prune_small(code=4, json=True)[0])["reason"] == "folder"


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_evaluate_of_a_result_is_what_its_pruning_printed_unless_told(tmp_path, monkeypatch, dtype):
    # As on a processor that is fast in the dtype of the model's files.
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    passed, states = [], ResidentStore.states

    def counted(self, tokens):
        passed.append(len(tokens))
        return states(self, tokens)

    # In a batch, as larger models show, windows may be rounded differently.
    monkeypatch.setattr(ResidentStore, "states", counted)
    windows = {"seqlen": 128, "eval_windows": 5, "eval_corpus": "embedded"}
    named = {"model": "embedded", "metric": "magnitude", "dtype": dtype, "out": tmp_path / "out"}
    out, _ = call(**named, **windows, eval_split="selection")
    told = out.partition("pruned perplexity ")[2].partition("\n")[0]
    exact = paper(tmp_path / "out", "report")["pruned_perplexity"]
    out, _ = call(evaluate=tmp_path / "out", json=True)
    assert json.loads(out)["perplexity"] == exact
    assert passed == [1] * 5
    out, err = call(evaluate=tmp_path / "out")
    assert out == f"perplexity {told}\n"
    assert f"note: windows and dtype as in {tmp_path / 'out' / 'pruning_recipe.json'} unless" in err
    out, _ = call(evaluate=tmp_path / "out", eval_corpus="embedded", seqlen=8)
    assert "(embedded, split report, 5 windows of 8 = 40 tokens" in out


def test_perplexity_that_is_not_finite_is_null_and_named_with_text_window_and_dtype(
    prune_small, model_copy, tmp_path
):
    # Finite, but its products overflow.
    change_weights(model_copy, lambda weights: weights["model.norm.weight"].fill_(6e4))
    _, err = prune_small(model=model_copy, metric="magnitude", dtype="float16")
    report = paper(tmp_path / "out", "report")
    assert report["pruned_perplexity"] is report["dense_perplexity"] is None
    line = (
        "perplexity is not finite in float16: 4 windows are not, first window 1 "
        "(embedded, split report[:9%]); give another --dtype"
    )
    told = [f"dense {line}", f"pruned {line}"]
    assert report["warnings"] == told and {f"warning: {x}" for x in told} <= {*err.splitlines()}
    assert "14 layers" in call(verify=tmp_path / "out")[0]
    _, err = call(evaluate=tmp_path / "out", dtype="float16")
    assert f"warning: {line}" in err.splitlines()


@pytest.mark.parametrize(
    ("name", "metric", "shards"),
    [
        ("model.embed_tokens.weight", "magnitude", 2),
        ("model.layers.0.mlp.up_proj.weight", "magnitude", 0),
        ("model.layers.0.mlp.up_proj.weight", "wanda", 0),
    ],
)
def test_file_with_a_weight_that_is_not_finite_is_named_and_finished_shards_stay(
    prune_small, model_copy, tmp_path, name, metric, shards
):
    change_weights(model_copy, lambda weights: weights[name].fill_(math.nan))
    _, err = prune_small(code=2, model=model_copy, metric=metric)
    problem = f"tensor {name} has a value that is not finite"
    file = str(model_copy / "model.safetensors")
    assert err.splitlines()[-1] == f"error: model file {file!r}: {problem}"
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == shards


def test_scores_that_are_not_finite_leave_no_folder_and_name_their_layer(prune_small, tmp_path):
    _, err = prune_small(code=2, metric="mul(W, exp(exp(exp(exp(add(W, G))))))")
    assert list(tmp_path.iterdir()) == []
    assert "error: layer model.layers.1.self_attn.q_proj: the scores of 'mul(W, " in err


def test_pruning_of_a_pruned_model_says_that_zeros_add_up(prune_small, tmp_path):
    prune_small(metric="magnitude", sparsity=0.6)
    again = {"model": tmp_path / "out", "metric": "mul(neg(W), sqrt(X))", "sparsity": 0.6}
    _, err = prune_small(**again, out=tmp_path / "again")
    assert "plan: the model is a result of pruning: its zeros stay, and count among" in err
    (line,) = [x for x in paper(tmp_path / "again", "report")["warnings"] if "some before" in x]
    assert line.endswith("% zeros where 60.0% were asked for: the model had some before")


def test_files_beside_the_weights_are_copied_but_name_no_code(prune_small, model_copy, tmp_path):
    for file in ("config.json", "tokenizer_config.json"):
        change_json(model_copy / file, auto_map={"AutoConfig": "own.Config"})
    prune_small(model=model_copy.rename(tmp_path / "<b>a_b"), metric="magnitude")
    out = tmp_path / "out"
    assert "\n" + r"# \<b\>a\_b, pruned: " in (out / "README.md").read_text()
    for file in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (out / file).read_text()
    tokenizer = "tokenizer.json"
    assert (out / tokenizer).read_bytes() == (tmp_path / "<b>a_b" / tokenizer).read_bytes()


def test_run_prune_reads_no_calibration_text_for_a_metric_of_weights(prune_small, tmp_path):
    # A corpus of the hub, which is not asked.
    _, err = prune_small(metric="magnitude", corpus="c4")
    assert paper(tmp_path / "out", "recipe")["calibration"] is None
    assert "calibrat" not in err


def test_windows_are_as_many_as_fit_and_as_long_as_the_context(tiny_llama_dir, tmp_path):
    assert ", 32 windows of 64 = 2048 tokens" in call(evaluate=tiny_llama_dir)[0]
    (tmp_path / "own.txt").write_text("0123456789" * 10)
    own = {"eval_windows": "all", "eval_corpus": tmp_path / "own.txt", "seqlen": 8}
    assert ", 12 windows of 8 = 96 tokens" in call(evaluate=tiny_llama_dir, **own)[0]


def test_run_prune_warns_of_one_kind_of_text_and_where_evaluation_overlaps(prune_small, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("0123456789\n" * 20)
    _, err = prune_small(corpus=text, split="[:50%]", eval_corpus=text)
    overlap, one_kind = paper(tmp_path / "out", "report")["warnings"]
    assert overlap.startswith(f"calibration and evaluation overlap: {text} [:50%] and {text} all: ")
    assert one_kind == ONE_KIND.format(text)
    assert {f"warning: {overlap}", f"warning: {one_kind}"} <= {*err.splitlines()}
    _, err = prune_small(validate=True, out=tmp_path / "new", metric="magnitude")
    assert "warning" not in err


@pytest.mark.parametrize("update", ["sparsegpt", "reconstruct"])
def test_plan_says_why_gradients_are_not_in_float16_and_that_windows_are_few(
    monkeypatch, prune_small, model_copy, update
):
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: True)
    change_json(model_copy / "config.json", dtype="float16")
    backward, method = update == "reconstruct", {"model": model_copy, "update": update}
    out, err = prune_small(**method, samples=15, validate=True)
    assert ("warning: 15 calibration windows are few for a reconstruction" in err) == backward
    why = "plan: computing in bfloat16, since float16 is too narrow for gradients; files"
    assert (why in out) == backward
    _, err = prune_small(**method, samples=16, validate=True, dtype="float16")
    assert "windows are few" not in err
    assert ("warning: small gradients are lost in float16" in err) == backward


def test_run_prune_takes_several_kinds_of_text_and_measures_each(prune_small, tmp_path):
    splits = ["report[:9%]", "selection[:9%]"]
    judged = {"eval_corpus": ["embedded"] * 2, "eval_split": splits}
    out, err = prune_small(samples=4, share=[1, 3], **TWO_KINDS, **judged)
    report, recipe = paper(tmp_path / "out", "report"), paper(tmp_path / "out", "recipe")
    assert (report["warnings"], "warning" in err) == ([], False)
    assert recipe["calibration"]["split"] == " + ".join(TWO_KINDS["split"])
    assert (recipe["calibration"]["windows"], report["perplexity_of"]["windows"]) == (4, 8)
    by_text = {text["split"]: text for text in report["by_text"]}
    assert list(by_text) == splits
    for name in ("dense", "pruned"):
        both = math.sqrt(math.prod(text[name] for text in by_text.values()))
        assert report[f"{name}_perplexity"] == pytest.approx(both)
    dense = by_text[splits[1]]["dense"]
    assert f"\n  of embedded, split {splits[1]}: dense {dense:.4f} ± " in out


def test_run_prune_warns_of_special_tokens(prune_small, model_copy, tmp_path):
    text = tmp_path / "text.txt"
    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    tokenizer.add_special_tokens({"unk_token": "~"})
    tokenizer.save_pretrained(model_copy)
    text.write_text("a word ~ and more\n" * 100)
    _, err = prune_small(model=model_copy, corpus=text)
    assert "of the calibration tokens are special ones such as ~, which" in err


def test_validate_asks_no_hub_and_writes_nothing(prune_small, tmp_path):
    out, _ = prune_small(validate=True, out=None, corpus="c4", eval_corpus="wikitext2")
    hub, other, plan, *_, valid = out.splitlines()
    assert hub == "corpus 'c4', split 'train' comes from the Hugging Face hub: not checked"
    assert other.startswith("corpus 'wikitext2', split 'test' ")
    assert plan.startswith("plan: resident; at most ") and valid.startswith("valid: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 50}, "sparsity = 50.0: Input should be less than 1"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity must be 0.5 with pattern 2:4, or left out"),
        ({"update": "obs"}, "'--update': Value error, 'obs' is not one of 'none', 'sparsegpt'"),
        ({"skip": "["}, "skip = '[': no regular expression: unterminated character set"),
        ({"skip": "lm_head"}, "self_attn.q_proj; got 'lm_head', in 0"),
        ({"skip": "proj"}, "self_attn.q_proj; got 'proj', in 14"),
        ({"skip": "0", "pattern": "neurons"}, "skip must be left out with pattern neurons: all"),
        ({"metric": "sparsegpt", "pattern": "neurons"}, "pattern must be unstructured or n:m with"),
        ({"group": "model", "pattern": "neurons"}, "since a model's config has one width for all"),
        ({"pattern": "neurons"}, "sparsity must leave a multiple of 32 neurons of the 24 in each"),
        ({"seqlen": 65}, "seqlen must be 2 to 64, the model's context; got 65"),
        ({"max_memory": "6 apples"}, "max-memory = '6 apples': could not interpret byte unit: app"),
        ({"metric": "/dev/zero"}, "metric file '/dev/zero': '/dev/zero' is no regular file: not"),
        ({"recipe": "fats"}, "recipe 'fats' cannot be read: No such file or directory; give best,"),
        ({"verify": "x"}, "--verify must stand alone: leave out all other options"),
        ({"evaluate": "x"}, "--evaluate only measures: with it go --revision, --dtype, "),
        ({"resume": True, "out": None}, "--resume needs the unfinished folder: give --resume DIR"),
        ({"out": None}, "--out is required: name a new folder for the result"),
        ({"statistics": "none.pth"}, "statistics must be a folder to keep them in, or a .pth file"),
        ({"revision": "main"}, "revision must be left out for a model that is here, got 'main'"),
    ],
    ids=str,
)
def test_run_prune_says_a_mistake_in_one_line(prune_small, tmp_path, options, message):
    out, err = prune_small(code=2, **options)
    (error,) = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert out == ""
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tight(prune_small, monkeypatch):
    """Prune with no more memory than one block at a time takes, the libraries apart."""
    monkeypatch.setattr(memory, "LIBRARIES", 0)

    def run(code=0, **options):
        _, err = prune_small(code=2, **options, max_memory="0.001MiB")
        least = err.partition("max-memory must be at least ")[2].partition(" here")[0]
        return prune_small(code=code, **options, max_memory=least)

    return run


METHODS = {
    "forward": {"metric": "wanda"},
    "backward": {"metric": "snip", "group": "row"},
    "last": {"metric": "gblm", "group": "model"},
    "last, sequential": {"metric": "gblm", "propagation": "sequential"},
    "sparsegpt": {"metric": "sparsegpt", "pattern": "2:4"},
    "all": {"metric": "gblm", "update": "reconstruct"},
    "all but a block": {"metric": "gblm", "update": "reconstruct", "skip": "layers.0"},
}


def test_recipe_repeats_methods_and_texts_and_gives_way_to_options(
    prune_small, tmp_path, unguarded
):
    given = {"group": "layer", "sparsity": 0.6, "seed": 7, "share": [2, 1], **TWO_KINDS}
    prune_small(**METHODS["all"], **given)
    recipe, report = paper(tmp_path / "out", "recipe"), paper(tmp_path / "out", "report")
    said = {"update": "reconstruct", "dtype": "float32"}
    said |= {name: given[name] for name in ("group", "sparsity", "seed")}
    assert recipe | said == recipe
    assert Metric.parse(recipe["metric"]).to_release_json() == recipe["tree"]
    texts = {"split": "training[:2%] + calibration[:9%]", "windows": 3, "length": 16, "seed": 7}
    assert recipe["calibration"] | texts == recipe["calibration"]
    assert sorted(report["training"]) == ["model.layers.0", "model.layers.1"]
    path = tmp_path / "out" / "pruning_recipe.json"
    words = {"recipe": path, "out": tmp_path / "again"}
    for changes, expected in (
        ({"pattern": "2:4"}, {"pattern": "2:4", "group": None, "sparsity": 0.5}),
        ({"metric": "snip"}, {"metric": "mul(W, G)", "group": "model"}),
        ({"corpus": "embedded"}, {"split": None, "share": None, "group": "layer"}),
    ):
        options = json.loads(call(**words, **changes, validate=True, json=True)[0])["options"]
        assert {key: options.get(key) for key in expected} == expected
    call(**words)
    assert paper(tmp_path / "again", "recipe") == recipe
    change_json(path, allocation="owl")
    assert "has an allocation" in call(code=2, recipe=path, out=tmp_path / "other")[1]


def test_damping_that_grows_is_in_the_report_and_told_once(prune_small, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "DAMPING", 1e-8)
    # Eight tokens of 16 and 24 inputs: the Gram matrix has no factor without a damping.
    _, err = prune_small(metric="sparsegpt", samples=1, seqlen=8)
    report = paper(tmp_path / "out", "report")
    layer, times = max(report["damping"].items(), key=lambda item: item[1])
    (line,) = [line for line in report["warnings"] if "damping" in line]
    told = f"the damping of {len(report['damping'])} Gram matrices grew tenfold, for layer {layer} "
    assert line.startswith(f"{told}{times} times") and err.count(line) == 1


def test_gram_matrix_without_a_factor_is_named_with_its_layer(prune_small, monkeypatch):
    monkeypatch.setattr(statistics, "DAMPING", -1.0)
    _, err = prune_small(code=2, metric="sparsegpt")
    line = "error: layer model.layers.0.self_attn.q_proj: the Gram matrix of its inputs has no fact"
    assert err.splitlines()[-1].startswith(line)


@pytest.fixture
def undisturbed(prune_small, tmp_path):
    def checksums(part=None, **options):
        key = (part, *options.items())
        if key not in KNOWN:
            prune_small(**options, out=tmp_path / "undisturbed")
            KNOWN[key] = checksums_of(tmp_path / "undisturbed")
        return KNOWN[key]

    return checksums


def checksums_of(folder: Path) -> dict[str, str]:
    return paper(folder, "recipe")["sha256"]


def contents_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def at_shard(monkeypatch):
    """Let the writing of a shard with some number fail with an error, or be interrupted."""

    def patch(number, error=None, module=store):
        written, write = [], module.write_tensors

        def count(path, tensors, **how):
            written.append(path)
            if len(written) == number:
                if error:
                    raise error
                interrupt()
            return write(path, tensors, **how)

        monkeypatch.setattr(module, "write_tensors", count)

    return patch


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("way", METHODS)
def test_least_memory_gives_the_same_files(tight, undisturbed, tiny_llama_dir, tmp_path, way):
    expected = undisturbed(**METHODS[way])
    _, err = tight(**METHODS[way])
    assert "plan: streamed, one block at a time" in err
    assert checksums_of(tmp_path / "out") == expected
    report = paper(tmp_path / "out", "report")
    for name, of in (("dense", tiny_llama_dir), ("pruned", tmp_path / "out")):
        given = {"evaluate": of, "seqlen": 16, "eval_windows": 4, **SHORT[1]}
        told = json.loads(call(**given, dtype="float32", json=True)[0])
        assert report[f"{name}_perplexity"] == told["perplexity"]


MEMORY_OR_DEVICE = "free memory, or see to the device, and {}"
STOPS = [
    *((way, None, 3, "interrupted; {}") for way in METHODS),
    ("forward", RuntimeError("CUDA error: a\nb"), 3, f"error: CUDA error: a: {MEMORY_OR_DEVICE}"),
    ("forward", torch.OutOfMemoryError("OOM"), 3, f"error: OOM: {MEMORY_OR_DEVICE}"),
    ("forward", MemoryError(), 3, f"error: out of memory: {MEMORY_OR_DEVICE}"),
    ("forward", ValueError("scores are constant"), 2, "error: scores are constant"),
]


@pytest.mark.parametrize(("way", "error", "code", "line"), STOPS)
def test_resume_ends_with_the_same_files(
    prune_small, undisturbed, at_shard, tmp_path, way, error, code, line
):
    expected = undisturbed(**METHODS[way])
    at_shard(2, error)
    out, err = prune_small(**METHODS[way], code=code)
    assert out == ""
    way_on = f"continue with python run_prune.py --resume {tmp_path / 'out'}"
    assert err.splitlines()[-1] == line.format(way_on)
    assert not (tmp_path / "out" / "pruning_report.json").exists()
    shards = (tmp_path / "out" / ".unfinished" / "result").glob("*.safetensors")
    kept = {path.name: path.stat().st_mtime_ns for path in shards}
    assert len(kept) == 1 or (kept and not error)
    prune_small(**METHODS[way], resume=True)
    assert checksums_of(tmp_path / "out") == expected
    if paper(tmp_path / "out", "recipe").get("update_part", 1) == 1:
        assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert not (tmp_path / "out" / ".unfinished").exists()
    verify_result(tmp_path / "out")


MIXED = {
    "row": METHODS["all"],
    "model": {"metric": "gblm", "group": "model", "update": "sparsegpt"},
}


@pytest.mark.parametrize("way", MIXED)
@pytest.mark.parametrize(
    ("moment", "part"),
    # Shards of two blocks, which are written twice; or just before and after the part is kept.
    [(2, 0.3), (3, 0.3), (4, 0.0), ("before", 0.3), ("behind", 0.3), ("behind", 1.0)],
)
def test_resume_of_what_is_written_again(
    prune_small, tight, undisturbed, at_shard, tmp_path, monkeypatch, way, moment, part
):
    def stop(self, kind, values):
        if kind != "guard" or moment == "behind":
            keep(self, kind, values)
        if kind == "guard":
            raise KeyboardInterrupt

    keep, start = result.WorkFolder.keep, tight if way == "model" else prune_small
    monkeypatch.setattr("prunevolve.pruning.walk.part_chosen", lambda *losses: part)
    expected = undisturbed(part, **MIXED[way])
    with monkeypatch.context() as patch:
        at_shard(moment)
        if moment in ("before", "behind"):
            patch.setattr(result.WorkFolder, "keep", stop)
        start(**MIXED[way], code=3)
    shards = (tmp_path / "out/.unfinished/result").glob("*.safetensors")
    times = {path.name: path.stat().st_mtime_ns for path in shards}
    assert times or moment == 3  # whose shard may be finished after the run
    start(**MIXED[way], resume=True)
    assert checksums_of(tmp_path / "out") == expected
    for name, time_ns in times.items():
        stays = part == 1 or moment in (3, 4)
        assert ((tmp_path / "out" / name).stat().st_mtime_ns == time_ns) == stays, name
    assert paper(tmp_path / "out", "recipe")["update_part"] == part
    warnings = paper(tmp_path / "out", "report")["warnings"]
    assert any("the update was left out" in x for x in warnings) == (part == 0)
    verify_result(tmp_path / "out")


def test_resume_of_a_folder_alone_ends_with_the_same_files(
    prune_small, undisturbed, at_shard, tmp_path
):
    options = {"metric": "snip", "update": "sparsegpt", "sparsity": 0.6}
    expected = undisturbed(**options)
    at_shard(2)
    prune_small(**options, code=3)
    shard = tmp_path / "out/.unfinished/result/model-00003-of-00003.safetensors"
    while not shard.exists():  # the thread that writes may end after the run here
        time.sleep(0.01)
    alone = {"resume": True, "out": tmp_path / "out"}
    before = contents_of(tmp_path / "out")
    assert "valid: " in call(**alone, validate=True)[0]
    assert "begun with sparsity 0.6, and it is 0.5 now" in call(**alone, sparsity=0.5, code=4)[1]
    assert "begun with model '" in prune_small(**options, model="embedded", resume=True, code=4)[1]
    assert "max-memory" in call(**alone, validate=True, max_memory="1KiB", code=2)[1]
    assert contents_of(tmp_path / "out") == before
    call(resume=tmp_path / "out")
    assert checksums_of(tmp_path / "out") == expected


def test_resume_of_a_folder_with_nothing_unfinished(prune_small, tmp_path):
    none = tmp_path / "none"
    problem = "is no folder: --resume needs an unfinished one"
    assert call(code=4, resume=none)[1] == f"error: '{none}' {problem}\n"
    none.mkdir()
    problem = "has no unfinished pruning: No such file or directory"
    assert call(code=4, resume=none)[1].endswith(f"error: '{none}' {problem}\n")
    none.rmdir()
    assert f"error: unexpected argument '{none}': " in prune_small(code=2, resume=none)[1]
    prune_small(metric="magnitude")
    (tmp_path / "out" / ".unfinished").mkdir()  # killed before the work was removed
    before = contents_of(tmp_path / "out")
    out, _ = call(resume=tmp_path / "out")
    assert out == f"{tmp_path / 'out'}: finished; nothing to do\n"
    assert contents_of(tmp_path / "out") == before
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_resume_publishes_what_was_whole(prune_small, undisturbed, tmp_path, monkeypatch):
    expected = undisturbed(metric="wanda")
    with monkeypatch.context() as patched:
        patched.setattr(command.result, "publish", lambda out: interrupt())
        prune_small(code=3, metric="wanda")
    monkeypatch.setattr(command, "prune", None)  # would fail if it were called
    prune_small(metric="wanda", resume=True)
    assert checksums_of(tmp_path / "out") == expected
    verify_result(tmp_path / "out")


@pytest.mark.parametrize("end", [-100, -1], ids=["cut short", "other bytes"])
def test_resume_refuses_a_shard_that_changed_and_makes_a_removed_one_again(
    prune_small, undisturbed, at_shard, tmp_path, end
):
    expected, unfinished = undisturbed(metric="wanda"), tmp_path / "out"
    at_shard(2)
    prune_small(code=3)
    while list(tmp_path.rglob("*.tmp")):  # the thread that writes ends after the run here
        time.sleep(0.01)
    first = unfinished / ".unfinished/result/model-00002-of-00003.safetensors"
    content = first.read_bytes()
    first.write_bytes(content[:end] + bytes([content[-1] ^ 1]) * (end == -1))
    before = contents_of(unfinished)
    _, err = prune_small(code=4, resume=True)
    problem = "is not as it was written: remove it, and --resume makes it again"
    assert err.splitlines()[-1] == f"error: '{first}' {problem}"
    assert contents_of(unfinished) == before
    first.unlink()
    prune_small(resume=True)
    assert checksums_of(unfinished) == expected


def test_run_prune_works_in_a_folder_alone(prune_small, tmp_path):
    (tmp_path / "out/.unfinished").mkdir(parents=True)
    with FileLock(tmp_path / "out/.unfinished/lock"):
        _, err = prune_small(code=4, resume=True)
    assert err.endswith("is in use by another process: wait, or name another folder\n")


@pytest.mark.parametrize(
    ("module", "number", "cause", "way_out"),
    [
        (store, 2, errno.ENOSPC, "make room"),
        (store, 2, errno.EROFS, "make it writable"),
        (checkpoint, 3, errno.ENOSPC, "make room"),
        (checkpoint, 12, errno.ENOSPC, "make room"),
    ],
)
def test_disk_that_takes_no_more_leaves_what_resumes(
    tight, undisturbed, at_shard, tmp_path, module, number, cause, way_out
):
    expected = undisturbed(metric="snip")
    at_shard(number, OSError(cause, os.strerror(cause)), module)
    _, err = tight(code=4, metric="snip")
    out, work = tmp_path / "out", tmp_path / "out" / ".unfinished"
    problem = f"cannot be written ({os.strerror(cause)}): {way_out} and go on with --resume"
    assert err.splitlines()[-1] == f"error: out '{out}' {problem}"
    assert not (work / "states").exists() and not (work / "statistics").exists()
    finished = number - 1 if module is store else 0
    assert len(list((work / "result").glob("*.safetensors"))) == finished
    _, err = tight(metric="snip", resume=True)
    assert "plan: streamed, one block at a time" in err
    assert checksums_of(out) == expected


@pytest.fixture
def steps_back(monkeypatch):
    steps, take = [], Stream.take

    def counted(stream, way, *arguments):
        if way == "backward":
            steps.append(arguments)
        return take(stream, way, *arguments)

    monkeypatch.setattr(Stream, "take", counted)
    return steps


def test_statistics_are_kept_reused_added_to_and_refused_to_another_text(
    prune_small, undisturbed, steps_back, tmp_path
):
    kept, expected = tmp_path / "kept", undisturbed(metric="gblm")
    prune_small(metric="wanda", statistics=kept, out=tmp_path / "first")
    assert {path.name for path in kept.iterdir()} == {"X", "statistics.json"}
    steps_back.clear()
    prune_small(metric="gblm", statistics=kept)
    assert len(steps_back) == 2  # blocks
    assert {path.name for path in kept.iterdir()} == {"X", "G", "statistics.json"}
    assert len(list((kept / "G").iterdir())) == 14
    before = contents_of(kept)
    prune_small(metric="gblm", statistics=kept, out=tmp_path / "again")
    assert len(steps_back) == 2
    assert contents_of(kept) == before
    assert checksums_of(tmp_path / "out") == checksums_of(tmp_path / "again") == expected
    other = tmp_path / "other"
    _, err = prune_small(code=4, seed=1, statistics=kept, out=other)
    problem = "are of calibration seed 0, and it is 1 here: name another folder"
    assert err.endswith(f"error: statistics '{kept}' {problem}\n")
    assert contents_of(kept) == before and not other.exists()
    _, err = prune_small(code=4, statistics=tmp_path / "first", out=other)
    assert "has no statistics.json and is not empty: name another folder" in err


@pytest.fixture
def gradients(tiny_llama_dir):
    """G of the tiny LLaMA by layer, on windows of our own, in fp16 as the release saves it."""
    windows = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    found = collect_statistics(load_model(str(tiny_llama_dir), "float32"), "G", windows)
    return {key.removeprefix("G/"): G.half() for key, G in found.items()}


def release_key(layer: str) -> str:
    """Return `self_attn.q_proj_layer_0` of `model.layers.0.self_attn.q_proj`."""
    number, _, name = layer.removeprefix("model.layers.").partition(".")
    return f"{name}_layer_{number}"


def test_run_prune_reads_the_gradients_that_the_release_saved(
    prune_small, gradients, steps_back, tmp_path, tiny_llama_dir
):
    torch.save({release_key(name): G for name, G in gradients.items()}, tmp_path / "g.pth")
    prune_small(metric="gblm", statistics=tmp_path / "g.pth")
    assert steps_back == []
    model = load_model(str(tiny_llama_dir), "float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    windows = Text("embedded", "calibration[:9%]", 3, 16, 0).cut(tokenizer).tokens
    found = {f"G/{name}": G.float() for name, G in gradients.items()}
    prune(model, "gblm", statistics=found | collect_statistics(model, "X", windows))
    written = tensors_of(tmp_path / "out")
    for name, weight in weights_of(model).items():
        assert torch.equal(written[f"{name}.weight"], weight), name


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_gradients_of_another_model_or_with_a_class_are_refused(
    prune_small, gradients, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "g.pth"
    found = {release_key(name): G for name, G in gradients.items()}
    for content, problem in (
        ({"mlp.up_proj_layer_1": torch.zeros(3, 5)}, " of shape (24, 16), got (3, 5): give the"),
        ({"mlp.up_proj_layer_1": Trap()}, ", and only tensors are read\n"),
    ):
        torch.save(found | content, path)
        assert problem in prune_small(code=2, metric="snip", statistics=path)[1]
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read: " in prune_small(code=2, metric="snip", statistics=path)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["g.pth"]


LONGER = {"metric": "gblm", "propagation": "sequential", "samples": "24", "seqlen": "128"}


def started(out: Path, *flags: str) -> subprocess.Popen[str]:
    options = {"model": "embedded", "out": str(out), "eval-windows": "4", **LONGER}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "run_prune.py", *words, *flags]
    with (out.parent / "log").open("a") as log:
        return search_process.begin(command, stdout=log)


def stopped_when(process: subprocess.Popen[str], path: Path, number: signal.Signals) -> int:
    search_process.wait_until(path.exists, process)
    process.send_signal(number)
    return process.wait(timeout=60)


@pytest.mark.slow
def test_run_prune_stopped_at_three_moments_and_resumed_is_the_same(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert started(whole).wait(timeout=300) == 0
    work, result = out / ".unfinished", out / ".unfinished" / "result"
    begun = work / "run.json"
    assert stopped_when(started(out), begun, signal.SIGKILL) == -signal.SIGKILL
    shard = result / "model-00002-of-00005.safetensors"
    assert stopped_when(started(out, "--resume"), shard, signal.SIGTERM) == 3
    assert (tmp_path / "log").read_text().splitlines()[-1] == (
        f"interrupted; continue with python run_prune.py --resume {out}"
    )
    shard = result / "model-00004-of-00005.safetensors"
    assert stopped_when(started(out, "--resume"), shard, signal.SIGKILL) == -signal.SIGKILL
    again = [sys.executable, "run_prune.py", "--resume", str(out)]
    assert subprocess.run(again, cwd=search_process.ROOT, timeout=300).returncode == 0
    assert checksums_of(out) == checksums_of(whole)
    assert verify_result(out)
