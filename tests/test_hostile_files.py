"""Files that are broken, of another kind, or carry code: one line, and nothing of them runs."""

import json
import shutil
from pathlib import Path

import pytest
from search_process import started

from prunevolve import run_prune, run_search
from prunevolve.configs import schema
from prunevolve.pruning.models import load_tokenizer

ROLES = ("calibration", "fitness", "selection", "report")
SMALL = [word for role in ROLES for word in ("--set", f"{role}.length=16")]
CODE = "from pathlib import Path; Path('ran').touch()"


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Run a script that must refuse with exit code 2; returns its one line."""

    def run(script, *words):
        monkeypatch.chdir(tmp_path)
        out, err = started(script, *words, code=2)
        # Notes and progress may come before.
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (out, len(lines)) == ("", 1), err
        assert err.endswith(f"{lines[0]}\n")
        assert len(lines[0]) < 700
        assert not Path("ran").exists()
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def both_refuse(refused, tmp_path):
    """Let both scripts --validate with a model; returns their lines, which are the same."""

    def run(model):
        small = ("--samples", 2, "--seqlen", 16, "--eval-windows", 2, "--out", tmp_path / "out")
        words = ("--model", model, "--metric", "wanda", *small, "--validate")
        message = refused(run_prune, *words)
        assert message == refused(run_search, "--validate", "--set", f"model={model}", *SMALL)
        return message

    return run


@pytest.fixture
def model(tiny_llama_dir, tmp_path):
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.mark.parametrize(
    "content",
    [
        "model: " + "[" * 100_000,
        "model: !!python/object/apply:pathlib.Path.touch [!!python/name:pathlib.Path ran]",
        "\x00",
    ],
    ids=["deep", "code", "binary"],
)
def test_config_that_is_no_plain_yaml_is_refused(refused, tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    message = refused(run_search, "--validate", "--config", path)
    assert message.startswith(f"config {path} is not YAML: ")


def test_config_value_beyond_its_range_is_refused(refused):
    refused(run_search, "--validate", "--set", f"fitness.windows={10**30}")
    message = refused(run_search, "--validate", "--set", "fitness.windows=999999999")
    assert f"must be at most {schema.MOST_TOKENS // 256} of 256 tokens" in message


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_hidden_layers": 3}, "9 tensors are missing, model.layers.2."),
        ({"vocab_size": 300}, "must have shape (300, 16) by its config, got (256, 16)"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized: give the one that it"),
        ({"_attn_implementation": "owner/repo"}, "must be eager or sdpa, got 'owner/repo'"),
        ({"attn_implementation": "owner/repo"}, "must be eager or sdpa, got 'owner/repo'"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "'own' is not supported"),
        ({"hidden_size": "16"}, "cannot be loaded: "),
    ],
    ids=str,
)
def test_model_that_does_not_fit_its_config_is_refused(both_refuse, model, settings, problem):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    (model / "own.py").write_text(CODE)
    assert problem in both_refuse(model)


def test_model_with_pickled_weights_alone_is_refused(both_refuse, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    message = both_refuse(model)
    assert "lacks its weights file model.safetensors: convert .bin files, which are" in message


def test_model_with_an_index_that_leads_elsewhere_is_refused(both_refuse, model):
    index = model / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../model.safetensors"}}')
    assert "must have a weight_map to files beside it" in both_refuse(model)


@pytest.mark.parametrize("content", ["[]", "nonsense", '{"a": ' * 100_000], ids=range(3))
def test_model_with_broken_json_is_refused(both_refuse, model, content):
    (model / "config.json").write_text(content)
    assert str(model) in both_refuse(model)


def header(shape: int) -> bytes:
    entry = {"dtype": "F32", "shape": [shape], "data_offsets": (0, 8)}
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [b"", (2**60).to_bytes(8, "little") + b"{}", header(2) + bytes(4), header(3) + bytes(8)],
    ids=["empty", "long", "torn", "shape"],
)
def test_model_with_a_header_that_lies_is_refused(both_refuse, model, content):
    weights = model / "model.safetensors"
    weights.write_bytes(content)
    message = both_refuse(model)
    assert message.startswith(f"weights file {str(weights)!r} is torn or not a safetensors file")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'),
    ],
)
def test_tokenizer_is_refused_or_read_without_its_code(model, name, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model / name).write_text(content)
    (model / "own.py").write_text(CODE)
    try:
        load_tokenizer(str(model))
    except ValueError as error:
        assert str(error).startswith(f"model {str(model)!r} cannot be loaded: ")
        assert "\n" not in str(error)
    assert not Path("ran").exists()
