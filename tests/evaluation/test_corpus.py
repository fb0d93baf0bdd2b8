"""Corpora, splits and windows: offline, and nothing of ours replaced."""

import hashlib
import json
import random
from itertools import combinations
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from refusals import refusal
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from word_tokenizer import BOS, word_tokenizer

from prunevolve.evaluation.corpus import draw_windows, special_note, token_windows
from prunevolve.evaluation.sources import (
    EMBEDDED_PARTS,
    HUB_CORPORA,
    check_available,
    check_disjoint,
    load_text,
)

LINES = [f"line {i} of a text\n" for i in range(101)]
NUMBERS = " ".join(str(i) for i in range(100))  # 100 words, and the i-th word is token i


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(LINES))
    return str(path)


@pytest.fixture
def numbers_file(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(NUMBERS)
    return str(path)


@pytest.fixture
def windows_of(numbers_file):
    """Cut windows of the numbers, whose tokens are themselves."""
    tokenizer = word_tokenizer(model_max_length=8)
    return lambda *layout, split="all": token_windows(tokenizer, numbers_file, split, *layout)


@pytest.mark.parametrize("middle", [1, 37, 50, 99])
def test_slices_of_a_text_together_are_the_text(text_file, middle):
    parts = load_text(text_file, f"[:{middle}%]") + load_text(text_file, f"[{middle}%:]")
    assert parts == "".join(LINES)


@pytest.mark.parametrize(
    ("text", "half"),
    [
        ("aaaaaa\nb\nc\n", "aaaaaa\n"),  # 11 characters: 50% falls on the sixth 'a'
        ("aaaa\nbbbb\n", "aaaa\n"),
        ("aaa bbb ccc", "aaa bbb"),
    ],
)
def test_slice_is_cut_at_the_next_line_or_else_between_words(tmp_path, text, half):
    path = tmp_path / "text.txt"
    path.write_text(text)
    assert load_text(str(path), "[:50%]").rstrip(" ") == half


def test_name_of_a_local_split_does_not_matter(text_file):
    assert load_text(text_file, "all") == load_text(text_file, "train") == "".join(LINES)


@pytest.mark.parametrize(
    "split", ["", "report[", "report[10:20]", "report[60%:50%]", "report[:101%]", "a b", "x[5%]"]
)
def test_malformed_split_shows_the_rule(split):
    assert refusal(check_available, "embedded", split) == (
        "split must be name, name[a%:b%], name[a%:] or name[:b%], whole percents, a < b <= 100; "
        f"got {split!r}"
    )


CORPUS = "corpus must be one of ['embedded', 'wikitext2', 'c4', 'ptb'] or a path ending in .txt, "


@pytest.mark.parametrize(
    ("corpus", "split", "message"),
    [
        ("wikitext2", "valid", "must be one of ['train', 'validation', 'test']; got 'valid'"),
        ("notes.md", "all", CORPUS + ".json, .jsonl, .parquet; got 'notes.md'"),
        ("wikitext", "all", "got 'wikitext'; did you mean 'wikitext2'?"),
        ("none.txt", "all", "corpus file 'none.txt' is not there; looked at "),
    ],
)
def test_corpus_or_split_that_is_not_there_is_refused(corpus, split, message):
    assert message in refusal(check_available, corpus, split)


def paragraphs_of(text):
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")} - {""}


def test_embedded_parts_are_long_share_no_paragraph_and_keep_each_one():
    from pydoc_data.topics import topics

    texts = {part: load_text("embedded", part) for part in EMBEDDED_PARTS}
    for part, text in texts.items():
        assert len(text) > (180_000 if part == "training" else 37_000)
    paragraphs = [paragraphs_of(text) for text in texts.values()]
    assert not any(one & other for one, other in combinations(paragraphs, 2))
    assert set.union(*paragraphs) == paragraphs_of("\n\n".join(topics.values()))


def test_documents_of_json_and_parquet_are_joined_by_a_blank_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache := tmp_path / "cache")
    records, lines, table = (tmp_path / f"two.{end}" for end in ("json", "jsonl", "parquet"))
    records.write_text('[{"text": "one", "id": 1}, {"text": "two"}]')
    lines.write_text('{"text": "one", "id": 1}\n{"text": "two"}\n')
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), table)
    for path in (records, lines, table):
        assert load_text(str(path), "all") == "one\n\ntwo"
    assert sorted(tmp_path.iterdir()) == [cache, records, lines, table]
    assert {path.suffix for path in cache.iterdir()} == {".lock"}  # and no copy


def test_file_without_text_column_is_refused(tmp_path):
    path = tmp_path / "other.parquet"
    parquet.write_table(pyarrow.table({"content": ["one"], "text": [1]}), path)
    assert refusal(load_text, str(path), "all") == (
        f"corpus file {str(path)!r} must have a string column 'text'; has ['content', 'text']"
    )


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.parquet", b"no parquet", " (ArrowInvalid: "),
        ("a.jsonl", b"plain text\n", " (ArrowInvalid: "),
        ("a.jsonl", b"[" * 100_000, " (ValueError: "),
        ("a.txt", "caf\u00e9".encode("latin-1"), " (UnicodeDecodeError: "),
    ],
)
def test_broken_file_is_refused(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(load_text, str(path), "all")
    assert len(message) < 700
    assert message.startswith(f"corpus file {str(path)!r} cannot be read{problem}")


def test_name_that_reads_as_a_pattern_is_that_of_a_file(tmp_path):
    path = tmp_path / "a[1]*.txt"
    path.write_bytes(b"one\r\n\n two")
    assert load_text(str(path), "all") == "one\n\n two"


def test_hub_corpora_alone_are_noted_as_unchecked(text_file):
    for corpus in HUB_CORPORA:
        assert check_available(corpus, "validation[:50%]") == (
            f"corpus {corpus!r}, split 'validation[:50%]' comes from the Hugging Face hub: "
            "not checked"
        )
    assert check_available("embedded", "report") is None
    assert check_available(text_file, "[:50%]") is None


def test_windows_are_spread_evenly_or_all_in_a_row(windows_of):
    assert windows_of(3, 2, None).tokens.tolist() == [[0, 1], [33, 34], [66, 67]]
    tokens = windows_of(None, 7, None).tokens
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, torch.arange(98).view(14, 7))


def test_seeded_windows_are_runs_of_the_text_that_repeat_with_the_seed(windows_of):
    tokens = windows_of(40, 5, 1).tokens
    assert torch.equal(tokens - tokens[:, :1], torch.arange(5).expand(40, 5))
    assert torch.equal(tokens, windows_of(40, 5, 1).tokens)
    assert not torch.equal(tokens, windows_of(40, 5, 2).tokens)
    assert torch.equal(windows_of(2, 100, 0).tokens, torch.arange(100).expand(2, 100))


def test_provenance_says_where_the_tokens_come_from(windows_of, numbers_file, capfd):
    provenance = windows_of(None, 30, None, split="[:100%]").provenance
    assert json.loads(json.dumps(provenance)) == {
        **{"corpus": numbers_file, "split": "[:100%]", "windows": 3, "length": 30, "tokens": 90},
        **{"seed": None, "bos": False},
        "text_sha256": hashlib.sha256(NUMBERS.encode()).hexdigest(),
    }
    assert capfd.readouterr().err == ""  # though the text is longer than the model's context


@pytest.mark.parametrize(
    ("windows", "length", "seed", "message"),
    [
        (3, 34, None, "split 'all' has 100 tokens; 3 windows of 34 need at least 102: "),
        (5, 101, 0, "split 'all' has 100 tokens; 5 windows of 101 need at least 101: "),
        (0, 8, None, "windows must be at least 1, or None for all; got 0"),
        (1, 0, None, "length must be at least 1 tokens; got 0"),
        (1, 8, -1, "seed must be at least 0, or None; got -1"),
    ],
)
def test_impossible_layout_is_refused(windows_of, windows, length, seed, message):
    assert message in refusal(windows_of, windows, length, seed)


def test_disjoint_texts_give_no_line(text_file):
    texts = {
        "calibration": [("embedded", "calibration"), ("embedded", "training")],
        "fitness": [("embedded", "fitness[:50%]")],
        "selection": [("embedded", "fitness[50%:]")],
        "report": [(text_file, "all")],
    }
    assert check_disjoint(texts) == []


def test_overlapping_texts_are_described_by_pairs(text_file, monkeypatch):
    monkeypatch.chdir(Path(text_file).parent)
    texts = {
        "fitness": [("c4", "train"), ("ptb", "train[:51%]"), (text_file, "train")],
        "report": [("ptb", "train[50%:]"), ("./lines.txt", "test")],
    }
    assert check_disjoint(texts) == [
        "fitness and report overlap: ptb train[:51%] and ptb train[50%:]",
        f"fitness and report overlap: {text_file} train and ./lines.txt test",
    ]
    assert len(check_disjoint({role: [("c4", "train")] for role in "abc"})) == 3


def test_special_tokens_are_told_by_share_and_name_bos_excepted():
    words = {"<s>": 0, "<unk>": 1, "</s>": 2, "a": 3}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", unk_token="<unk>", eos_token="</s>"
    )
    assert special_note(torch.tensor([[0, 3, 3, 3], [0, 3, 3, 3]]), tokenizer) is None
    note = special_note(torch.tensor([[0, 1, 3, 1], [0, 3, 2, 3]]), tokenizer)
    assert note and note.startswith(
        "37.5% of the calibration tokens are special ones such as <unk>"
    )


def document(first: int, words: int) -> str:
    return " ".join(str(first + word) for word in range(words))


def test_windows_are_runs_of_documents_in_the_order_of_the_published_drawing():
    # With bos they have 4, 8, 21, 9 and 31 tokens: a window of 8 needs more than 8.
    lengths = [3, 7, 20, 8, 30]
    documents = [document(100 * place, words) for place, words in enumerate(lengths)]
    tokens, _ = draw_windows(word_tokenizer("<s>", adds_bos=True), documents, 40, 8, seed=3)

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
    (tokens, sha256), again = (
        draw_windows(word_tokenizer("<s>", adds_bos=True), documents, 4, 8, 0) for _ in range(2)
    )
    other, other_sha256 = draw_windows(word_tokenizer("<s>", adds_bos=True), documents, 4, 8, 1)
    assert torch.equal(tokens, again[0])
    assert (sha256, not torch.equal(tokens, other)) == (again[1], True)
    assert sha256 != other_sha256


def test_documents_that_are_all_too_short_are_refused():
    with pytest.raises(ValueError, match="none of 2 documents has more than 8 tokens, which a w"):
        draw_windows(
            word_tokenizer("<s>", adds_bos=True), [document(0, 7), document(0, 2)], 4, 8, 0
        )
