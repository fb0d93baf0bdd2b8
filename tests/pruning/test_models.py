"""Families of architectures: what is found in a model, and running its blocks one at a time."""

import shutil

import pytest
import torch
from refusals import refusal
from toy_models import FAMILIES, change_json, toy_model
from transformers import AutoModelForCausalLM, GPT2Config

from prunevolve.pruning.model_name import hub_id
from prunevolve.pruning.models import (
    decoder_blocks,
    find_model,
    linear_layers,
    load_config,
    load_model,
    resolve_model,
)

ATTENTION = [f"self_attn.{kind}_proj" for kind in "qkvo"]
GATED = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
OPT = [*(f"self_attn.{kind}_proj" for kind in ("k", "v", "q", "out")), "fc1", "fc2"]
FUSED = ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]
LAYERS = {
    "gemma3": ("model.language_model.layers", GATED),
    "opt": ("model.decoder.layers", OPT),
    "opt_projected": ("model.decoder.layers", OPT),
    "phi3": ("model.layers", FUSED),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_their_linear_layers_are_found_in_order(family):
    model = toy_model(family)
    path, names = LAYERS.get(family, ("model.layers", GATED))
    assert list(decoder_blocks(model)) == [f"{path}.0", f"{path}.1"]
    found = linear_layers(model)
    assert list(found) == [f"{path}.{i}.{name}" for i in (0, 1) for name in names]
    assert all(found[name] is model.get_submodule(name) for name in found)


def test_unsupported_architecture_is_refused_with_the_list_of_the_supported(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8)
    config.save_pretrained(tmp_path)
    for call in (
        lambda: load_config(str(tmp_path)),
        lambda: linear_layers(AutoModelForCausalLM.from_config(config)),
    ):
        message = "model_type 'gpt2' is not supported: it must be one of gemma2, gemma3, "
        assert message in refusal(call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp16",), "dtype must be one of float32, bfloat16, float16; got 'fp16'"),
        (("float32", "gpu"), "device 'gpu' cannot be used ("),
    ],
)
def test_load_model_refuses_a_dtype_or_device_in_one_line(arguments, message):
    assert refusal(load_model, "embedded", *arguments).startswith(message)


def test_model_is_a_folder_before_it_is_a_hub_id(tmp_path, monkeypatch):
    assert hub_id("org/model") == ("org/model", None)
    assert hub_id("org/model@v1.0") == ("org/model", "v1.0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model@v1.0").mkdir(parents=True)
    assert hub_id("org/model@v1.0") is None


@pytest.mark.parametrize(
    ("model", "way_out"),
    [
        ("nowhere", "give embedded, a folder or a hub id"),
        ("a/b/c", "give embedded, a folder or a hub id"),
        ("models/gemma3-270m", "`make gemma3` builds it, or give embedded, a folder or a hub id"),
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path, monkeypatch, model, way_out):
    monkeypatch.chdir(tmp_path)
    assert refusal(hub_id, model).endswith(f" is no folder: {way_out}")


@pytest.mark.parametrize(
    ("own", "has", "gradients", "dtype", "why"),
    [
        ("float16", {"float16"}, False, "float16", ""),
        ("float16", {"float16"}, True, "float32", "{narrow} and {slow} bfloat16"),
        ("float16", {"float16", "bfloat16"}, True, "bfloat16", "{narrow}"),
        ("bfloat16", {"float16"}, False, "float32", "{slow} bfloat16"),
        ("float32", set(), True, "float32", ""),
    ],
)
def test_auto_dtype_suits_device_and_gradients(
    monkeypatch, model_copy, own, has, gradients, dtype, why
):
    change_json(model_copy / "config.json", dtype=own)
    for kind, short in (("bfloat16", "bf16"), ("float16", "fp16")):
        name = f"_is_mkldnn_{short}_supported"
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda kind=kind: kind in has)
    model = resolve_model(str(model_copy), device="cpu", gradients=gradients)
    slow = "device cpu has no fast arithmetic for"
    why = why.format(narrow="float16 is too narrow for gradients", slow=slow)
    assert (model.dtype, model.why_dtype) == (dtype, why)


def test_copy_of_the_embedded_model_computes_as_it_does(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    copy = shutil.copytree(find_model("embedded"), tmp_path / "copy")
    assert {resolve_model(x, device="cpu").dtype for x in ("embedded", str(copy))} == {"float32"}
