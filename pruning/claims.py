"""What a model's folder claims, checked before transformers reads a file or builds a layer of it.

Its files must be regular files of reasonable length. Its configs must give sizes that a model
can have and torch's own attention, and name no other code or files. The sizes must agree with the
tensors in the files.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from plain_files import check_plain, check_values, open_plain, read_bytes
from pruning.headers import Entry, named_files, read_header, weights_files
from pruning.names import comes_from_hub

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

SETTINGS_BYTES = 10_000_000
"""Most bytes in a small file: a `tokenizer_config.json` of 6,000 tokens has 1.2 million."""

VOCABULARY_BYTES = 40_000_000
"""Most bytes in a vocabulary: a `tokenizer.json` of 262,144 tokens has 33 million."""

SIZES = {
    "num_hidden_layers": 500,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 10_000),
    **dict.fromkeys(("hidden_size", "head_dim", "word_embed_proj_dim"), 200_000),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 2_000_000),
    "vocab_size": 10_000_000,
    "num_labels": 100_000,
    "max_position_embeddings": 1_000_000_000,
    **dict.fromkeys(("image_size", "patch_size", "num_channels", "mm_tokens_per_image"), 4_096),
}
"""How large a size in a config may be: several times that of the largest models."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "*.txt", "*.model", "*.model.*", "*.tiktoken")
_SETTINGS = ("*.json", "*.jinja", "additional_chat_templates/*.jinja")
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_SECTIONS = ("text_config", "vision_config")
_ELSEWHERE = ("transformers_weights", "configuration_files", "fast_tokenizer_files")


def check_place(model: str, source: str) -> Path | None:
    """Return the folder of a model after a check of its files; None if it must be a hub id.

    Raises:
        ValueError: If the path leads to something else, or a file that transformers reads is a
            pipe, a device or too long.
    """
    folder = Path(source)
    if comes_from_hub(model):
        return None
    try:
        _check_files(folder)
        return folder
    except OSError as error:
        raise unfit(model, f"{error.filename!r}: {error.strerror}") from error
    except ValueError as error:
        raise unfit(model, str(error)) from error


def check_settings(model: str, name: str, settings: Mapping[str, Any]) -> None:
    """Check all sections of a model's config.

    Args:
        name: Name of the config file.

    Raises:
        ValueError: If a size is not a whole number or is beyond `SIZES`, attention is not torch's,
            the model is quantized, or other files are named.
    """
    for prefix, section in _sections(settings):
        for key, value in section.items():
            problem = _problem(key, value)
            if problem == "quantized":
                raise ValueError(
                    f"model {model!r} is quantized: give the one that it was made from"
                )
            if problem:
                raise unfit(model, f"{name}: {prefix}{key} {problem}")
        heads, shared = (section.get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
        if heads and shared and heads % shared:
            raise unfit(
                model,
                f"{name}: {prefix}num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {heads} and {shared}",
            )


def entries_of(folder: Path) -> dict[str, Entry]:
    """Return where a model's tensors are, by published name; empty if a file is not there yet.

    Raises:
        ValueError: As `weights_files` and `read_header`.
    """
    pickles = any(folder.glob("*.bin"))
    if not pickles and not all(path.is_file() for path in named_files(folder)):
        return {}  # the hub's cache may hold the config alone
    headers = [read_header(path) for path in weights_files(folder)]
    return {name: entry for header in headers for name, entry in header.items()}


def check_blocks(model: str, claimed: int, names: Iterable[str], paths: Iterable[str]) -> None:
    """Check how many decoder blocks a model's tensors belong to.

    Args:
        claimed: Number of blocks according to the config.
        names: The tensors' names.
        paths: Where the list of blocks may be in these names, one for each way to publish a model.

    Raises:
        ValueError: If there are more or fewer than claimed.
    """
    block = re.compile(rf"(?:{'|'.join(map(re.escape, paths))})\.([0-9]{{1,9}})\.")
    present = len({match[1] for match in map(block.match, names) if match})
    if present != claimed:
        raise unfit(
            model,
            f"{CONFIG}: num_hidden_layers is {claimed}, but the weights have {present} blocks",
        )


def check_shapes(
    model: str,
    parameters: Mapping[str, nn.Parameter],
    needed: Collection[str],
    published: Callable[[str], Iterable[str]],
    entries: Mapping[str, Entry],
) -> None:
    """Check that a model's tensors have the shapes that its parameters would have.

    Args:
        parameters: The parameters by name in the model, on the meta device.
        needed: Names of those that must have a tensor.
        published: Maps a parameter's name to the names that its tensor may have in the files.
        entries: The tensors' entries, by published name.

    Raises:
        ValueError: If a tensor has another shape, or tensors are missing.
    """
    lost = []
    for name, parameter in parameters.items():
        tensor = next((candidate for candidate in published(name) if candidate in entries), None)
        if tensor is None:
            lost += [name] * (name in needed)
        elif entries[tensor].shape != tuple(parameter.shape):
            raise unfit(
                model,
                f"{tensor} must have shape {tuple(parameter.shape)} by its config, got "
                f"{entries[tensor].shape}",
            )
    if lost:
        raise unfit(model, f"{len(lost)} tensors are missing, {lost[0]} among them")


def unfit(model: str, problem: str) -> ValueError:
    """Return the error for a model that exists but cannot be used."""
    return ValueError(f"model {model!r} cannot be loaded: {problem}")


def _check_files(folder: Path) -> None:
    check_plain(folder, "*.safetensors")
    vocabularies = {path for pattern in _VOCABULARIES for path in folder.glob(pattern)}
    settings = {path for pattern in _SETTINGS for path in folder.glob(pattern)} - vocabularies
    for paths, most in ((settings, SETTINGS_BYTES), (vocabularies, VOCABULARY_BYTES)):
        for path in sorted(path for path in paths if not path.is_dir()):
            open_plain(path, most).close()
            if path.suffix == ".json":
                check_values(read_bytes(path, most), f"file {str(path)!r}")


def _sections(settings: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a config and the objects nested in it, each with the prefix of its keys."""
    waiting = [("", settings)]
    while waiting:
        prefix, section = waiting.pop()
        yield prefix, section
        waiting += [(f"{prefix}{k}.", v) for k, v in section.items() if isinstance(v, dict)]


def _problem(key: str, value: object) -> str | None:
    if value is None:
        return None
    if key in SIZES and not (type(value) is int and 1 <= value <= SIZES[key]):
        return f"must be a whole number from 1 to {SIZES[key]}, got {value!r:.60}"
    if key in _ATTENTION_KEYS and value not in ("eager", "sdpa"):
        return f"must be eager or sdpa, got {value!r:.60}: nothing else is torch's own"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if key == "output_hidden_states" and type(value) is not bool:
        return f"must be true or false, got {value!r:.60}"
    if key in _SECTIONS and not isinstance(value, dict):
        return f"must be an object, got {value!r:.60}"
    if key in _ELSEWHERE:
        return "names other files, which are not read: remove it"
    return "quantized" if key == "quantization_config" and value else None
