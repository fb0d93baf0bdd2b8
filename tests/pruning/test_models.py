"""Families of architectures: what is found in a model, and running its blocks one at a time."""

import pytest
import torch
from refusals import refusal
from torch.testing import assert_close
from toy_models import FAMILIES, toy_model, toy_windows
from transformers import AutoModelForCausalLM, GPT2Config

from prunevolve.pruning.embed_and_head import block_inputs
from prunevolve.pruning.models import (
    decoder_blocks,
    hub_id,
    linear_layers,
    load_config,
    load_model,
    load_tokenizer,
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
def test_blocks_run_one_after_the_other_give_the_last_hidden_state(family):
    model, windows = toy_model(family), toy_windows()
    before = last_block_output(model, windows)
    captured, calls = block_inputs(model, windows)
    for factor in (1, 3):  # a block that was changed is run as it is
        next(iter(linear_layers(model).values())).weight.data.mul_(factor)
        hidden = captured
        with torch.no_grad():
            for call, block in zip(calls, decoder_blocks(model).values(), strict=True):
                hidden = [call.run(block, state) for state in hidden]
        assert_close(torch.cat(hidden), last_block_output(model, windows))
    assert not torch.allclose(before, torch.cat(hidden))
    assert not any(state.requires_grad for state in captured)


def test_load_model_asks_the_config_for_the_family_and_casts(tmp_path):
    folder = tmp_path / "opt-125m"
    toy_model("qwen2").save_pretrained(folder)
    loaded = load_model(str(folder), "bfloat16")
    assert loaded.config.model_type == "qwen2"
    assert not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_unsupported_architecture_is_refused_with_the_list_of_the_supported(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    for call in (
        lambda: load_config(str(tmp_path)),
        lambda: load_model(str(tmp_path), "float32"),
        lambda: linear_layers(model),
        lambda: block_inputs(model, toy_windows()),
    ):
        message = f"model_type 'gpt2' is not supported: it must be one of {SUPPORTED}"
        assert refusal(call).endswith(message)


@pytest.mark.parametrize(
    "load", [load_config, load_tokenizer, lambda model: load_model(model, "float32")]
)
@pytest.mark.parametrize("content", ["empty", "torn"])
def test_load_of_a_folder_without_a_model_gives_one_line(load, content, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content == "torn":
        (folder / "config.json").write_text('{"model_type": "lla')
    message = refusal(load, str(folder))
    assert message.startswith(f"model {str(folder)!r} cannot be loaded: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_load_model_reads_back_each_family_with_tied_embeddings_and_without(family, tmp_path):
    windows = toy_windows(count=1)
    for tied in (True, False):
        model = toy_model(family, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / str(tied))
        loaded = load_model(str(tmp_path / str(tied)), "float32")
        with torch.no_grad():
            assert_close(loaded(input_ids=windows).logits, model(input_ids=windows).logits)


def test_model_is_a_folder_before_it_is_a_hub_id(tmp_path, monkeypatch):
    assert hub_id("embedded") is None
    assert hub_id("org/model") == ("org/model", None)
    assert hub_id("org/model@v1.0") == ("org/model", "v1.0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model@v1.0").mkdir(parents=True)
    assert hub_id("org/model@v1.0") is None


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "a/b/c", "", "a/..", __file__])
def test_load_config_refuses_what_is_neither_a_folder_nor_a_hub_id(model):
    with pytest.raises(ValueError, match=r"is no folder: give embedded, a folder or a hub id$"):
        load_config(model)
