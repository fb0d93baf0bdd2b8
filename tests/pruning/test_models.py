"""Families of architectures: what is found in a model, and running its blocks one at a time."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from toy_models import FAMILIES, TOKENS, toy_model, toy_windows
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from pruning.embed_and_head import block_inputs
from pruning.models import (
    decoder_blocks,
    linear_layers,
    load_config,
    load_model,
    load_tokenizer,
    source_of,
)

SUPPORTED = "gemma2, gemma3, gemma3_text, llama, mistral, opt, phi3, qwen2, qwen3"
GATED = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
OPT = (
    *("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
    *("fc1", "fc2"),
)
FUSED = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
BLOCKS = {
    "gemma3": "model.language_model.layers",
    "opt": "model.decoder.layers",
    "opt_projected": "model.decoder.layers",
}


def error_of(call):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def run_block_after_block(model, windows):
    """Return the last block's output on captured calls, (N, T, hidden_size)."""
    hidden, calls = block_inputs(model, windows)
    with torch.no_grad():
        for i, block in enumerate(decoder_blocks(model).values()):
            hidden = [calls[i].run(block, state) for state in hidden]
    return torch.cat(hidden)


def last_block_output(model, windows):
    """Return the last block's output in one ordinary pass over a batch, (N, T, hidden_size)."""
    kept = []
    last = list(decoder_blocks(model).values())[-1]
    handle = last.register_forward_hook(
        lambda block, inputs, output: kept.append(
            output if isinstance(output, torch.Tensor) else output[0]
        )
    )
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_their_linear_layers_are_found_in_order(family):
    model = toy_model(family)
    path = BLOCKS.get(family, "model.layers")
    assert list(decoder_blocks(model)) == [f"{path}.0", f"{path}.1"]
    names = {"opt": OPT, "opt_projected": OPT, "phi3": FUSED}.get(family, GATED)
    found = linear_layers(model)
    assert list(found) == [f"{path}.{i}.{name}" for i in (0, 1) for name in names]
    assert all(found[name] is model.get_submodule(name) for name in found)
    assert model.get_output_embeddings() not in found.values()


@pytest.mark.parametrize("family", FAMILIES)
def test_running_the_captured_calls_block_after_block_gives_the_last_hidden_state(family):
    model, windows = toy_model(family), toy_windows()
    torch.testing.assert_close(
        run_block_after_block(model, windows), last_block_output(model, windows)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_running_block_after_block_notices_a_changed_block(family):
    model, windows = toy_model(family), toy_windows()
    before = last_block_output(model, windows)
    hidden, calls = block_inputs(model, windows)
    with torch.no_grad():
        next(iter(linear_layers(model).values())).weight.mul_(3)
        for i, block in enumerate(decoder_blocks(model).values()):
            hidden = [calls[i].run(block, state) for state in hidden]
    after = last_block_output(model, windows)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(torch.cat(hidden), after)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_inputs_gives_a_state_for_each_window_and_a_call_for_each_block(family):
    model, windows = toy_model(family), toy_windows(count=3)
    hidden, calls = block_inputs(model, windows)
    assert [tuple(state.shape) for state in hidden] == [(1, TOKENS, 16)] * 3
    assert len(calls) == 2
    assert not any(state.requires_grad for state in hidden)


def test_block_inputs_keeps_each_block_its_own_mask():
    model = toy_model("gemma3_text")  # a sliding block, then a full one
    hidden, calls = block_inputs(model, toy_windows(count=1))
    block = decoder_blocks(model)["model.layers.0"]
    with torch.no_grad():
        sliding, full = (call.run(block, hidden[0]) for call in calls)
    assert not torch.allclose(sliding[:, -1], full[:, -1])


def test_block_inputs_leaves_no_hook_behind():
    model = toy_model("llama")
    with pytest.raises(IndexError):
        block_inputs(model, torch.tensor([[10**6]]))
    block_inputs(model, toy_windows())
    assert not any(block._forward_pre_hooks for block in decoder_blocks(model).values())


# Loading


def test_load_model_asks_the_config_for_the_family_never_the_path(tmp_path):
    folder = tmp_path / "opt-125m"
    model, windows = toy_model("qwen2"), toy_windows()
    model.save_pretrained(folder)
    loaded = load_model(str(folder), "float32")
    assert list(linear_layers(loaded)) == list(linear_layers(model))
    with torch.no_grad():
        assert_close(loaded(input_ids=windows).logits, model(input_ids=windows).logits)


def test_load_model_casts_and_is_ready_for_evaluation(tmp_path):
    toy_model("opt").save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "bfloat16")
    assert not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_load_config_refuses_an_unsupported_architecture_and_lists_the_supported(tmp_path):
    GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    expected = f"model_type 'gpt2' is not supported: it must be one of {SUPPORTED}"
    assert error_of(lambda: load_config(str(tmp_path))) == expected
    assert error_of(lambda: load_model(str(tmp_path), "float32")) == expected


def test_decoder_blocks_refuses_an_unsupported_architecture():
    model = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8)
    )
    expected = f"model_type 'gpt2' is not supported: it must be one of {SUPPORTED}"
    assert error_of(lambda: decoder_blocks(model)) == expected
    assert error_of(lambda: linear_layers(model)) == expected
    assert error_of(lambda: block_inputs(model, toy_windows())) == expected


@pytest.mark.parametrize(
    "load", [load_config, load_tokenizer, lambda model: load_model(model, "float32")]
)
@pytest.mark.parametrize("content", ["empty", "torn"])
def test_load_of_a_folder_without_a_model_gives_one_line(load, content, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content == "torn":
        (folder / "config.json").write_text('{"model_type": "lla')
    message = error_of(lambda: load(str(folder)))
    assert message.startswith(
        f"model {str(folder)!r} cannot be loaded: give 'embedded', a Hugging Face folder, or a hub "
        "id where the hub can be reached ("
    )


def test_load_model_gives_one_line_for_a_torn_weights_file(tmp_path):
    toy_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = error_of(lambda: load_model(str(tmp_path), "float32"))
    assert message.startswith(f"weights file {str(weights)!r} is torn or not a safetensors file")
    assert message.endswith(": copy it again")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"num_hidden_layers": 3}, "9 tensors are missing, model.layers.2."),
        ({"hidden_size": 32}, "must have shape (61, 32) by its config, got (61, 16)"),
    ],
)
def test_load_model_refuses_weights_that_do_not_fill_the_config(setting, reason, tmp_path):
    toy_model("llama").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | setting))
    message = error_of(lambda: load_model(str(tmp_path), "float32"))
    assert message.startswith(f"model {str(tmp_path)!r} cannot be loaded: ")
    assert reason in message


@pytest.mark.parametrize("family", FAMILIES)
def test_load_model_reads_back_each_family_with_tied_embeddings_and_without(family, tmp_path):
    windows = toy_windows(count=1)
    for tied in (True, False):
        model = toy_model(family, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / str(tied))
        loaded = load_model(str(tmp_path / str(tied)), "float32")
        with torch.no_grad():
            assert_close(loaded(input_ids=windows).logits, model(input_ids=windows).logits)


def test_load_config_never_runs_code_from_the_folder(tmp_path):
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("from pathlib import Path; Path('ran').touch()")
    message = error_of(lambda: load_config(str(tmp_path)))
    assert message == f"model_type 'own' is not supported: it must be one of {SUPPORTED}"
    assert not Path("ran").exists()


def test_load_tokenizer_reads_what_was_saved(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    plain = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    LlamaConfig(vocab_size=3).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode("b") == [1]


def test_source_of_names_the_packaged_folder_only_for_the_embedded_model():
    assert source_of("embedded")[0].endswith("pruning/embedded")
    assert source_of("org/model") == ("org/model", "main")
    assert source_of("./embedded") == ("./embedded", "main")


def test_source_of_takes_the_revision_off_a_hub_id_and_not_off_a_folder(tmp_path, monkeypatch):
    assert source_of("org/model@v1") == ("org/model", "v1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model@v1").mkdir(parents=True)
    assert source_of("org/model@v1") == ("org/model@v1", "main")


def test_linear_layers_leave_out_a_vision_tower():
    model = toy_model("gemma3")
    vision = [m for m in model.model.vision_tower.modules() if isinstance(m, nn.Linear)]
    assert vision
    assert not set(vision) & set(linear_layers(model).values())
