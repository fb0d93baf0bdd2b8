"""Models: load, decoder blocks, linear layers, block inputs; the only file that knows families.

A family is told by its config's `model_type`, never by a path. Everything that a block is called
with is captured as it comes, so that a new keyword of transformers needs no change here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pruning.attention import use_blocked_attention

EMBEDDED = "embedded"
"""Name of the tiny LLaMA that ships in this package."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_BLOCKS = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gemma3_text": "model.layers",
    "gemma3": "model.language_model.layers",
    "opt": "model.decoder.layers",
}


@dataclass(frozen=True)
class BlockCall:
    """What one decoder block was called with besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the block's output hidden states, (batch, tokens, hidden_size)."""
        output = block(hidden, *self.arguments, **self.keywords)
        return output if isinstance(output, Tensor) else output[0]


def source_of(model: str) -> str:
    """Return what transformers loads for a model's name: a folder or a hub id."""
    return str(Path(__file__).parent / "embedded") if model == EMBEDDED else model


def load_config(model: str) -> PretrainedConfig:
    """Load a model's config and check that its architecture can be pruned.

    Raises:
        ValueError: If there is no such model, or its architecture is not supported.
    """
    with _one_line_errors(model):
        config = AutoConfig.from_pretrained(source_of(model), trust_remote_code=False)
    _blocks_path(config)
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; raises ValueError if there is none."""
    with _one_line_errors(model):
        return AutoTokenizer.from_pretrained(source_of(model), trust_remote_code=False)


def load_model(model: str, dtype: str, device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model for evaluation.

    Args:
        model: `embedded`, a folder or a hub id.
        dtype: A key of `DTYPES`.
        device: A torch device.

    Raises:
        ValueError: If there is no such model, its architecture is not supported, or a tensor is
            missing, torn or of another shape.
    """
    load_config(model)
    with _one_line_errors(model):
        loaded, found = AutoModelForCausalLM.from_pretrained(
            source_of(model),
            dtype=DTYPES[dtype],
            trust_remote_code=False,
            output_loading_info=True,
        )
        if lost := sorted(found["missing_keys"]):
            # transformers would go on with random weights in their place.
            raise ValueError(f"{len(lost)} tensors are missing, {lost[0]} among them")
    use_blocked_attention(loaded)
    return loaded.to(device).eval()


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the decoder blocks by qualified name, in order.

    Raises:
        ValueError: If the architecture is not supported.
    """
    path = _blocks_path(model.config)
    return {f"{path}.{i}": block for i, block in enumerate(model.get_submodule(path))}


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the prunable layers by qualified name, in block order.

    These are the linear layers inside the decoder blocks: never embeddings, norms or the head.
    """
    return {
        f"{block_name}.{name}": module
        for block_name, block in decoder_blocks(model).items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


@torch.no_grad()
def block_inputs(
    model: PreTrainedModel, windows: Tensor
) -> tuple[list[Tensor], list[list[BlockCall]]]:
    """Run the model on windows and return what its blocks were called with.

    Args:
        windows: Token ids, (N, T).

    Returns:
        The N hidden states that enter the first block, each (1, T, hidden_size), and for each
        window the call of every block. Masks and position embeddings are shared, not copied.
    """
    hidden: list[Tensor] = []
    calls: list[list[BlockCall]] = []

    def capture(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not calls[-1]:
            hidden.append(arguments[0])
        calls[-1].append(BlockCall(arguments[1:], keywords))

    blocks = decoder_blocks(model).values()
    handles = [block.register_forward_pre_hook(capture, with_kwargs=True) for block in blocks]
    try:
        for window in windows.to(model.device):
            calls.append([])
            model.base_model(input_ids=window[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return hidden, calls


def _blocks_path(config: PretrainedConfig) -> str:
    if config.model_type not in _BLOCKS:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported: it must be one of "
            f"{', '.join(sorted(_BLOCKS))}"
        )
    return _BLOCKS[config.model_type]


@contextmanager
def _one_line_errors(model: str) -> Iterator[None]:
    """Turn transformers' paragraphs about a missing model into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model {model!r} cannot be loaded: give {EMBEDDED!r}, a Hugging Face folder, or a "
            f"hub id where the hub can be reached ({reason})"
        ) from error
