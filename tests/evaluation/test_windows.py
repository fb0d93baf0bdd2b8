"""Windows of one text, of single documents, and of several texts."""

import hashlib
from pathlib import Path

import pytest
import torch
from refusals import refusal
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prunevolve.evaluation.windows import Text, check_disjoint, cut_all, share_windows

BOS = 1000


def word_tokenizer(bos=None, adds_bos=False, **settings) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words 0 to 999, which may have a bos and put it first."""
    words = {str(number): number for number in range(BOS)} | ({bos: BOS} if bos else {})
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, **settings)


NUMBERS = " ".join(str(i) for i in range(100))  # 100 words, and the i-th word is token i


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(NUMBERS)
    return str(path)


@pytest.fixture
def windows_of(numbers):
    """Cut windows of the numbers, whose tokens are themselves."""
    tokenizer = word_tokenizer(model_max_length=8)
    return lambda *layout, split="all": Text(numbers, split, *layout).cut(tokenizer)


@pytest.fixture
def halves(tmp_path):
    paths = [tmp_path / f"{name}.txt" for name in ("low", "high")]
    for path, first in zip(paths, (0, 60), strict=True):
        path.write_text(" ".join(str(number) for number in range(first, first + 40)))
    return [str(path) for path in paths]


def test_windows_are_spread_evenly_or_all_in_a_row(windows_of, numbers):
    assert windows_of(3, 2).tokens.tolist() == [[0, 1], [33, 34], [66, 67]]
    tokens = windows_of(None, 7).tokens
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, torch.arange(98).view(14, 7))
    few, all_ = (Text(numbers, "all", None, 7, most=n).cut(word_tokenizer()) for n in (4, 14))
    assert few.tokens[:, 0].tolist() == [0, 25, 50, 75]
    assert torch.equal(all_.tokens, tokens)


def test_seeded_windows_are_runs_of_the_text_that_repeat_with_the_seed(windows_of):
    tokens = windows_of(40, 5, 1).tokens
    assert torch.equal(tokens - tokens[:, :1], torch.arange(5).expand(40, 5))
    assert torch.equal(tokens, windows_of(40, 5, 1).tokens)
    assert not torch.equal(tokens, windows_of(40, 5, 2).tokens)


def test_provenance_says_where_the_tokens_come_from(windows_of, numbers, capfd):
    assert windows_of(None, 30, split="[:100%]").provenance == {
        **{"corpus": numbers, "split": "[:100%]", "windows": 3, "length": 30, "tokens": 90},
        **{"seed": None, "bos": False},
        "text_sha256": hashlib.sha256(NUMBERS.encode()).hexdigest(),
    }
    assert capfd.readouterr().err == ""  # though the text is longer than the model's context


@pytest.mark.parametrize("layout", [(3, 34, None), (5, 101, 0)])
def test_windows_that_do_not_fit_the_text_are_refused(windows_of, layout):
    windows, length, _ = layout
    problem = f"windows must be at least 1 and fit the text, got {windows} of {length} tokens; "
    assert refusal(windows_of, *layout).startswith(problem)


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
def test_windows_begin_with_bos_if_asked_or_if_the_tokenizer_does(halves, adds, bos, expected):
    cut = Text(halves[0], "all", 2, 3, bos=bos).cut(word_tokenizer("<s>", adds))
    assert cut.tokens.tolist() == expected
    assert cut.provenance["bos"] == (adds if bos is None else bos)


def test_bos_needs_a_tokenizer_that_has_one(numbers):
    message = refusal(Text(numbers, "all", 2, 3, bos=True).cut, word_tokenizer())
    assert message.startswith("bos must be false for a tokenizer that has no bos")


def test_documents_that_are_too_short_or_sliced_are_refused(tmp_path):
    place = str(tmp_path / "documents.jsonl")
    Path(place).write_text('{"text": "1 2 3 4 5 6 7"}\n{"text": "8 9"}\n')
    text = Text(place, "all", 4, 8, seed=0, by_document=True)
    message = refusal(text.cut, word_tokenizer("<s>", adds_bos=True))
    assert message == f"{place!r} has no document of over 8 tokens"
    sliced = Text(place, "[:50%]", 4, 8, seed=0, by_document=True)
    assert refusal(sliced.check) == "a split drawn by document must have no slice, got '[:50%]'"


def shared(places, shares, windows, seed=None):
    return share_windows([Text(place, "all", windows, 3, seed) for place in places], shares)


def test_kinds_are_cut_as_by_themselves_and_stand_among_each_other_evenly(halves):
    cut = cut_all(shared(halves, (1, 3), 8, seed=7), word_tokenizer())
    assert cut.kinds == (1, 0, 1, 1, 1, 0, 1, 1)
    assert [int(row[0] >= 60) for row in cut.tokens] == list(cut.kinds)
    assert [part["windows"] for part in cut.parts] == [2, 6]
    whole = {"windows": 8, "tokens": 24, "corpus": " + ".join(halves)}
    assert cut.provenance | whole == cut.provenance
    for kind, count in enumerate((2, 6)):
        alone = Text(halves[kind], "all", count, 3, seed=7).cut(word_tokenizer())
        assert torch.equal(cut.tokens[torch.tensor(cut.kinds) == kind], alone.tokens)


def test_texts_share_the_windows_unless_they_overlap(halves):
    assert [text.windows for text in shared(halves, (1, 1), 5)] == [3, 2]
    assert [text.windows for text in shared(halves, (1, 2), 4)] == [1, 3]
    twice = [Text(halves[0], split, 4, 3) for split in ("all[:60%]", "all[50%:]")]
    assert refusal(share_windows, twice, (1, 1)).startswith("part 1 and part 2 overlap: ")


def of_role(*places):
    return [Text(*place, windows=1, length=8) for place in places]


def test_overlapping_texts_are_described_by_pairs(numbers, monkeypatch):
    monkeypatch.chdir(Path(numbers).parent)
    texts = {
        "fitness": of_role(("c4", "train"), ("ptb", "train[:51%]"), (numbers, "train")),
        "selection": of_role(("embedded", "fitness[:50%]"), ("c4", "validation")),
        "report": of_role(("ptb", "train[50%:]"), ("./numbers.txt", "test")),
        "calibration": of_role(("embedded", "fitness[50%:]")),
    }
    assert check_disjoint(texts) == [
        "fitness and report overlap: ptb train[:51%] and ptb train[50%:]",
        f"fitness and report overlap: {numbers} train and ./numbers.txt test",
    ]
