"""Windows drawn from single documents, against a drawing of their own."""

import random

import pytest
import torch
from word_tokenizer import BOS, word_tokenizer

from prunevolve.evaluation.documents import draw_windows

TOKENIZER = word_tokenizer("<s>", adds_bos=True)


def document(first: int, words: int) -> str:
    return " ".join(str(first + word) for word in range(words))


def test_windows_are_runs_of_documents_in_the_order_of_the_published_drawing():
    # With bos they have 4, 8, 21, 9 and 31 tokens: a window of 8 needs more than 8.
    lengths = [3, 7, 20, 8, 30]
    documents = [document(100 * place, words) for place, words in enumerate(lengths)]
    tokens, _ = draw_windows(TOKENIZER, documents, 40, 8, seed=3)

    random.seed(3)
    expected = []
    while len(expected) < 40:
        place = random.randint(0, 4)
        if 1 + lengths[place] > 8:
            start = random.randint(0, 1 + lengths[place] - 8 - 1)
            ids = [BOS, *range(100 * place, 100 * place + lengths[place])]
            expected.append(ids[start : start + 8])
    assert tokens.tolist() == expected
    assert tokens.dtype == torch.int64
    assert {row[-1] // 100 for row in expected} == {2, 3, 4}
    assert all(row[0] == BOS for row in expected if row[-1] // 100 == 3)


def test_seed_decides_windows_and_the_sha256_of_their_documents():
    documents = [document(100 * place, 20) for place in range(9)]
    (tokens, sha256), again = (draw_windows(TOKENIZER, documents, 4, 8, 0) for _ in range(2))
    other, other_sha256 = draw_windows(TOKENIZER, documents, 4, 8, 1)
    assert torch.equal(tokens, again[0])
    assert (sha256, not torch.equal(tokens, other)) == (again[1], True)
    assert sha256 != other_sha256


def test_documents_that_are_all_too_short_are_refused():
    with pytest.raises(ValueError, match="none of 2 documents has more than 8 tokens, which a w"):
        draw_windows(TOKENIZER, [document(0, 7), document(0, 2)], 4, 8, 0)
