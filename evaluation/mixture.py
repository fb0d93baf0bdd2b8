"""Several kinds of text as one: windows of each by its share, mixed evenly.

A metric that was judged on one kind of text alone may lose everything on another. The mixing is
even so that the first few windows already contain every kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from evaluation.corpus import (
    Provenance,
    Windows,
    check_available,
    check_disjoint,
    check_layout,
    token_windows,
)

EVAL_WINDOWS = 32
"""Most windows of each text that `run_prune.py` measures when no number is given."""


@dataclass(frozen=True)
class Part:
    """One kind of text.

    Attributes:
        corpus: A named corpus or a path; see `evaluation.corpus`.
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
    """

    parts: tuple[Part, ...]
    windows: int | None
    length: int
    seed: int | None
    bos: bool | None = None

    @property
    def places(self) -> list[tuple[str, str]]:
        """Corpus and split of each part."""
        return [(part.corpus, part.split) for part in self.parts]

    def check(self) -> list[str]:
        """Check what can be checked without work; return a line for each text from the hub.

        Raises:
            ValueError: If a text is unknown, the layout is wrong, a part would get no window, or
                two parts overlap.
        """
        for count in self.counts:
            check_layout(count, self.length, self.seed)
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

    def cut(self, tokenizer: Any) -> Windows:
        """Cut the windows; raises ValueError as `evaluation.corpus.token_windows` does."""
        return mixed(
            [
                token_windows(
                    tokenizer,
                    part.corpus,
                    part.split,
                    windows=count,
                    length=self.length,
                    seed=self.seed,
                    bos=self.bos,
                )
                for part, count in zip(self.parts, self.counts, strict=True)
            ]
        )


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
    return Windows(tokens, _joined(parts), parts, tuple(kind for _, kind, _ in order))


def _joined(parts: Sequence[Provenance]) -> Provenance:
    counted = {key: sum(int(part[key] or 0) for part in parts) for key in ("windows", "tokens")}
    joined = {
        key: " + ".join(str(part[key]) for part in parts)
        for key in ("corpus", "split", "text_sha256")
    }
    return {**parts[0], **joined, **counted}


def cut_all(texts: Sequence[Mixture], tokenizer: Any) -> Windows:
    """Cut the windows of all texts; if a text's `windows` is None, at most `EVAL_WINDOWS`."""
    return mixed([_cut(text, tokenizer) for text in texts])


def _cut(text: Mixture, tokenizer: Any) -> Windows:
    windows = text.cut(tokenizer)
    if text.windows is None and len(windows.tokens) > EVAL_WINDOWS:
        return replace(text, windows=EVAL_WINDOWS).cut(tokenizer)
    return windows
