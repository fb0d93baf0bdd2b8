"""Windows drawn from single documents, as those of the published pruning tables.

The code of SparseGPT (Frantar and Alistarh, 2023, arXiv:2301.00774) and of Wanda (Sun et al., 2024,
arXiv:2306.11695) draws a window in two steps: a random document, again if it is too short, and a
random place in it. Long documents are few, so the windows come from another kind of page than
those of a text that all documents make up.
"""

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


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
