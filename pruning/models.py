"""Models: find, load, decoder blocks, linear layers, published names; the only file that knows
families and the hub.

A model is `embedded`, a folder, or a hub id, which stands for a folder of the hub's cache. A family
is recognized by its config's `model_type`, never by a path.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from prunevolve.pruning.attention import use_blocked_attention
from prunevolve.pruning.checkpoint import Checkpoint, Entry
from prunevolve.pruning.json_file import read_object

EMBEDDED = "embedded"
"""Name of the tiny LLaMA that ships in this package."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FAMILIES = {
    "gemma2",
    "gemma3",
    "gemma3_text",
    "llama",
    "mistral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
}
"""The supported architectures by `model_type`; a new one is a name here and a toy in the tests."""

_PUBLISHED = {
    "gemma3": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
}
"""Prefixes of parameters that have other names in published files, by `model_type`: the name in the
model, and the published one."""

_HUB_ID = re.compile(r"((?!models/)[A-Za-z0-9][\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
"""Owner and name, and perhaps a branch, tag or commit: `owner/name@revision`. The hub's models
without an owner are of no family that is supported; `models/` is where `make` builds some."""

_PAPERS = ["*.json", "*.jinja", "*.model", "*.txt"]
"""A model's files but its weights: config, index, tokenizer."""

_NOT_READ = ["*/*", "consolidated*"]
"""Weights in other formats than transformers', in folders or beside its own."""


def hub_id(model: str) -> tuple[str, str | None] | None:
    """Return the id and revision of a model that comes from the hub; None for one that is here.

    Args:
        model: `embedded`, a folder, or a hub id, `owner/name` or `owner/name@revision`.

    Raises:
        ValueError: If it is none of them.
    """
    if model == EMBEDDED or (model and Path(model).is_dir()):
        return None
    if parts := _HUB_ID.fullmatch(model):
        return parts[1], parts[2]
    raise ValueError(f"model {model!r} is no folder: give {EMBEDDED}, a folder or a hub id")


def find_model(model: str, weights: bool = False) -> Path:
    """Return a model's folder; what it lacks of a model from the hub is downloaded.

    Args:
        model: As for `hub_id`.
        weights: Whether a model from the hub needs its weights, too.

    Raises:
        ValueError: If there is no such model, or the hub does not give it and the cache lacks it.
    """
    on_hub = hub_id(model)
    if on_hub is None:
        return Path(__file__).parent / EMBEDDED if model == EMBEDDED else Path(model)
    name, revision = on_hub
    wanted = [*_PAPERS, *(["*.safetensors"] if weights else [])]
    with one_line_errors(model):
        folder = snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns=_NOT_READ
        )
    return Path(folder)


def pinned(model: str) -> str:
    """Return a hub model's name with the commit that its revision is at; other names as they are.

    Raises:
        ValueError: As `find_model`.
    """
    on_hub = hub_id(model)
    return f"{on_hub[0]}@{find_model(model).name}" if on_hub else model


def load_config(model: str) -> PretrainedConfig:
    """Load a model's config; check that the model can be pruned and that its folder is whole.

    Args:
        model: As for `hub_id`; the weights of one from the hub are not looked at.

    Raises:
        ValueError: If there is no such model, its architecture is not supported, it is quantized,
            or its files lack a tensor or have one of another shape than the config says.
    """
    folder = find_model(model)
    config = _read_config(model, folder)
    # A folder of the config alone is enough to plan with.
    weights = any(chain(folder.glob("*.safetensors*"), folder.glob("*.bin")))
    if weights and not hub_id(model):
        published_tensors(model, skeleton(config, torch.float32), Checkpoint(folder).entries)
    return config


def _read_config(model: str, folder: Path) -> PretrainedConfig:
    with one_line_errors(model):
        settings = read_object(folder / "config.json")
    _check_family(settings.get("model_type"))  # before transformers reads what it may not know
    if settings.get("quantization_config"):
        raise ValueError(f"model {model!r} is quantized: give the one that it was made from")
    with one_line_errors(model):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config._attn_implementation not in (None, "eager", "sdpa"):
            # transformers would look up a name with a slash on the hub, and run its code.
            raise ValueError(
                "attn_implementation must be eager or sdpa, got "
                f"{config._attn_implementation!r:.60}"
            )
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; see `load_config`.

    Raises:
        ValueError: If there is none, or it has more tokens than the model.
    """
    folder = find_model(model)
    vocabulary = _read_config(model, folder).get_text_config().vocab_size
    with one_line_errors(model):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    size = tokenizer.vocab_size  # without added tokens, which no text is tokenized to
    if size > vocabulary:
        raise ValueError(
            f"model {model!r} cannot be loaded: its tokenizer must stay below the model's "
            f"vocab_size of {vocabulary}, got token {size - 1}: it belongs to another model"
        )
    return tokenizer


def load_model(model: str, dtype: str, device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model for evaluation.

    Args:
        model: As for `hub_id`.
        dtype: A key of `DTYPES`.
        device: A torch device.

    Raises:
        ValueError: If there is no such model, its architecture is not supported, or a tensor is
            missing, torn or of the wrong shape.
    """
    folder = find_model(model, weights=True)
    _read_config(model, folder)
    with one_line_errors(model):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        if lost := sorted(report["missing_keys"]):
            # transformers would continue with random weights instead.
            raise ValueError(f"{len(lost)} tensors are missing, {lost[0]} among them")
    use_blocked_attention(loaded)
    return loaded.to(device).eval()


def with_weights(
    config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Tensor], device: str = "cpu"
) -> PreTrainedModel:
    """Build a model from its config and its tensors, which are not copied on the CPU.

    Args:
        config: As `PretrainedConfig.to_dict` writes it.
        dtype: The tensors' dtype, a key of `DTYPES`.
        tensors: Named as in `state_dict`; of tied ones, one is enough.
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
    _check_family(model.config.model_type)
    blocks = model.get_decoder().layers
    path = next(name for name, module in model.named_modules() if module is blocks)
    return {f"{path}.{i}": block for i, block in enumerate(blocks)}


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
    """Return the names that a parameter may have in published files, likeliest first.

    Besides the family's renames there are files of the base model alone, without `model.`.
    """
    renamed = [
        published + name.removeprefix(ours)
        for ours, published in _PUBLISHED.get(config.model_type, {}).items()
        if name.startswith(ours)
    ]
    return [*renamed, name, name.removeprefix("model.")]


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with everything but its parameters, which are on the meta device.

    Buffers, such as the frequencies of position embeddings, are real, as no file holds them.
    """
    with one_line_errors(config.name_or_path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        module._is_hf_initialized = False
    model.initialize_weights()  # fills these buffers; on the meta device it does nothing
    use_blocked_attention(model)
    return model.requires_grad_(False).eval()


def outside_blocks(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the text model's parameters outside the blocks: embeddings, norms, head."""
    inside = {id(parameter) for parameter in model.get_decoder().layers.parameters()}
    return {name: p for name, p in _text_parameters(model).items() if id(p) not in inside}


def _text_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters without those that look at images, tied ones by each of their names."""
    parts = model.get_decoder(), model.get_output_embeddings()
    text = {id(parameter) for part in parts for parameter in part.parameters()}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in parameters if id(parameter) in text}


def published_tensors(
    name: str, model: PreTrainedModel, entries: Mapping[str, Entry]
) -> dict[str, str]:
    """Return the published name of each parameter that files have.

    Args:
        name: The model's name in an error.
        model: A skeleton.
        entries: The files' entries, by published name.

    Raises:
        ValueError: If a tensor of the text model is missing that is not tied to another, or one
            has another shape than the model's.
    """
    published = {}
    for parameter, weight in model.named_parameters(remove_duplicate=False):
        candidates = published_names(model.config, parameter)
        tensor = next((candidate for candidate in candidates if candidate in entries), None)
        if tensor is None:
            continue
        if entries[tensor].shape != tuple(weight.shape):
            raise ValueError(
                f"model {name!r} cannot be loaded: {tensor} must have shape "
                f"{tuple(weight.shape)} by its config, got {entries[tensor].shape}"
            )
        published[parameter] = tensor
    present = {*published, *model.all_tied_weights_keys}
    if missing := [parameter for parameter in _text_parameters(model) if parameter not in present]:
        raise ValueError(
            f"model {name!r} cannot be loaded: {len(missing)} tensors are missing, "
            f"{missing[0]} among them"
        )
    return published


def _check_family(kind: object) -> None:
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r:.60} is not supported: it must be one of "
            f"{', '.join(sorted(FAMILIES))}"
        )


@contextmanager
def one_line_errors(model: str) -> Iterator[None]:
    """Turn paragraphs of transformers and the hub about a model into one line.

    Settings of the wrong type can end in any exception, and tokenizers raises `Exception` itself.
    """
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it prints the whole config when it refuses a setting
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model {model!r} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(before)
