"""A model whose weights are not loaded yet: its config and tokenizer, and how it will be run."""

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunevolve.pruning.checkpoint import Checkpoint
from prunevolve.pruning.models import (
    DTYPES,
    EMBEDDED,
    find_model,
    load_config,
    load_tokenizer,
    pinned,
    skeleton,
)

SEQLEN = 512
"""Tokens of a window where nothing else is said and the model's context is no shorter."""

OWN = {EMBEDDED: ("float32", 256)}
"""Dtype and window of a model where nothing else is said: those of its published figures."""

DEVICE_TYPES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class UnloadedModel:
    """A model whose weights are not loaded yet.

    Attributes:
        name: `embedded`, a folder, or a hub id with the commit: `owner/name@commit`.
        config: Its config, of a supported family.
        tokenizer: Its tokenizer.
        dtype: Of the passes, a key of `DTYPES`; a result keeps the files' own.
        own_dtype: The dtype that its config names.
        device: A torch device that is there.
        seqlen: Window length in tokens, within the model's context.
    """

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    own_dtype: str
    device: str
    seqlen: int

    @cached_property
    def shapes(self) -> PreTrainedModel:
        """The model with shapes and no values."""
        return skeleton(self.config, DTYPES[self.dtype])

    @property
    def file_size(self) -> int:
        """Bytes that the model's files take in the dtype that its config names."""
        weights = sum(weight.numel() for weight in self.shapes.parameters())
        return int(weights * DTYPES[self.own_dtype].itemsize)

    def open(self) -> Checkpoint:
        """Return the model's files; those from the hub are downloaded.

        Raises:
            ValueError: As `find_model` and `Checkpoint`.
        """
        return Checkpoint(find_model(self.name, weights=True))


def resolve_model(
    model: str,
    dtype: str = "auto",
    device: str | None = None,
    seqlen: int | None = None,
    revision: str | None = None,
) -> UnloadedModel:
    """Load a model's config and tokenizer, and fill in what is left open.

    Args:
        model: As for `hub_id`; without a commit, a hub id gets the one it is at.
        dtype: A key of `DTYPES`, or `auto` for the model's in `OWN`, else the config's, or float32
            if it names none or the CPU is slow at it.
        device: None for the first GPU if there is one, otherwise the CPU.
        seqlen: Window length in tokens; None for the model's in `OWN`, else `SEQLEN`; never more
            than the context.
        revision: Branch, tag or commit of a model from the hub, if its id has none.

    Raises:
        ValueError: If there is no such model or device, the model is quantized or its family is
            not supported, or `dtype` or `seqlen` breaks its rule.
    """
    device = _resolve_device(device)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}; got {dtype!r}")
    model = pinned(f"{model}@{revision}" if revision else model)
    config = load_config(model)
    own_dtype = _own_dtype(model, config)
    default_dtype, default_length = OWN.get(model, (_quick_dtype(own_dtype, device), SEQLEN))
    context = config.get_text_config().max_position_embeddings
    if seqlen is not None and not 2 <= seqlen <= context:
        raise ValueError(f"seqlen must be 2 to {context}, the model's context; got {seqlen}")
    return UnloadedModel(
        name=model,
        config=config,
        tokenizer=load_tokenizer(model),
        dtype=default_dtype if dtype == "auto" else dtype,
        own_dtype=own_dtype,
        device=device,
        seqlen=min(default_length, context) if seqlen is None else seqlen,
    )


def _own_dtype(model: str, config: PretrainedConfig) -> str:
    """Return the dtype that a model's config names; float32 if it names none."""
    named = config.dtype or config.get_text_config().dtype
    dtype = str(named or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype of model {model!r} is {dtype}: choose one of {', '.join(DTYPES)}")
    return dtype


def _quick_dtype(dtype: str, device: str) -> str:
    """Return a dtype for the passes: float32 where the device has no fast arithmetic for it."""
    if device != "cpu" or dtype == "float32":
        return dtype
    # Without instructions for it a matrix product in half precision takes a hundred times as long.
    fast = {
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if fast[dtype]() else "float32"


def _resolve_device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type not in DEVICE_TYPES:
            raise RuntimeError(f"only {', '.join(DEVICE_TYPES)} are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # Which of the two depends on how torch was built.
        cause = str(error).partition("\n")[0][:100]
        raise ValueError(
            f"device {device!r} cannot be used ({cause}): give cpu, or leave it out"
        ) from error
    return device
