"""Named corpora and local text files, cut into windows of tokens with their provenance.

A corpus is one of four names or a path. `embedded` is the English text that every CPython carries
(`pydoc_data.topics`), so that the whole project runs with no download; `wikitext2`, `c4` and `ptb`
are the field's and come from the Hugging Face hub; a path ends in .txt, .jsonl or .parquet.

A split is `name` or `name[a%:b%]` (either bound may be left out). Slices cut the text, not the
tokens, so that they mean the same for every tokenizer; neighbouring slices share nothing.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from evaluation.sources import HUB_CORPORA, check_source, is_named, local_path, read_split

MOST_TOKENS = 2**24
"""Most tokens in the windows of a text: 128 MiB of ids, 8,192 windows of 2,048. Windows drawn with
a seed may overlap, so the text alone would not limit their number."""

SPLIT_RULE = "must be name, name[a%:b%], name[a%:] or name[:b%], whole percents, a < b <= 100"


Provenance = dict[str, str | int | bool | None]
"""Where windows come from, as JSON: corpus, split, windows, length, tokens, seed, bos, text_sha256;
for a mixture, values that differ are joined by ` + `."""


@dataclass(frozen=True)
class Windows:
    """Equally long pieces of text as token ids, (N, T) int64, and where they come from.

    Attributes:
        parts: The provenance of each kind of text in a mixture; of one for a single text.
        kinds: For each window, the index of its text in `parts`.
    """

    tokens: Tensor
    provenance: Provenance
    parts: tuple[Provenance, ...]
    kinds: tuple[int, ...]


def token_windows(
    tokenizer: Any,
    corpus: str,
    split: str,
    windows: int | None,
    length: int,
    seed: int | None,
    bos: bool | None = None,
) -> Windows:
    """Cut a corpus into windows of tokens.

    The text is tokenized in one call. A window that begins with bos, the token that a model saw at
    the beginning of every text, holds one token less of the text; Gemma is useless without bos.
    Published perplexities of LLaMA are of windows without it: special tokens then stand where the
    tokenizer puts them, once for the whole text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        corpus: `embedded`, `wikitext2`, `c4`, `ptb` or a path.
        split: Split of the corpus, with or without a slice.
        windows: Number of windows; None for all contiguous ones, and then `seed` must be None.
        length: Tokens in each window.
        seed: Draws the starts at random, so windows may overlap; None spreads them evenly over
            the text, without overlap.
        bos: Whether each window begins with the tokenizer's bos; None if it puts one before a text.

    Returns:
        Tokens (windows, length) and the provenance: corpus, split, windows, length, tokens,
        seed, bos, text_sha256.

    Raises:
        ValueError: If an argument breaks its rule, the text cannot be read, it has fewer tokens
            than the windows need, or there is no bos.
    """
    check_layout(windows, length, seed)
    first = _bos_of(tokenizer, bos)
    text = load_text(corpus, split)
    # verbose=False: the text is meant to be longer than the model's context.
    encoded = tokenizer(text, verbose=False, add_special_tokens=not first)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    what, body = f"corpus {corpus!r}, split {split!r}", length - len(first)
    if body < 1:
        raise ValueError(f"length must be at least 2 tokens where bos is one of them; got {length}")
    starts = _window_starts(what, len(ids), windows, body, seed)
    cut = sliding_window_view(ids, body)[starts]
    tokens = torch.from_numpy(
        np.pad(cut, ((0, 0), (len(first), 0)), constant_values=first[0] if first else 0)
    )
    provenance: Provenance = {
        "corpus": corpus,
        "split": split,
        "windows": len(starts),
        "length": length,
        "tokens": tokens.numel(),
        "seed": seed,
        "bos": bool(first),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return Windows(tokens, provenance, (provenance,), (0,) * len(starts))


def special_note(tokens: Tensor, tokenizer: Any) -> str | None:
    """Return a warning if windows for statistics have special tokens, bos excepted; else None.

    They stand for no text, as the `<unk>` of WikiText's tokenized form. A model expects them
    nowhere, so that a few of them weigh as much in a gradient as all other tokens.

    Args:
        tokens: (N, T) int64.
    """
    names = {i: tokenizer.decode([i]) for i in tokenizer.all_special_ids}
    names.pop(tokenizer.bos_token_id, None)
    counts = {name: int((tokens == number).sum()) for number, name in names.items()}
    if not (total := sum(counts.values())):
        return None
    most = max(counts, key=lambda name: counts[name])
    return (
        f"{total / tokens.numel():.1%} of the calibration tokens are special ones such as {most}, "
        "which stand for no text: with 2.2%, Gemma-3-270M went from perplexity 34.1 to 37.9 at 50% "
        "with snip. Give the text in its raw form, such as wikitext2"
    )


def _bos_of(tokenizer: Any, wanted: bool | None) -> list[int]:
    """Return the bos token that each window begins with, in a list; empty if there is none.

    Raises:
        ValueError: If bos is wanted, but the tokenizer has none.
    """
    bos = tokenizer.bos_token_id
    if wanted is None:
        wanted = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    if wanted and bos is None:
        raise ValueError("bos must be false for a tokenizer that has no bos token, got true")
    return [bos] if wanted else []


def load_text(corpus: str, split: str) -> str:
    """Return the text of a split, the documents joined, the slice cut at line starts.

    Raises:
        ValueError: If the corpus or split is unknown or malformed, a file is missing or is not of
            the kind its suffix says, or the hub does not serve the corpus.
    """
    name, first, last = _parse_split(split)
    text = read_split(corpus, name)
    return text[_cut(text, first) : _cut(text, last)]


def check_available(corpus: str, split: str) -> str | None:
    """Check what can be checked without a network or reading a whole text.

    Returns:
        One line if the corpus comes from the hub, which is not contacted here; otherwise None.

    Raises:
        ValueError: If the corpus or split is unknown or malformed, a local file is missing, its
            suffix is wrong, or it has no text column.
    """
    name, _, _ = _parse_split(split)
    check_source(corpus, name)
    if corpus in HUB_CORPORA:
        return f"corpus {corpus!r}, split {split!r} comes from the Hugging Face hub: not checked"
    return None


def check_disjoint(texts: Mapping[str, Sequence[tuple[str, str]]]) -> list[str]:
    """Describe each pair of texts of different roles that overlap, in one line per pair.

    Args:
        texts: role -> a (corpus, split) for each kind of text. Paths are the same corpus if they
            resolve to one file; a file has one split, so only its slices are compared.

    Raises:
        ValueError: If a split is malformed.
    """
    return [
        f"{role} and {other} overlap: {' '.join(a)} and {' '.join(b)}"
        for role, other in combinations(texts, 2)
        for a, b in product(texts[role], texts[other])
        if _overlap(*a, *b)
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
