"""Models: resolve, load, decoder blocks, linear layers; the only file that asks the hub.

A `model` is `embedded`, a folder, or a hub id, `owner/name` or `owner/name@revision`; a `dtype` is
a key of `DTYPES`. A model that is not there, not supported or damaged is a ValueError of one line.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeGuard

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from prunevolve.pruning.attention import use_blocked_attention
from prunevolve.pruning.checkpoint import Checkpoint, files_beside
from prunevolve.pruning.json_file import read_object
from prunevolve.pruning.model_name import EMBEDDED, hub_id

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The supported architectures by `model_type`; a new one is a name here and a toy in the tests.
FAMILIES = ["gemma2", "gemma3", "gemma3_text", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"]

_SKIPPED = "prunevolve_skipped"  # an attribute of layers that stay as they are


@dataclass(frozen=True)
class UnloadedModel:
    """A model whose weights are not loaded yet."""

    name: str  # `embedded`, a folder, or a hub id with the commit: `owner/name@commit`
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: str  # of the passes; a result keeps the files' own
    why_dtype: str  # instead of its config's; empty if it is that, or was asked for
    own_dtype: str  # that its config names; float32 if it names none
    device: str
    seqlen: int  # window length in tokens, within the model's context

    @cached_property
    def shapes(self) -> PreTrainedModel:
        """The model with shapes and no values."""
        return skeleton(self.config, DTYPES[self.dtype])

    @property
    def file_size(self) -> int:
        """Bytes that the model's files take, its weights in the dtype that its config names."""
        weights = sum(weight.numel() for weight in self.shapes.parameters())
        folder = Path(self.config.name_or_path)
        beside = sum(path.stat().st_size for path in files_beside(folder))
        return int(weights * DTYPES[self.own_dtype].itemsize + beside)

    def open(self) -> Checkpoint:
        """Return the model's files; those from the hub are downloaded."""
        return Checkpoint(find_model(self.name, weights=True))


def resolve_model(
    model: str,
    dtype: str = "auto",
    device: str | None = None,
    seqlen: int | None = None,
    revision: str | None = None,
    gradients: bool = False,
) -> UnloadedModel:
    """Load a model's config and tokenizer, and fill in what is left open.

    A hub id without a commit or revision gets the one it is at. The dtype `auto` is the config's,
    or what suits the device, and gradients if there are any, better; the device is the first GPU if
    there is one; a window has 512 tokens, or those of a shorter context. The embedded model's
    figures are those of windows of 256.
    """
    device = _usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}; got {dtype!r}")
    if revision and not hub_id(model):
        raise ValueError(f"revision must be left out for a model that is here, got {revision!r}")
    asked = f"{model}@{revision}" if revision else model
    config, on_hub = load_config(asked), hub_id(asked)
    name = f"{on_hub[0]}@{Path(config.name_or_path).name}" if on_hub else asked
    context = config.get_text_config().max_position_embeddings
    if seqlen is not None and not 2 <= seqlen <= context:
        raise ValueError(f"seqlen must be 2 to {context}, the model's context; got {seqlen}")
    own_dtype = str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")
    own_dtype, why_dtype = own_dtype if own_dtype in DTYPES else "float32", ""
    if dtype == "auto":
        dtype, why_dtype = _suited(own_dtype, device, gradients)
    seqlen = seqlen or min(256 if name == EMBEDDED else 512, context)
    tokenizer = load_tokenizer(name, config)
    return UnloadedModel(name, config, tokenizer, dtype, why_dtype, own_dtype, device, seqlen)


def _suited(own: str, device: str, gradients: bool) -> tuple[str, str]:
    """Return the dtype for passes over a model, and why it is not the model's own."""
    dtype, reasons = own, []
    if gradients and own == "float16":
        dtype, reasons = "bfloat16", ["float16 is too narrow for gradients"]
    # Without instructions for it a matrix product in half precision takes a hundred times as long.
    fast: dict[str, Callable[[], object]] = {
        "cpu bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "cpu float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
        "cuda bfloat16": partial(torch.cuda.is_bf16_supported, including_emulation=False),
    }
    if not fast.get(f"{torch.device(device).type} {dtype}", lambda: True)():
        reasons.append(f"device {device} has no fast arithmetic for {dtype}")
        dtype = "float32"
    return dtype, " and ".join(reasons)


def _usable_device(device: str) -> str:
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # which one depends on how torch was built
        cause = str(error).partition("\n")[0][:100]
        raise ValueError(f"device {device!r} cannot be used ({cause}): give cpu") from error
    return device


def find_model(model: str, weights: bool = False) -> Path:
    """Return a model's folder; of a hub's model what is not local is downloaded."""
    on_hub = hub_id(model)
    if on_hub is None:
        return Path(__file__).parent / EMBEDDED if model == EMBEDDED else Path(model)
    repository, revision = on_hub
    files = ["*.json", "*.jinja", "*.model", "*.txt", *["*.safetensors"] * weights]
    others = ["*/*", "consolidated*"]  # weights in other formats
    with one_line_errors(model):
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=files, ignore_patterns=others
        )
    return Path(folder)


def pinned(model: str) -> str:
    """Return a hub model's name with the commit that it is at; other names as they are."""
    on_hub = hub_id(model)
    return f"{on_hub[0]}@{find_model(model).name}" if on_hub else model


def load_config(model: str) -> PretrainedConfig:
    """Load a model's config; check that the model can be pruned, and the weights that are here."""
    folder = find_model(model)
    with one_line_errors(model):
        settings = read_object(folder / "config.json")
        _check_family(settings.get("model_type"))  # before transformers reads what it may not know
        if settings.get("quantization_config"):
            raise ValueError("it is quantized: give the one that it was made from")
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        attention = config._attn_implementation
        if attention not in (None, "eager", "sdpa"):
            # transformers would look up a name with a slash on the hub, and run its code.
            raise ValueError(f"attn_implementation must be eager or sdpa, got {attention!r:.60}")
    weights = any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin"))
    if weights and not hub_id(model):
        checkpoint, shapes = Checkpoint(folder), skeleton(config, torch.float32)
        with one_line_errors(model):
            checkpoint.published(shapes)
    return config


def load_tokenizer(model: str, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; refuse another model's, with more tokens."""
    config = config or load_config(model)
    vocabulary = config.get_text_config().vocab_size
    with one_line_errors(model):
        folder = Path(config.name_or_path)
        patterns = ("*token*", "*vocab*", "*.model")
        if folder.is_dir() and not any(any(folder.glob(x)) for x in patterns):
            raise ValueError("it has no tokenizer.json: copy the dense model's beside the weights")
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path, trust_remote_code=False)
        size = tokenizer.vocab_size  # without added tokens, which no text is tokenized to
        if size > vocabulary:
            rule = f"its tokenizer must stay below the model's vocab_size of {vocabulary}"
            raise ValueError(f"{rule}, got token {size - 1}")
    return tokenizer


def load_model(model: str, dtype: str, device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model for evaluation."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    device = _usable_device(device)
    folder = find_model(model, weights=True)
    load_config(model)
    with one_line_errors(model):
        safe = {"trust_remote_code": False, "use_safetensors": True}
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, **safe
        )
        if lost := sorted(report["missing_keys"]):
            # transformers would continue with random weights instead.
            raise ValueError(f"{len(lost)} tensors are missing, {lost[0]} among them")
    use_blocked_attention(loaded)
    return loaded.to(device).eval()


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with its parameters on the meta device; buffers, in no file, are real."""
    with one_line_errors(config.name_or_path), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        module._is_hf_initialized = False
    model.initialize_weights()  # fills these buffers; on the meta device it does nothing
    use_blocked_attention(model)
    return model.requires_grad_(False).eval()


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the decoder blocks by qualified name, in order."""
    _check_family(model.config.model_type)
    blocks = model.get_decoder().layers
    path = next(name for name, module in model.named_modules() if module is blocks)
    return {f"{path}.{i}": block for i, block in enumerate(blocks)}


def layers_by_block(model: PreTrainedModel) -> dict[str, dict[str, nn.Linear]]:
    """Return the prunable layers by block and name, in order: the linear ones in decoder blocks,
    without those that `skip` took out.
    """
    return {
        name: {x: y for x, y in block.named_modules(prefix=name) if _is_prunable(y)}
        for name, block in decoder_blocks(model).items()
    }


def _is_prunable(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and not hasattr(module, _SKIPPED)


def skip(model: PreTrainedModel, pattern: str | None) -> None:
    """Take layers in whose names a regular expression is found out of the prunable ones.

    None puts all back. Raises ValueError if it is found in no layer or in all.
    """
    for module in model.modules():
        module.__dict__.pop(_SKIPPED, None)
    if pattern is None:
        return
    names = [*linear_layers(model)]
    found = [name for name in names if re.search(pattern, name)]
    if len(found) in (0, len(names)):
        rule = f"found in some layers' names, not in all, such as {names[0]}"
        raise ValueError(f"skip must be {rule}; got {pattern!r}, in {len(found)}")
    for name in found:
        setattr(model.get_submodule(name), _SKIPPED, True)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the prunable layers of all blocks by qualified name, in order."""
    of_blocks = layers_by_block(model).values()
    return {name: layer for of_block in of_blocks for name, layer in of_block.items()}


def shapes_of(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the shapes of the prunable layers' weights by qualified name, in order."""
    return {name: layer.weight.shape for name, layer in linear_layers(model).items()}


def width_key(config: PretrainedConfig) -> str:
    """Return how a config calls the neurons of each MLP."""
    return "ffn_dim" if hasattr(config.get_text_config(), "ffn_dim") else "intermediate_size"


def narrowed_config(config: PretrainedConfig, width: int) -> PretrainedConfig:
    """Return a config of the same model with other numbers of neurons."""
    config = copy.deepcopy(config)
    setattr(config.get_text_config(), width_key(config), width)
    return config


def _check_family(kind: object) -> None:
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type {kind!r:.60} is not supported: it must be one of {supported}")


@contextmanager
def one_line_errors(model: str) -> Iterator[None]:
    """Turn paragraphs of transformers and the hub about a model into one line."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it prints the whole config when it refuses a setting
    try:
        yield
    except Exception as error:  # a setting of the wrong type can end in any
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model {model!r} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(before)
