"""Texts cut into windows of tokens with their provenance, one text or a mixture of several.

A metric that was judged on one kind of text alone may lose everything on another. The mixing is
even so that the first few windows already contain every kind.

Windows are cut from a whole text, or drawn from single documents as in the code of SparseGPT
(Frantar and Alistarh, 2023, arXiv:2301.00774) and of Wanda (Sun et al., 2024, arXiv:2306.11695):
first a random document, again if it is too short, then a random place in it. Long documents are
few, so such windows come from another kind of page than those of the whole text.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunevolve.evaluation.sources import check_available, check_disjoint, load_documents, load_text

EVAL_WINDOWS = 32
"""Most windows of each text that `run_prune.py` measures when nothing else is said."""

Provenance = dict[str, str | int | bool | None]
"""Where windows come from, as JSON: corpus, split, windows, length, tokens, seed, bos, text_sha256,
and by_document where that is true; for a mixture, values that differ are joined by ` + `."""


@dataclass(frozen=True)
class Windows:
    """Equally long pieces of text as token ids, (N, T) int64, and where they come from.

    Attributes:
        parts: The provenance of each kind of text.
        kinds: For each window, the index of its text in `parts`.
    """

    tokens: Tensor
    parts: tuple[Provenance, ...]
    kinds: tuple[int, ...]

    @property
    def provenance(self) -> Provenance:
        """The provenance of all windows."""
        first, *others = self.parts
        if not others:
            return first
        counted = {
            key: sum(int(part[key] or 0) for part in self.parts) for key in ("windows", "tokens")
        }
        joined = {
            key: " + ".join(str(part[key]) for part in self.parts)
            for key in ("corpus", "split", "text_sha256")
        }
        return {**first, **joined, **counted}


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
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
        windows: Number of windows; None for all contiguous ones, which need no seed.
        length: Tokens in each window.
        seed: Draws the starts at random, so windows may overlap; None spreads them evenly over
            the text, without overlap.
        bos: Whether each window begins with the tokenizer's bos; None if it puts one before a text.

    Raises:
        ValueError: If an argument breaks its rule, the text cannot be read, it has fewer tokens
            than the windows need, or there is no bos.
    """
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be at least 1, or None for all; got {windows}")
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be at least 0, or None; got {seed}")
    first = _bos_of(tokenizer, bos)
    text = load_text(corpus, split)
    # verbose=False: the text is meant to be longer than the model's context.
    encoded = tokenizer(text, verbose=False, add_special_tokens=not first)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    body = length - len(first)
    if body < 1:
        raise ValueError(f"length must be at least {1 + len(first)} tokens; got {length}")
    what = f"corpus {corpus!r}, split {split!r}"
    starts = _window_starts(what, len(ids), windows, body, seed)
    cut = sliding_window_view(ids, body)[starts]
    tokens = torch.from_numpy(
        np.pad(cut, ((0, 0), (len(first), 0)), constant_values=first[0] if first else 0)
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return _of_one_text(tokens, corpus, split, seed, bool(first), digest)


def draw_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    windows: int,
    length: int,
    seed: int,
) -> tuple[Tensor, str]:
    """Draw windows from documents longer than a window.

    Each document is tokenized by itself, with the special tokens that the tokenizer puts before a
    text. The numbers are those of Python's own generator, in the order in which the published code
    draws them.

    Returns:
        Tokens (windows, length), int64, and the sha256 of the drawn documents' text.

    Raises:
        ValueError: If no document is longer than a window.
    """
    generator = random.Random(seed)
    digest = hashlib.sha256()
    too_short: set[int] = set()
    drawn: list[list[int]] = []
    while len(drawn) < windows:
        if len(too_short) == len(documents):
            raise ValueError(
                f"none of {len(documents)} documents has more than {length} tokens, which a window "
                "drawn from one document needs"
            )
        place = generator.randint(0, len(documents) - 1)
        if place in too_short:
            continue
        # verbose=False: a document may be longer than the model's context.
        ids = tokenizer(documents[place], verbose=False)["input_ids"]
        if len(ids) <= length:
            too_short.add(place)
            continue
        start = generator.randint(0, len(ids) - length - 1)
        drawn.append(ids[start : start + length])
        digest.update(documents[place].encode())
    return torch.tensor(drawn), digest.hexdigest()


def _of_one_text(
    tokens: Tensor, corpus: str, split: str, seed: int | None, bos: bool, text_sha256: str
) -> Windows:
    provenance: Provenance = {
        "corpus": corpus,
        "split": split,
        "windows": tokens.shape[0],
        "length": tokens.shape[1],
        "tokens": tokens.numel(),
        "seed": seed,
        "bos": bos,
        "text_sha256": text_sha256,
    }
    return Windows(tokens, (provenance,), (0,) * len(tokens))


def special_note(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> str | None:
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


def _bos_of(tokenizer: PreTrainedTokenizerBase, wanted: bool | None) -> list[int]:
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


def _window_starts(
    what: str, n_tokens: int, windows: int | None, length: int, seed: int | None
) -> np.ndarray:
    """Return the place of each window's first token."""
    needed = length if windows is None or seed is not None else windows * length
    if n_tokens < needed:
        raise ValueError(
            f"{what} has {n_tokens} tokens; {windows or 1} windows of {length} need at least "
            f"{needed}: give fewer or shorter ones, or a longer text"
        )
    if windows is None:
        return np.arange(0, n_tokens - length + 1, length)
    if seed is None:
        return np.arange(windows) * (n_tokens // windows)
    return np.random.default_rng(seed).integers(0, n_tokens - length + 1, size=windows)


@dataclass(frozen=True)
class Part:
    """One kind of text.

    Attributes:
        corpus: A named corpus or a path; see `evaluation.sources`.
        split: Split of the corpus, with or without a slice.
        share: Its share of the windows, relative to the other parts'.
    """

    corpus: str
    split: str
    share: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """Windows to cut from one or several kinds of text.

    Attributes:
        windows: Number of windows in all; None for as many as each text has.
        length: Tokens in a window.
        seed: Draws the window starts at random; None spreads them evenly.
        bos: Whether windows begin with bos; None leaves it to the tokenizer.
        by_document: Whether each window is drawn from a single document of a hub corpus, for which
            `windows` and `seed` are needed.
        most: Most windows where `windows` is None; None for all.
    """

    parts: tuple[Part, ...]
    windows: int | None
    length: int
    seed: int | None
    bos: bool | None = None
    by_document: bool = False
    most: int | None = None

    @property
    def places(self) -> list[tuple[str, str]]:
        """Corpus and split of each part."""
        return [(part.corpus, part.split) for part in self.parts]

    def check(self) -> list[str]:
        """Check what can be checked without work; return a line for each text from the hub.

        Raises:
            ValueError: If a text is unknown, a part would get no window, or two parts overlap.
        """
        _ = self.counts
        kinds = {f"part {number}": [place] for number, place in enumerate(self.places, 1)}
        if overlaps := check_disjoint(kinds):
            raise ValueError(f"{overlaps[0]}: give each kind of text once, with its share")
        return [note for place in self.places if (note := check_available(*place))]

    @property
    def counts(self) -> list[int | None]:
        """Number of windows of each part: shares rounded so that they add up; or None for all.

        Raises:
            ValueError: If a part would get none.
        """
        if self.windows is None:
            return [None] * len(self.parts)
        total = sum(part.share for part in self.parts)
        exact = [self.windows * part.share / total for part in self.parts]
        counts = [int(count) for count in exact]
        # The windows that are left go to the largest remainders (Hamilton's method).
        by_remainder = sorted(
            range(len(exact)), key=lambda kind: (counts[kind] - exact[kind], kind)
        )
        for kind in by_remainder[: self.windows - sum(counts)]:
            counts[kind] += 1
        if 0 in counts:
            part = self.parts[counts.index(0)]
            raise ValueError(
                f"windows = {self.windows} leaves none for corpus {part.corpus!r}, split "
                f"{part.split!r}: give more windows or a larger share"
            )
        return list(counts)

    def cut(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Cut the windows; raises ValueError as `token_windows` and `draw_windows` do."""
        cut = mixed(
            [
                self._cut_part(tokenizer, part, count)
                for part, count in zip(self.parts, self.counts, strict=True)
            ]
        )
        if self.windows is None and self.most and len(cut.tokens) > self.most:
            return replace(self, windows=self.most).cut(tokenizer)
        return cut

    def _cut_part(
        self, tokenizer: PreTrainedTokenizerBase, part: Part, count: int | None
    ) -> Windows:
        place, length, seed = (part.corpus, part.split), self.length, self.seed
        if not self.by_document:
            return token_windows(tokenizer, *place, count, length, seed, self.bos)
        assert count is not None and seed is not None
        tokens, digest = draw_windows(tokenizer, load_documents(*place), count, length, seed)
        cut = _of_one_text(tokens, *place, seed, False, digest)
        return replace(cut, parts=({**cut.provenance, "by_document": True},))


def mixed(cuts: Sequence[Windows]) -> Windows:
    """Return the windows of several texts, evenly interleaved.

    A search that looks at the first few windows then sees each kind of text.
    """
    if len(cuts) == 1:
        return cuts[0]
    order = sorted(
        ((place + 0.5) / len(cut.tokens), kind, place)
        for kind, cut in enumerate(cuts)
        for place in range(len(cut.tokens))
    )
    tokens = torch.stack([cuts[kind].tokens[place] for _, kind, place in order])
    parts = tuple(cut.provenance for cut in cuts)
    return Windows(tokens, parts, tuple(kind for _, kind, _ in order))


def cut_all(texts: Sequence[Mixture], tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Cut the windows of all texts."""
    return mixed([text.cut(tokenizer) for text in texts])
