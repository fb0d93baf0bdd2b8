"""Named corpora and local text files, cut into windows of tokens that say where they came from.

A corpus is one of four names or a path. `embedded` is the English text that every CPython carries
(`pydoc_data.topics`), so that the whole project runs with no download; `wikitext2`, `c4` and `ptb`
are the field's and come from the Hugging Face hub; a path ends in .txt, .jsonl or .parquet.

A split is `name` or `name[a%:b%]` (either bound may be left out). Slices cut the text, not the
tokens, so that they mean the same for every tokenizer; neighbouring slices share nothing.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from evaluation.sources import HUB_CORPORA, check_source, is_named, local_path, read_split

MOST_TOKENS = 2**24
"""Tokens in the windows of a text: 128 MiB of ids, 8,192 windows of 2,048. A seed could ask for any
number of windows, as those overlap."""

SPLIT_RULE = "must be name, name[a%:b%], name[a%:] or name[:b%], whole percents, a < b <= 100"


Provenance = dict[str, str | int | None]
"""Where windows come from, as JSON: corpus, split, windows, length, tokens, seed, text_sha256."""


@dataclass(frozen=True)
class Windows:
    """Equally long pieces of one text as token ids, (N, T) int64, and where they come from."""

    tokens: Tensor
    provenance: Provenance


def token_windows(
    tokenizer: Any,
    corpus: str,
    split: str,
    windows: int | None,
    length: int,
    seed: int | None,
    vocabulary: int | None = None,
) -> Windows:
    """Cut a corpus into windows of tokens.

    The text is tokenized in one call, as the field does, so a tokenizer's special tokens stand
    once at its ends and not in each window.

    Args:
        tokenizer: A Hugging Face tokenizer.
        corpus: `embedded`, `wikitext2`, `c4`, `ptb` or a path.
        split: Split of the corpus, with or without a slice.
        windows: Number of windows; None for all contiguous ones, which needs `seed` None.
        length: Tokens in each window.
        seed: Draws the starts at random, so windows may overlap; None spreads them evenly over
            the text, without overlap.
        vocabulary: The model's vocab_size, which every token must be below; None for any tokens.

    Returns:
        Tokens (windows, length) and the provenance: corpus, split, windows, length, tokens,
        seed, text_sha256.

    Raises:
        ValueError: If an argument breaks its rule, the text cannot be had, it has fewer tokens
            than the windows need, or one is beyond the vocabulary.
    """
    check_layout(windows, length, seed)
    text = load_text(corpus, split)
    # verbose=False: the text is meant to be longer than the model's context.
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    starts = _window_starts(f"corpus {corpus!r}, split {split!r}", len(ids), windows, length, seed)
    tokens = torch.from_numpy(sliding_window_view(ids, length)[starts])
    if vocabulary is not None and (largest := int(tokens.max())) >= vocabulary:
        raise ValueError(
            f"tokenizer must stay below the model's vocab_size of {vocabulary}, got token "
            f"{largest}: it belongs to another model"
        )
    provenance: Provenance = {
        "corpus": corpus,
        "split": split,
        "windows": len(starts),
        "length": length,
        "tokens": tokens.numel(),
        "seed": seed,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return Windows(tokens, provenance)


def load_text(corpus: str, split: str) -> str:
    """Return the text of a split, the documents joined, the slice cut at line starts.

    Raises:
        ValueError: If the corpus or split is unknown or malformed, a file is missing or not what
            its suffix says, or the hub does not serve the corpus.
    """
    name, first, last = _parse_split(split)
    text = read_split(corpus, name)
    return text[_cut(text, first) : _cut(text, last)]


def check_available(corpus: str, split: str) -> str | None:
    """Check what can be checked without a network or reading a whole text.

    Returns:
        One line if the corpus comes from the hub, which is not asked here; otherwise None.

    Raises:
        ValueError: If the corpus or split is unknown or malformed, a local file is missing, its
            suffix is wrong, or it has no text column.
    """
    name, _, _ = _parse_split(split)
    check_source(corpus, name)
    if corpus in HUB_CORPORA:
        return f"corpus {corpus!r}, split {split!r} comes from the Hugging Face hub: not checked"
    return None


def check_disjoint(texts: Mapping[str, tuple[str, str]]) -> list[str]:
    """Describe each pair of roles whose texts overlap, one line a pair.

    Args:
        texts: role -> (corpus, split). Paths are the same corpus if they resolve to one file;
            a file has one split, so only the slices of it are compared.

    Raises:
        ValueError: If a split is malformed.
    """
    return [
        f"{one} and {other} overlap: {' '.join(texts[one])} and {' '.join(texts[other])}"
        for one, other in combinations(texts, 2)
        if _overlap(*texts[one], *texts[other])
    ]


def _overlap(corpus: str, split: str, other_corpus: str, other_split: str) -> bool:
    name, first, last = _parse_split(split)
    other_name, other_first, other_last = _parse_split(other_split)
    if is_named(corpus) or is_named(other_corpus):
        same_text = (corpus, name) == (other_corpus, other_name)
    else:
        same_text = local_path(corpus) == local_path(other_corpus)
    return same_text and max(first, other_first) < min(last, other_last)


def _parse_split(split: str) -> tuple[str, int, int]:
    """Return the name ('' if there is none) and the bounds of the slice in percent."""
    match = re.fullmatch(r"([\w-]*)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", split)
    if not match or not split:
        raise ValueError(f"split {SPLIT_RULE}; got {split!r}")
    first, last = int(match[2] or 0), int(match[3] or 100)
    if not first < last <= 100:
        raise ValueError(f"split {SPLIT_RULE}; got {split!r}")
    return match[1], first, last


def _cut(text: str, percent: int) -> int:
    """Return the first line start at or after `percent` of the characters.

    A text of one line (documents joined by spaces) is cut between words.
    """
    position = len(text) * percent // 100
    if position == 0 or percent == 100:
        return position
    end = text.find("\n" if "\n" in text else " ", position - 1)
    return end + 1 if end >= 0 else len(text)


def check_layout(windows: int | None, length: int, seed: int | None) -> None:
    """Check how windows are to be cut; raises ValueError, as `token_windows` does."""
    if length < 1:
        raise ValueError(f"length must be at least 1 token; got {length}")
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be at least 1, or None for all; got {windows}")
    if windows is None and seed is not None:
        raise ValueError(f"seed must be None when windows is None (all windows); got {seed}")
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be at least 0, or None; got {seed}")
    if (windows or 1) * length > MOST_TOKENS:
        raise ValueError(
            f"windows x length must be at most {MOST_TOKENS} tokens; got {windows} x {length}"
        )


def _window_starts(
    what: str, n_tokens: int, windows: int | None, length: int, seed: int | None
) -> np.ndarray:
    needed = length if windows is None or seed is not None else windows * length
    if n_tokens < needed:
        count = "a window" if needed == length else f"{windows} windows without overlap"
        raise ValueError(f"{what} has {n_tokens} tokens; {count} of {length} need {needed}")
    if windows is None:
        return np.arange(0, n_tokens - length + 1, length)
    if seed is None:
        return np.arange(windows) * (n_tokens // windows)
    return np.random.default_rng(seed).integers(0, n_tokens - length + 1, size=windows)
