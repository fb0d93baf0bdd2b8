"""Files that are broken, of another kind, or carry code: one line, and nothing of them runs."""

from pathlib import Path

import pytest
from search_process import started
from toy_models import change_json
from toy_setup import small

from prunevolve import run_prune
from prunevolve.pruning.models import load_tokenizer
from prunevolve.search import command as run_search

CODE = "from pathlib import Path; Path('ran').touch()"


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Run a script that must refuse with exit code 2; returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(script, *words):
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
def refused_model(refused, model_copy):
    return lambda: refused(run_prune, "--validate", "--model", model_copy, "--metric", "wanda")


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
    words = [f"--set={one}" for one in (f"model={model_copy}", *small(32, length=16))]
    assert message == refused(run_search, "--validate", *words)


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
