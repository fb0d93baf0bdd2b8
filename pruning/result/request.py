"""What a pruning request asks of a model, checked before its weights are loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pruning.checkpoint import Checkpoint
from pruning.masks import Target, group_of, parse_pattern
from pruning.metric_file import ResolvedMetric
from pruning.models import (
    DTYPES,
    EMBEDDED,
    load_config,
    load_tokenizer,
    pinned,
    skeleton,
    source_of,
)
from pruning.names import split_revision

SPARSITY = 0.5
"""Fraction to remove where nothing else is said."""

SEQLEN = 512
"""Tokens of a window where nothing else is said and the model's context is no shorter."""

OWN = {EMBEDDED: ("float32", 256)}
"""Dtype and window of a model where nothing else is said: those of its published figures."""

SPARSITY_TOLERANCE = 1e-3
"""How exactly a sparsity must repeat what n:m implies: 0.667 may stand for 1 - 1/3."""

DEVICE_TYPES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class Subject:
    """A model whose weights are not loaded yet.

    Attributes:
        model: `embedded`, a folder, or a hub id with the commit: `owner/name@commit`.
        config: Its config, of a supported family.
        tokenizer: A Hugging Face tokenizer.
        dtype: Of the passes, a key of `DTYPES`; the result keeps the files' own.
        device: A torch device that is there.
        seqlen: Window length in tokens, within the model's context.
        own_dtype: The dtype that its config names.
    """

    model: str
    config: PretrainedConfig
    tokenizer: Any
    dtype: str
    device: str
    seqlen: int
    own_dtype: str


def resolve_target(
    pattern: str, sparsity: float | None, group: str | None, own_group: str
) -> Target:
    """Return what to remove.

    Args:
        pattern: `unstructured` or n:m.
        sparsity: Fraction to remove; None for `SPARSITY`, or what n:m implies.
        group: Comparison group; None for the metric's own.
        own_group: The group that belongs to the metric.

    Raises:
        ValueError: If one breaks its rule, the sparsity is not 1 - n/m, or a group is given
            beside n:m, which has its own.
    """
    parsed = parse_pattern(pattern)
    if parsed is None:
        fraction = SPARSITY if sparsity is None else sparsity
        return Target(fraction, group_of(own_group if group is None else group))
    implied = parsed.implied_sparsity
    if group is not None:
        raise ValueError(
            f"group must be left out with pattern {pattern}, whose weights compete within every "
            f"{parsed.length} inputs; got {group!r}"
        )
    if sparsity is not None and not math.isclose(sparsity, implied, abs_tol=SPARSITY_TOLERANCE):
        raise ValueError(
            f"sparsity must be {implied:g} with pattern {pattern}, or left out; got {sparsity}"
        )
    return Target(implied, parsed)


def resolve_subject(model: str, dtype: str, device: str | None, seqlen: int | None) -> Subject:
    """Load a model's config and tokenizer, and fill in what the request leaves open.

    Args:
        model: As for `load_config`; without a commit, a hub id gets the one it is at.
        dtype: A key of `DTYPES`, or `auto` for the model's in `OWN`, else the config's, or float32
            if it names none or the CPU is slow at it.
        device: None for the first GPU if there is one, otherwise the CPU.
        seqlen: Window length in tokens; None for the model's in `OWN`, else `SEQLEN`; never more
            than the context.

    Raises:
        ValueError: If there is no such model or device, the model is quantized or its family is
            not supported, or `dtype` or `seqlen` breaks its rule.
    """
    device = _resolve_device(device)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}; got {dtype!r}")
    model = pinned(model)
    config = load_config(model)
    text_config = config.get_text_config()
    own_dtype = _own_dtype(model, config)
    of_model = OWN.get(model, (_quick_dtype(own_dtype, device), SEQLEN))
    if dtype == "auto":
        dtype = of_model[0]
    longest = getattr(text_config, "max_position_embeddings", None) or seqlen or SEQLEN
    if seqlen is not None and not 2 <= seqlen <= longest:
        raise ValueError(f"seqlen must be 2 to {longest}, the model's context; got {seqlen}")
    length = min(of_model[1], longest) if seqlen is None else seqlen
    return Subject(model, config, load_tokenizer(model), dtype, device, length, own_dtype)


def shapes_of(subject: Subject) -> PreTrainedModel:
    """Return the subject's model with shapes and no values."""
    return skeleton(subject.config, DTYPES[subject.dtype])


def size_of(subject: Subject, shapes: PreTrainedModel) -> int:
    """Return the bytes of the subject's files; of a hub's model, what its shapes let expect."""
    source = Path(source_of(subject.model)[0])
    if source.is_dir():
        return Checkpoint(source).size
    weights = sum(weight.numel() for weight in shapes.parameters())
    return int(weights * DTYPES[subject.own_dtype].itemsize)


def make_recipe(
    subject: Subject,
    chosen: ResolvedMetric,
    target: Target,
    propagation: str,
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return all that is needed to prune so again, JSON-able, under the command line's names.

    Args:
        calibration: Provenance of the calibration windows; None if none were read.
    """
    model, revision = split_revision(subject.model)
    return {
        "model": model,
        "revision": revision,
        "metric": chosen.criterion.text,
        "tree": chosen.criterion.metric.to_release_json(),
        "metric_source": chosen.source,
        "group": target.group_name,
        "pattern": target.pattern_text,
        "sparsity": target.sparsity,
        "propagation": propagation,
        "calibration": dict(calibration) if calibration else None,
        "dtype": subject.dtype,
        "device": subject.device,
    }


def _own_dtype(model: str, config: PretrainedConfig) -> str:
    """Return the dtype that a model's config names; float32 if it names none."""
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
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
