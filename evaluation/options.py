"""Texts as a command line names them: lists of corpora, with their splits and shares."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evaluation.corpus import Windows
from evaluation.mixture import Mixture, Part, mixed
from evaluation.sources import EMBEDDED

EVAL_WINDOWS = 32
"""Most windows of each text when no number is given."""

SPLITS = {
    EMBEDDED: ("calibration", "report"),
    "wikitext2": ("train", "test"),
    "c4": ("train", "validation"),
    "ptb": ("train", "test"),
}
"""Splits for calibration and for evaluation; a local file has a single split, `all`."""


def calibration_text(
    corpora: Sequence[str],
    splits: Sequence[str],
    shares: Sequence[float],
    windows: int,
    length: int,
    seed: int,
    bos: bool | None,
) -> Mixture:
    """Return the text that statistics are collected on; raises ValueError as `Mixture.check`."""
    _check_count("samples", windows)
    text = Mixture(_parts(corpora, splits, shares, 0, ""), windows, length, seed, bos)
    text.check()
    return text


def evaluation_texts(
    corpora: Sequence[str],
    splits: Sequence[str],
    windows: int | None,
    length: int,
    bos: bool | None,
) -> tuple[Mixture, ...]:
    """Return the texts on which perplexity is measured, one by one; raises ValueError."""
    _check_count("eval-windows", windows)
    parts = _parts(corpora, splits, (), 1, "eval-")
    texts = tuple(Mixture((part,), windows, length, None, bos) for part in parts)
    for text in texts:
        text.check()
    return texts


def cut_all(texts: Sequence[Mixture], tokenizer: Any, vocabulary: int) -> Windows:
    """Cut the windows of all texts; if a text's `windows` is None, at most `EVAL_WINDOWS`."""
    return mixed([_cut(text, tokenizer, vocabulary) for text in texts])


def _check_count(option: str, windows: int | None) -> None:
    if windows is not None and windows < 1:
        raise ValueError(f"{option} must be at least 1, got {windows}")


def _cut(text: Mixture, tokenizer: Any, vocabulary: int) -> Windows:
    windows = text.cut(tokenizer, vocabulary)
    if text.windows is None and len(windows.tokens) > EVAL_WINDOWS:
        return replace(text, windows=EVAL_WINDOWS).cut(tokenizer, vocabulary)
    return windows


def _parts(
    corpora: Sequence[str], splits: Sequence[str], shares: Sequence[float], role: int, prefix: str
) -> tuple[Part, ...]:
    for name, given in (("split", splits), ("share", shares)):
        if given and len(given) != len(corpora):
            raise ValueError(
                f"--{prefix}{name} must be given once for each --{prefix}corpus, or not at all: "
                f"got {len(given)} for {len(corpora)}"
            )
    if bad := [share for share in shares if share <= 0]:
        raise ValueError(f"--share must be above 0, got {bad[0]:g}")
    defaults = [SPLITS[corpus][role] if corpus in SPLITS else "all" for corpus in corpora]
    return tuple(map(Part, corpora, splits or defaults, shares or [1.0] * len(corpora)))
