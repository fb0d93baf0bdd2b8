"""Models: load, decoder blocks, linear layers, published names; the only file that knows families.

A family is recognized by its config's `model_type`, never by a path.
"""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import DEFAULT_REVISION
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

EMBEDDED = "embedded"
"""Name of the tiny LLaMA that ships in this package."""

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
"""Owner and name, and perhaps a branch, tag or commit: `owner/name@revision`. The hub's models
without an owner are of no family that is supported."""

_CONFIG = "config.json"

_HUB_SECONDS = 5.0
"""How long the Hugging Face hub may take to answer."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Family:
    """What must be known about a `model_type`.

    Attributes:
        blocks: Path of the list of decoder blocks in the model.
        published: Prefixes of parameters that have other names in published files: (name in the
            model, published name).
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


def comes_from_hub(model: str) -> bool:
    """Return whether a model must come from the hub: owner/name, or owner/name@revision.

    Raises:
        ValueError: If it is neither `embedded`, nor a folder, nor called so.
    """
    if model == EMBEDDED or _is_folder(model):
        return False
    if HUB_ID.fullmatch(model) and not Path(model).exists():
        return True
    near = difflib.get_close_matches(model[:40].lower(), [EMBEDDED])
    guess = f"did you mean {EMBEDDED}? or " if near else ""
    raise ValueError(
        f"model {model[:200]!r} is no folder: {guess}give {EMBEDDED}, a folder or a hub id"
    )


def _is_folder(model: str) -> bool:
    try:
        return bool(model) and Path(model).is_dir()
    except OSError:
        return False  # no file system accepts the name


def split_revision(model: str) -> tuple[str, str | None]:
    """Return the id and the revision of a hub model; any other name as it is, and None."""
    parts = HUB_ID.fullmatch(model)
    return (parts[1], parts[2]) if parts and not Path(model).exists() else (model, None)


def with_revision(model: str, revision: str | None) -> str:
    """Return a hub model's name at a revision; the name as it is for None."""
    return f"{model}@{revision}" if revision else model


def source_of(model: str) -> tuple[str, str]:
    """Return what transformers loads for a model's name: a folder or hub id, and its revision."""
    if model == EMBEDDED:
        return str(Path(__file__).parent / "embedded"), DEFAULT_REVISION
    name, revision = split_revision(model)
    return name, revision or DEFAULT_REVISION


def load_config(model: str) -> PretrainedConfig:
    """Load a model's config; check that the model can be pruned and that its folder is whole.

    Args:
        model: `embedded`, a folder, or a hub id with or without `@revision`.

    Raises:
        ValueError: If there is no such model, its architecture is not supported, it is quantized,
            or its files lack a tensor or have one of another shape than the config says.
    """
    config = read_config(model)
    folder = Path(source_of(model)[0])
    # A folder of the config alone is enough to plan with.
    if folder.is_dir() and (any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin"))):
        published_tensors(model, skeleton(config, torch.float32), Checkpoint(folder).entries)
    return config


def read_config(model: str) -> PretrainedConfig:
    """Return a model's config; raises as `load_config`, but looks at no weights."""
    source, revision = source_of(model)
    if comes_from_hub(model) and cached_config(model) is None:
        with one_line_errors(model):
            # Fails at once where transformers would try again for half a minute.
            HfApi().model_info(source, revision=revision, timeout=_HUB_SECONDS)
    with one_line_errors(model), _unlogged():
        settings = dict(PretrainedConfig.get_config_dict(source, revision=revision)[0])
    if "model_type" in settings:
        _family(settings["model_type"])  # before transformers reads what it may not know
    if settings.get("quantization_config"):
        raise ValueError(f"model {model!r} is quantized: give the one that it was made from")
    with one_line_errors(model), _unlogged():
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    if config._attn_implementation not in (None, "eager", "sdpa"):
        # transformers would look up a name with a slash on the hub, and run its code.
        raise ValueError(
            f"model {model!r} cannot be loaded: {_CONFIG}: attn_implementation must be eager or "
            f"sdpa, got {config._attn_implementation!r:.60}"
        )
    return config


def pinned(model: str) -> str:
    """Return a hub model's name with the commit that its revision is at; other names as they are.

    Raises:
        ValueError: As `load_config`, which downloads the config of a model from the hub.
    """
    if not comes_from_hub(model):
        return model
    load_config(model)
    cached = cached_config(model)
    return with_revision(source_of(model)[0], cached.parent.name) if cached else model


def cached_config(model: str) -> Path | None:
    """Return a hub model's config in the hub's cache; None if it is not there."""
    source, revision = source_of(model)
    file = try_to_load_from_cache(source, _CONFIG, revision=revision)
    return Path(file) if isinstance(file, str) else None


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; see `load_config`.

    Raises:
        ValueError: If there is none, or it has more tokens than the model.
    """
    vocabulary = read_config(model).get_text_config().vocab_size
    source, revision = source_of(model)
    with one_line_errors(model):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
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
        model: As for `load_config`.
        dtype: A key of `DTYPES`.
        device: A torch device.

    Raises:
        ValueError: If there is no such model, its architecture is not supported, or a tensor is
            missing, torn or of the wrong shape.
    """
    load_config(model)
    source, revision = source_of(model)
    with one_line_errors(model):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
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
    """Return the names that a parameter may have in published files, likeliest first.

    Besides the family's renames there are files of the base model alone, without `model.`.
    """
    renamed = [
        published + name.removeprefix(ours)
        for ours, published in family_of(config).published
        if name.startswith(ours)
    ]
    return [*renamed, name, name.removeprefix("model.")]


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with everything but its parameters, which are on the meta device.

    Buffers, such as the frequencies of position embeddings, are real, as no file holds them.
    """
    with one_line_errors(config.name_or_path), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()  # what puts parameters on the meta device has torn them apart
    use_blocked_attention(model)
    return model.requires_grad_(False).eval()


def outside_blocks(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the text model's parameters outside the blocks: embeddings, norms, head."""
    path = family_of(model.config).blocks
    text = path.rpartition(".")[0]
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{path}.")
        and (name.startswith(f"{text}.") or id(parameter) in head)
    }


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
    parameters = dict(model.named_parameters(remove_duplicate=False))
    path = family_of(model.config).blocks
    blocks = {parameter for parameter in parameters if parameter.startswith(f"{path}.")}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    published = {}
    for parameter, weight in parameters.items():
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
    needed = blocks | (set(outside_blocks(model)) - set(tied))
    if missing := [parameter for parameter in parameters if parameter in needed - set(published)]:
        raise ValueError(
            f"model {name!r} cannot be loaded: {len(missing)} tensors are missing, "
            f"{missing[0]} among them"
        )
    return published


def family_of(config: PretrainedConfig) -> Family:
    """Return a config's family; raises ValueError if it is not supported."""
    return _family(config.model_type)


def _family(kind: object) -> Family:
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r:.60} is not supported: it must be one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]


@contextmanager
def _unlogged() -> Iterator[None]:
    """Silence transformers, which prints the whole config when it refuses a setting."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def one_line_errors(model: str) -> Iterator[None]:
    """Turn transformers' paragraphs about a missing or malformed model into one line.

    Settings of the wrong type can end in any exception, and tokenizers raises `Exception` itself.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model {model!r} cannot be loaded: give {EMBEDDED!r}, a Hugging Face folder, or a "
            f"hub id where the hub can be reached ({reason})"
        ) from error
