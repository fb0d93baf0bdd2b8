"""Several kinds of text as one."""

import pytest
import torch
from word_tokenizer import BOS, word_tokenizer

from prunevolve.evaluation.corpus import Mixture, Part, token_windows
from prunevolve.pruning.run.job import _texts
from prunevolve.pruning.run.options import Options


@pytest.fixture
def texts(tmp_path):
    paths = []
    for name, first in (("low", 0), ("high", 60)):
        path = tmp_path / f"{name}.txt"
        path.write_text(" ".join(str(number) for number in range(first, first + 40)))
        paths.append(str(path))
    return paths


def parts(texts, *shares):
    return tuple(Part(text, "all", share) for text, share in zip(texts, shares, strict=True))


@pytest.mark.parametrize(
    ("adds", "bos", "expected"),
    [
        (True, None, [[BOS, 0, 1], [BOS, 20, 21]]),
        (False, None, [[0, 1, 2], [20, 21, 22]]),
        (False, True, [[BOS, 0, 1], [BOS, 20, 21]]),
        # As the field does: the tokenizer's own stands once, before the whole text of 41 tokens.
        (True, False, [[BOS, 0, 1], [19, 20, 21]]),
    ],
)
def test_windows_begin_with_bos_if_asked_or_if_the_tokenizer_does(texts, adds, bos, expected):
    cut = token_windows(word_tokenizer("<s>", adds), texts[0], "all", 2, 3, None, bos=bos)
    assert cut.tokens.tolist() == expected
    assert cut.provenance["bos"] == (adds if bos is None else bos)


def test_bos_needs_a_tokenizer_that_has_one_and_a_token_beside_it(texts):
    with pytest.raises(ValueError, match="bos must be false for a tokenizer that has no bos"):
        token_windows(word_tokenizer(), texts[0], "all", 2, 3, None, bos=True)
    with pytest.raises(ValueError, match="length must be at least 2 tokens; got 1"):
        token_windows(word_tokenizer("<s>", True), texts[0], "all", 2, 1, None)


@pytest.mark.parametrize(
    ("shares", "windows", "expected"), [((1, 1), 5, [3, 2]), ((1, 2), 4, [1, 3])]
)
def test_counts_follow_the_shares_and_add_up(texts, shares, windows, expected):
    assert Mixture(parts(texts, *shares), windows, 3, None).counts == expected


def test_kinds_stand_among_each_other_evenly(texts):
    cut = Mixture(parts(texts, 1, 3), 8, 3, None).cut(word_tokenizer())
    assert cut.kinds == (1, 0, 1, 1, 1, 0, 1, 1)
    assert [int(row[0] >= 60) for row in cut.tokens] == list(cut.kinds)
    assert [part["windows"] for part in cut.parts] == [2, 6]
    whole = {"windows": 8, "tokens": 24, "corpus": " + ".join(texts)}
    assert cut.provenance | whole == cut.provenance


def test_each_kind_is_cut_as_by_itself(texts):
    cut = Mixture(parts(texts, 1, 1), 4, 3, 7).cut(word_tokenizer())
    for kind, text in enumerate(texts):
        alone = token_windows(word_tokenizer(), text, "all", 2, 3, 7)
        assert torch.equal(cut.tokens[torch.tensor(cut.kinds) == kind], alone.tokens)


def test_mixture_without_a_window_of_each_kind_or_of_a_text_with_itself_is_refused(texts):
    with pytest.raises(ValueError, match=r"windows = 8 leaves none for corpus .*low.txt"):
        Mixture(parts(texts, 1, 99), 8, 3, None).check()
    twice = (Part(texts[0], "all[:60%]"), Part(texts[0], "all[50%:]"))
    with pytest.raises(ValueError, match=r"part 1 and part 2 overlap: .* give each kind of text"):
        Mixture(twice, 4, 3, None).check()


def test_splits_and_shares_go_with_the_corpora():
    corpora, splits = ["embedded", "c4"], ["fitness", "validation"]
    options = Options(
        corpus=corpora, share=[3, 1], samples=8, eval_corpus=corpora, eval_split=splits
    )
    (text,), (one, other) = _texts(options, 4).values()
    assert text.parts == (Part("embedded", "calibration", 3), Part("c4", "train", 1))
    assert (one.places, other.places) == ([("embedded", "fitness")], [("c4", "validation")])
