"""Files that are broken, of another kind, or carry code: one line, and nothing of them runs."""

from pathlib import Path

import pytest
from search_process import started
from toy_models import change_json

from prunevolve import run_prune
from prunevolve.configs import schema
from prunevolve.pruning.models import load_tokenizer
from prunevolve.search import command as run_search

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
def refused_model(refused, model_copy, tmp_path):
    small = ("--samples", 2, "--seqlen", 16, "--eval-windows", 2, "--out", tmp_path / "out")
    words = ("--model", model_copy, "--metric", "wanda", *small, "--validate")
    return lambda: refused(run_prune, *words)


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
    message = refused(run_search, "--validate", "--set", "ray.address=foo")
    assert "ray.address = 'foo': String should match pattern '^(local|auto|" in message


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_hidden_layers": 3}, "9 tensors are missing, model.layers.2."),
        ({"vocab_size": 300}, "must have shape (300, 16) by its config, got (256, 16)"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized: give the one that it"),
        ({"attn_implementation": "owner/repo"}, "must be eager or sdpa, got 'owner/repo'"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "'own' is not supported"),
        ({"hidden_size": "16"}, "cannot be loaded: "),
    ],
    ids=str,
)
def test_model_unlike_its_config_is_refused(refused_model, model_copy, settings, problem):
    change_json(model_copy / "config.json", **settings)
    (model_copy / "own.py").write_text(CODE)
    assert problem in refused_model()


def test_model_with_pickled_weights_alone_is_refused(refused, refused_model, model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    message = refused_model()
    assert "lacks its weights file model.safetensors: convert .bin files, which are" in message
    roles = ("calibration", "fitness", "selection", "report")
    short = [word for role in roles for word in ("--set", f"{role}.length=16")]
    assert message == refused(run_search, "--validate", "--set", f"model={model_copy}", *short)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../a"}}', "must have a weight_m"),
        ("config.json", b"[]", "model '"),
        ("config.json", b'{"a": ' * 100_000, "model '"),
        ("model.safetensors", b"", "is torn or not a safetensors file"),
        ("model.safetensors", (2**60).to_bytes(8, "little") + b"{}", "is torn or not a safetens"),
    ],
    ids=range(5),
)
def test_model_with_a_broken_file_is_refused(refused_model, model_copy, name, content, problem):
    (model_copy / name).write_bytes(content)
    message = refused_model()
    assert problem in message and str(model_copy) in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'),
    ],
)
def test_tokenizer_is_refused_or_read_without_code(
    model_copy, name, content, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (model_copy / name).write_text(content)
    (model_copy / "own.py").write_text(CODE)
    try:
        load_tokenizer(str(model_copy))
    except ValueError as error:
        assert str(error).startswith(f"model {str(model_copy)!r} cannot be loaded: ")
        assert "\n" not in str(error)
    assert not Path("ran").exists()
