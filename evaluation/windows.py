"""Texts cut into windows of tokens with their provenance.

Several texts are mixed evenly, so that the first few windows already contain every kind.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunevolve.evaluation.text import find, load_documents, load_text

Provenance = dict[str, str | int | bool | None]
"""Where windows come from, as JSON: corpus, split, windows, length, tokens, seed, bos, text_sha256,
and by_document where that is true."""


@dataclass(frozen=True)
class Windows:
    """Equally long pieces of text, and where they come from."""

    tokens: Tensor  # token ids, (N, T) int64
    parts: tuple[Provenance, ...]  # of each kind of text
    kinds: tuple[int, ...]  # of each window, the index of its text in `parts`

    @property
    def provenance(self) -> Provenance:
        """The provenance of all windows; what differs between texts is joined by ` + `."""
        joined = {
            key: " + ".join(str(part[key]) for part in self.parts)
            for key in ("corpus", "split", "text_sha256")
        }
        counts = {"windows": len(self.tokens), "tokens": self.tokens.numel()}
        return {**self.parts[0], **joined, **counts}


@dataclass(frozen=True)
class Text:
    """One kind of text, and the windows that are wanted of it."""

    corpus: str  # `embedded`, `wikitext2`, `c4`, `ptb` or a path
    split: str  # of the corpus, with or without a slice
    windows: int | None  # None for all contiguous ones
    length: int  # tokens in each window
    seed: int | None = None  # draws starts that may overlap; None spreads windows over the text
    # Whether each window begins with bos, and holds one token less of the text; None if the
    # tokenizer puts one before a text. Gemma is useless without. Published perplexities of LLaMA
    # have it once, before the whole text.
    bos: bool | None = None
    by_document: bool = False  # whether each window is drawn from a single document
    most: int | None = None  # most windows where `windows` is None; None for all

    def check(self) -> str | None:
        """Check what needs no work, or raise ValueError; return a line for a text of the hub."""
        on_hub = find(self.corpus, self.split).source.revision
        if self.by_document and "[" in self.split:
            raise ValueError(f"a split drawn by document must have no slice, got {self.split!r}")
        return f"{self} comes from the Hugging Face hub: not checked" if on_hub else None

    def __str__(self) -> str:
        return f"corpus {self.corpus!r}, split {self.split!r}"

    def cut(self, tokenizer: Tokenizer) -> Windows:
        """Read the text and cut it; raises ValueError if it cannot be read, or is too short."""
        cut = self._from_documents if self.by_document else self._from_whole
        tokens, bos, read = cut(tokenizer)
        provenance: Provenance = {
            "corpus": self.corpus,
            "split": self.split,
            "windows": tokens.shape[0],
            "length": tokens.shape[1],
            "tokens": tokens.numel(),
            "seed": self.seed,
            "bos": bos,
            "text_sha256": hashlib.sha256(read.encode()).hexdigest(),
            **({"by_document": True} if self.by_document else {}),
        }
        return Windows(tokens, (provenance,), (0,) * len(tokens))

    def _from_whole(self, tokenizer: Tokenizer) -> tuple[Tensor, bool, str]:
        """Return windows of the text, which is tokenized at once, whether they have bos, and it."""
        bos: int | None = tokenizer.bos_token_id
        if self.bos and bos is None:
            raise ValueError("bos must be false for a tokenizer that has no bos token, got true")
        puts_one = tokenizer("a")["input_ids"][:1] == [bos]
        bos = bos if self.bos or (self.bos is None and puts_one) else None
        text = load_text(self.corpus, self.split)
        # verbose=False: the text is meant to be longer than the model's context.
        ids = tokenizer(text, verbose=False, add_special_tokens=bos is None)["input_ids"]
        length = self.length - (bos is not None)
        starts = self._starts(len(ids), length)
        tokens = torch.tensor(ids).unfold(0, length, 1)[starts]
        return functional.pad(tokens, (self.length - length, 0), value=bos), bos is not None, text

    def _starts(self, tokens: int, length: int) -> Tensor:
        every = tokens // length
        windows = min(every, self.most or every) if self.windows is None else self.windows
        if windows < 1 or every < (windows if self.seed is None else 1):
            rule = "windows must be at least 1 and fit the text"
            raise ValueError(f"{rule}, got {windows} of {length} tokens; {self} has {tokens}")
        if self.seed is not None:
            generator = np.random.default_rng(self.seed)
            return torch.from_numpy(generator.integers(0, tokens - length + 1, size=windows))
        gapless = self.windows is None and windows == every
        return torch.arange(windows) * (length if gapless else tokens // windows)

    def _from_documents(self, tokenizer: Tokenizer) -> tuple[Tensor, bool, str]:
        """Return windows drawn from documents longer than one, False, and the text of those.

        As in the code of SparseGPT (Frantar and Alistarh, 2023, arXiv:2301.00774) and of Wanda (Sun
        et al., 2024, arXiv:2306.11695): first a random document, again if it is too short, then a
        random place in it, by Python's own generator.
        """
        documents = load_documents(find(self.corpus, self.split))
        generator, too_short = random.Random(self.seed or 0), set[int]()
        drawn, read = list[list[int]](), ""
        while len(drawn) < (self.windows or 1):
            if len(too_short) == len(documents):
                raise ValueError(f"{self.corpus!r} has no document of over {self.length} tokens")
            number = generator.randint(0, len(documents) - 1)
            if number in too_short:
                continue
            ids = tokenizer(documents[number], verbose=False)["input_ids"]  # see `_from_whole`
            if len(ids) <= self.length:
                too_short.add(number)
                continue
            start = generator.randint(0, len(ids) - self.length - 1)
            drawn.append(ids[start : start + self.length])
            read += documents[number]
        return torch.tensor(drawn), False, read


def share_windows(texts: Sequence[Text], shares: Sequence[float]) -> tuple[Text, ...]:
    """Return texts that share the number of windows that each of those given has.

    Raises ValueError if two of them overlap.
    """
    if overlaps := check_disjoint({f"part {n}": [text] for n, text in enumerate(texts, 1)}):
        raise ValueError(f"{overlaps[0]}: give each kind of text once, with its share")
    if (windows := texts[0].windows) is None:
        return tuple(texts)
    exact = [windows * share / sum(shares) for share in shares]
    counts = [*map(int, exact)]
    # The windows that are left go to the largest remainders (Hamilton's method).
    by_remainder = sorted(range(len(exact)), key=lambda kind: counts[kind] - exact[kind])
    for kind in by_remainder[: windows - sum(counts)]:
        counts[kind] += 1
    return tuple(replace(text, windows=n) for text, n in zip(texts, counts, strict=True))


def check_disjoint(texts: Mapping[str, Sequence[Text]]) -> list[str]:
    """Describe each pair of texts of different roles that overlap, in one line per pair."""
    lines = []
    for role, other in combinations(texts, 2):
        for pair in product(texts[role], texts[other]):
            a, b = (find(text.corpus, text.split) for text in pair)
            if a[:2] == b[:2] and max(a.first, b.first) < min(a.last, b.last):
                both = " and ".join(f"{text.corpus} {text.split}" for text in pair)
                lines.append(f"{role} and {other} overlap: {both}")
    return lines


def cut_all(texts: Sequence[Text], tokenizer: Tokenizer) -> Windows:
    """Cut the windows of several texts and mix them evenly."""
    cuts = [text.cut(tokenizer) for text in texts]
    order = sorted(
        ((i + 0.5) / len(cut.tokens), kind, i)
        for kind, cut in enumerate(cuts)
        for i in range(len(cut.tokens))
    )
    tokens = torch.stack([cuts[kind].tokens[i] for _, kind, i in order])
    parts = tuple(cut.provenance for cut in cuts)
    return Windows(tokens, parts, tuple(kind for _, kind, _ in order))


def special_note(tokens: Tensor, tokenizer: Tokenizer) -> str | None:
    """Return a warning if windows for statistics, (N, T), have special tokens, bos excepted.

    A model expects `<unk>` nowhere: a few weigh as much in a gradient as all other tokens.
    """
    special = [i for i in tokenizer.all_special_ids if i != tokenizer.bos_token_id]
    there = tokens[torch.isin(tokens, torch.tensor(special, dtype=torch.int64))]
    if not len(there):
        return None
    return (
        f"{len(there) / tokens.numel():.1%} of the calibration tokens are special ones such as "
        f"{tokenizer.decode(there[:1])}, which stand for no text and spoil statistics: give the "
        "text in its raw form, such as wikitext2"
    )
