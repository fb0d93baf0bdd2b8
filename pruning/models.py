"""Models: load, decoder blocks, linear layers, block inputs; the only file that knows families.

A family is told by its config's `model_type`, never by a path. Everything that a block is called
with is captured as it comes, so that a new keyword of transformers needs no change here.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
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

HEAD_TOKENS = 256
"""Positions whose logits exist at one time: those of a window over a large vocabulary dwarf all."""


@dataclass(frozen=True)
class Family:
    """What must be known of a `model_type`.

    Attributes:
        blocks: Path of the list of decoder blocks in the model.
        published: Prefixes of parameters whose published names differ: (ours, published).
    """

    blocks: str = "model.layers"
    published: tuple[tuple[str, str], ...] = ()


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "gemma3": Family(
        "model.language_model.layers",
        (
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("lm_head.", "language_model.lm_head."),
        ),
    ),
    "phi3": Family(),
    "opt": Family("model.decoder.layers"),
}
"""The supported architectures by `model_type`; a new one is a row here and a toy in the tests."""


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
    with one_line_errors(model):
        config = AutoConfig.from_pretrained(source_of(model), trust_remote_code=False)
    family_of(config)
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; raises ValueError if there is none."""
    with one_line_errors(model):
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
    with one_line_errors(model):
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


def with_weights(
    config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Tensor], device: str = "cpu"
) -> PreTrainedModel:
    """Make a model of its config and its tensors, which it looks at without a copy on the CPU.

    Args:
        config: As `PretrainedConfig.to_dict` writes it.
        dtype: Of the tensors, a key of `DTYPES`.
        tensors: As `state_dict` names them, tied ones perhaps once.
        device: A torch device.
    """
    model = skeleton(AutoConfig.for_model(**config), DTYPES[dtype])
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model.to(device).eval()


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the decoder blocks by qualified name, in order.

    Raises:
        ValueError: If the architecture is not supported.
    """
    path = family_of(model.config).blocks
    return {f"{path}.{i}": block for i, block in enumerate(model.get_submodule(path))}


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the prunable layers by qualified name, in block order.

    These are the linear layers inside the decoder blocks: never embeddings, norms or the head.
    """
    layers: dict[str, nn.Linear] = {}
    for name, block in decoder_blocks(model).items():
        layers |= layers_of_block(name, block)
    return layers


def layers_of_block(name: str, block: nn.Module) -> dict[str, nn.Linear]:
    """Return one decoder block's prunable layers by qualified name, in order."""
    return {
        f"{name}.{inner}": module
        for inner, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def published_names(config: PretrainedConfig, name: str) -> list[str]:
    """Return the names under which a parameter may stand in published files, likeliest first.

    Besides the family's own renames there are files of the base model alone, without `model.`.
    """
    renamed = [
        published + name.removeprefix(ours)
        for ours, published in family_of(config).published
        if name.startswith(ours)
    ]
    return [*renamed, name, name.removeprefix("model.")]


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with everything but its parameters, which are on the meta device.

    Buffers, such as the frequencies of position embeddings, are real: no file holds them.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    use_blocked_attention(model)
    return model.requires_grad_(False).eval()


def outside_blocks(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of the text model that are in no block: embeddings, norms, head."""
    path = family_of(model.config).blocks
    text = path.rpartition(".")[0]
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{path}.")
        and (name.startswith(f"{text}.") or id(parameter) in head)
    }


@torch.no_grad()
def block_inputs(model: PreTrainedModel, windows: Tensor) -> tuple[list[Tensor], list[BlockCall]]:
    """Return what the decoder blocks of a model are called with on windows.

    No block runs: a stub stands in each one's place.

    Args:
        windows: Token ids, (N, T), on the model's device.

    Returns:
        The N hidden states that enter the first block, each (1, T, hidden_size), and the call of
        every block. Without padding that call depends on the windows' length alone.
    """
    hidden: list[Tensor] = []
    stubs = [_Stub() for _ in decoder_blocks(model)]
    with _in_place_of_blocks(model, stubs):
        for window in windows:
            model.base_model(input_ids=window[None], use_cache=False)
            hidden.append(stubs[0].hidden)
    return hidden, [stub.call for stub in stubs if len(windows)]


def final_states(model: PreTrainedModel, window: Tensor, hidden: Tensor) -> Tensor:
    """Return what enters the head, (1, T, hidden_size), from what the last block returned.

    Args:
        window: The token ids, (T,); only their number counts.
        hidden: The last block's output, (1, T, hidden_size). Gradients flow back to it.
    """
    stubs = [_Stub(hidden) for _ in decoder_blocks(model)]
    with _in_place_of_blocks(model, stubs):
        states: Tensor = model.base_model(input_ids=window[None], use_cache=False)[0]
    return states


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the logits, (T, vocabulary) in fp32, of states that enter the head, (T, hidden)."""
    return _capped(model, model.get_output_embeddings()(states).float())


def logits_in_parts(model: PreTrainedModel, states: Tensor) -> Iterator[Tensor]:
    """Yield the logits of states that enter the head, (T, hidden), in order, a few tokens a time.

    Each part is (tokens, vocabulary) in fp32. On the CPU parts are so small that what is done with
    them stays in the cache.
    """
    head = model.get_output_embeddings()
    tokens = 32 if states.device.type == "cpu" else HEAD_TOKENS
    for chunk in states.split(HEAD_TOKENS):
        for part in head(chunk).split(tokens):
            yield _capped(model, part.float())


def _capped(model: PreTrainedModel, logits: Tensor) -> Tensor:
    # As the model's own forward does: Gemma3ForConditionalGeneration ignores its text part's cap.
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def family_of(config: PretrainedConfig) -> Family:
    """Return a config's family; raises ValueError if it is not supported."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported: it must be one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.model_type]


class _Stub(nn.Module):
    """Stands in a decoder block's place: keeps its call, returns its input or what it was given."""

    def __init__(self, returned: Tensor | None = None) -> None:
        super().__init__()
        self._returned = returned

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self.hidden, self.call = hidden, BlockCall(arguments, keywords)
        return hidden if self._returned is None else self._returned


@contextmanager
def _in_place_of_blocks(model: PreTrainedModel, stubs: Sequence[nn.Module]) -> Iterator[None]:
    blocks = model.get_submodule(family_of(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    real = list(blocks)
    try:
        for i, stub in enumerate(stubs):
            blocks[i] = stub
        yield
    finally:
        for i, block in enumerate(real):
            blocks[i] = block


@contextmanager
def one_line_errors(model: str) -> Iterator[None]:
    """Turn transformers' paragraphs about a missing model into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model {model!r} cannot be loaded: give {EMBEDDED!r}, a Hugging Face folder, or a "
            f"hub id where the hub can be reached ({reason})"
        ) from error
