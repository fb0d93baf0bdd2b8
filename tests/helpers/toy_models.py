"""Random models of every supported family, small enough to run in milliseconds."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from prunevolve.evaluation.perplexity import window_losses
from prunevolve.pruning.models import linear_layers

# On matrices this small a second thread costs more than it does.
torch.set_num_threads(1)

VOCABULARY = 61
TOKENS = 12
SLIDING_WINDOW = 4
"""Shorter than TOKENS, so that a family that slides has another mask than a causal one."""

_COMMON: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"max_position_embeddings": 64, "initializer_range": 0.3},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
}
_GEMMA = _COMMON | {
    **{"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": SLIDING_WINDOW},
    "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 3.0,
}
_LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
_OPT = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64},
    **{"init_std": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
}


def _gemma3(settings: dict[str, Any]) -> PretrainedConfig:
    vision = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    }
    return Gemma3Config(text_config=settings, vision_config=vision, mm_tokens_per_image=1)


_CONFIGS = {
    "llama": (LlamaConfig, _COMMON),
    "llama3": (LlamaConfig, _COMMON | {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": (MistralConfig, _COMMON | {"sliding_window": SLIDING_WINDOW}),
    "qwen2": (Qwen2Config, _COMMON),
    "qwen3": (Qwen3Config, _COMMON | {"head_dim": 8}),
    "gemma2": (Gemma2Config, _GEMMA | {"attn_logit_softcapping": 2.0}),
    "gemma3_text": (Gemma3TextConfig, _GEMMA),
    "gemma3": (lambda **settings: _gemma3(settings), _GEMMA),
    "phi3": (Phi3Config, _COMMON | {"sliding_window": SLIDING_WINDOW}),
    "opt": (OPTConfig, _OPT),
    "opt_projected": (OPTConfig, _OPT | {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
}

FAMILIES = tuple(_CONFIGS)


def toy_model(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a random fp32 model in evaluation mode; `settings` go over the family's config."""
    build, defaults = _CONFIGS[family]
    config = build(**(defaults | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "gemma3":
            return Gemma3ForConditionalGeneration(config).eval()
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def toy_windows(count: int = 3, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    """Return random token ids, (count, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, tokens), generator=generator)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """See that tensors by name have the same dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def change_weights(
    folder: Path, change: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors"
) -> None:
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


def change_json(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def losses_in(store, windows, *on_window):
    """Return each window's mean NLL in a resident model."""
    return window_losses(store.states(windows), store.logits, windows, *on_window)


@torch.no_grad()
def own_inputs(model, layers, windows):
    """Return each layer's inputs, one (tokens, in_features) for each window."""
    kept = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: kept[name].append(inputs[0].flatten(0, -2).clone())
        )
        for name, layer in layers.items()
    ]
    for window in windows:
        model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return kept


def own_gradients(model, layers, windows):
    """Return each layer's gradients of its weight and its output, a pair for each window."""
    pairs, outputs = {name: [] for name in layers}, {}
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
        for name, layer in layers.items()
    ]
    for window in windows:
        logits = model(input_ids=window[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1], window[1:])
        asked = [one for name, layer in layers.items() for one in (layer.weight, outputs[name])]
        gradients = iter(torch.autograd.grad(loss, asked))
        for kept in pairs.values():
            kept.append((next(gradients), next(gradients).flatten(0, -2)))
    for handle in handles:
        handle.remove()
    return pairs
