"""What a pruning request asks of a model, checked before its weights are loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from pruning.masks import Target, group_of, parse_pattern
from pruning.metric_file import ResolvedMetric
from pruning.models import DTYPES, linear_layers, load_config, load_tokenizer
from pruning.pruner import check_pattern

SPARSITY = 0.5
"""Fraction to remove where nothing else is said."""

SEQLEN = 512
"""Tokens of a window where nothing else is said and the model's context is no shorter."""

SPARSITY_TOLERANCE = 1e-3
"""How exactly a sparsity must repeat what n:m implies: 0.667 may stand for 1 - 1/3."""

DEVICE_TYPES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class Subject:
    """A model whose weights are not loaded yet.

    Attributes:
        model: `embedded`, a folder or a hub id.
        config: Its config, of a supported family.
        tokenizer: A Hugging Face tokenizer.
        dtype: Of the weights, a key of `DTYPES`.
        device: A torch device that is there.
        seqlen: Window length in tokens, within the model's context.
    """

    model: str
    config: PretrainedConfig
    tokenizer: Any
    dtype: str
    device: str
    seqlen: int


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
        dtype: A key of `DTYPES`, or `auto` for the config's own (float32 if it names none).
        device: None for the first GPU if there is one, otherwise the CPU.
        seqlen: Window length in tokens; None for `SEQLEN`, or the context if that is shorter.

    Raises:
        ValueError: If there is no such model or device, the model is quantized or its family is
            not supported, or `dtype` or `seqlen` breaks its rule.
    """
    device = _resolve_device(device)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}; got {dtype!r}")
    config = load_config(model)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"model {model!r} is quantized: give the one that it was made from")
    text_config = config.get_text_config()
    if dtype == "auto":
        own = getattr(config, "dtype", None) or getattr(text_config, "dtype", None) or "float32"
        dtype = str(own).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(
                f"dtype of model {model!r} is {dtype}: choose one of {', '.join(DTYPES)}"
            )
    longest = getattr(text_config, "max_position_embeddings", None) or seqlen or SEQLEN
    if seqlen is not None and not 2 <= seqlen <= longest:
        raise ValueError(f"seqlen must be 2 to {longest}, the model's context; got {seqlen}")
    length = min(SEQLEN, longest) if seqlen is None else seqlen
    return Subject(model, config, load_tokenizer(model), dtype, device, length)


def check_layers(subject: Subject, target: Target) -> int:
    """Check that n:m divides every layer, on a copy of the model that has shapes and no values.

    Returns:
        Size of the model in bytes at the subject's dtype.

    Raises:
        ValueError: If a layer's inputs are no multiple of the pattern's length.
    """
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(subject.config)
    check_pattern(linear_layers(shapes), target)
    size = sum(weight.numel() for weight in shapes.parameters())
    return size * DTYPES[subject.dtype].itemsize


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
    return {
        "model": subject.model,
        "revision": getattr(subject.config, "_commit_hash", None),  # of a model from the hub
        "metric": chosen.metric.text,
        "tree": chosen.metric.to_release_json(),
        "metric_source": chosen.source,
        "group": target.group_name,
        "pattern": target.pattern_text,
        "sparsity": target.sparsity,
        "propagation": propagation,
        "calibration": dict(calibration) if calibration else None,
        "dtype": subject.dtype,
        "device": subject.device,
    }


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
