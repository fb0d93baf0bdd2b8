"""Corpora, splits and windows: offline, and nothing of ours replaced."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evaluation.corpus import special_note, token_windows
from evaluation.sources import (
    EMBEDDED_PARTS,
    HUB_CORPORA,
    check_available,
    check_disjoint,
    load_text,
)

LINES = [f"line {i} of a text\n" for i in range(101)]
NUMBERS = " ".join(str(i) for i in range(100))  # 100 words, and the i-th word is token i


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "lines.txt"
    path.write_text("".join(LINES))
    return str(path)


@pytest.fixture
def numbers_file(tmp_path: Path) -> str:
    path = tmp_path / "numbers.txt"
    path.write_text(NUMBERS)
    return str(path)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(i): i for i in range(100)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=8)


def refusal(corpus: str, split: str) -> str:
    with pytest.raises(ValueError) as error:
        check_available(corpus, split)
    return str(error.value)


# Splits


@pytest.mark.parametrize("middle", [1, 37, 50, 99])
def test_slices_of_a_text_together_are_the_text(text_file: str, middle: int) -> None:
    parts = load_text(text_file, f"[:{middle}%]") + load_text(text_file, f"[{middle}%:]")
    assert parts == "".join(LINES)


def test_slices_are_cut_at_line_starts(text_file: str) -> None:
    lines = load_text(text_file, "all[20%:60%]").splitlines(keepends=True)
    assert lines == LINES[LINES.index(lines[0]) : LINES.index(lines[-1]) + 1]


def test_slice_cut_moves_forward_to_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "uneven.txt"
    path.write_text("aaaaaa\nb\nc\n")  # 11 characters: 50% falls on the sixth 'a'
    assert load_text(str(path), "[:50%]") == "aaaaaa\n"


def test_slice_cut_on_a_line_start_stays_there(tmp_path: Path) -> None:
    path = tmp_path / "even.txt"
    path.write_text("aaaa\nbbbb\n")
    assert load_text(str(path), "[:50%]") == "aaaa\n"


def test_slices_of_a_text_without_lines_are_cut_between_words(numbers_file: str) -> None:
    first, second = load_text(numbers_file, "[:50%]"), load_text(numbers_file, "[50%:]")
    assert first.split() + second.split() == NUMBERS.split()


def test_name_of_a_local_split_does_not_matter(text_file: str) -> None:
    assert load_text(text_file, "all") == load_text(text_file, "train") == "".join(LINES)


@pytest.mark.parametrize(
    "split", ["", "report[", "report[10:20]", "report[60%:50%]", "report[:101%]", "a b", "x[5%]"]
)
def test_malformed_split_shows_the_rule(split: str) -> None:
    assert refusal("embedded", split) == (
        "split must be name, name[a%:b%], name[a%:] or name[:b%], whole percents, a < b <= 100; "
        f"got {split!r}"
    )


def test_unknown_split_lists_the_known_ones() -> None:
    assert refusal("wikitext2", "valid") == (
        "split of corpus 'wikitext2' must be one of ['train', 'validation', 'test']; got 'valid'"
    )


# Embedded corpus


@pytest.mark.parametrize(("one", "other"), list(combinations(EMBEDDED_PARTS, 2)))
def test_embedded_parts_share_no_paragraph(one: str, other: str) -> None:
    paragraphs = [
        {" ".join(paragraph.split()) for paragraph in load_text("embedded", part).split("\n\n")}
        for part in (one, other)
    ]
    assert not paragraphs[0] & paragraphs[1]


@pytest.mark.parametrize("part", EMBEDDED_PARTS)
def test_embedded_parts_are_long_enough(part: str) -> None:
    assert len(load_text("embedded", part)) > (180_000 if part == "training" else 37_000)


def test_embedded_parts_keep_each_paragraph_of_the_topics() -> None:
    from pydoc_data.topics import topics

    kept = "\n\n".join(load_text("embedded", part) for part in EMBEDDED_PARTS)
    paragraphs = {" ".join(paragraph.split()) for paragraph in kept.split("\n\n")}
    wanted = "\n\n".join(topics.values()).split("\n\n")
    assert {" ".join(paragraph.split()) for paragraph in wanted} - {""} == paragraphs


# Local files


def test_jsonl_documents_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "one", "id": 1}\n{"text": "two"}\n')
    assert load_text(str(path), "all") == "one\n\ntwo"


def test_parquet_documents_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "two.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), path)
    assert load_text(str(path), "all") == "one\n\ntwo"


def test_parquet_reading_writes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    parquet.write_table(pyarrow.table({"text": ["one"]}), path)
    load_text(str(path), "all")
    assert list(tmp_path.iterdir()) == [path]


def test_parquet_without_text_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    parquet.write_table(pyarrow.table({"content": ["one"], "text": [1]}), path)
    assert refusal(str(path), "all") == (
        f"corpus file {str(path)!r} must have a string column 'text'; has ['content', 'text']"
    )


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"no parquet")
    assert f"corpus file {str(path)!r} is not a parquet file: " in refusal(str(path), "all")


def test_jsonl_record_without_text_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "one"}\n{"content": "two"}\n')
    with pytest.raises(ValueError, match="line 2 has no string field 'text'"):
        load_text(str(path), "all")


def test_jsonl_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text("plain text\n")
    assert f"corpus file {str(path)!r} line 1 is no JSON: " in refusal(str(path), "all")


def test_file_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    assert f"corpus file {str(path)!r} must be UTF-8 text: " in refusal(str(path), "all")


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "none.txt")
    assert refusal(path, "all") == f"corpus file {path!r} is not there; looked at {path!r}"


def test_wrong_suffix_is_refused() -> None:
    assert refusal("notes.md", "all") == (
        "corpus must be one of ['embedded', 'wikitext2', 'c4', 'ptb'] or a path ending in "
        ".txt, .jsonl, .parquet; got 'notes.md'"
    )


def test_unknown_name_gets_a_near_match() -> None:
    assert refusal("wikitext", "train") == (
        "corpus must be one of ['embedded', 'wikitext2', 'c4', 'ptb'] or a path ending in "
        ".txt, .jsonl, .parquet; got 'wikitext'; did you mean 'wikitext2'?"
    )


# Hub


@pytest.mark.parametrize("corpus", list(HUB_CORPORA))
def test_hub_corpus_is_noted_as_unchecked(corpus: str) -> None:
    assert check_available(corpus, "validation[:50%]") == (
        f"corpus {corpus!r}, split 'validation[:50%]' comes from the Hugging Face hub: not checked"
    )


def test_embedded_and_local_texts_need_no_note(text_file: str) -> None:
    assert check_available("embedded", "report") is None
    assert check_available(text_file, "[:50%]") is None


def test_offline_hub_without_cache_is_one_clear_line(tmp_path: Path) -> None:
    # In a process of its own, since the library reads these variables when it is imported.
    program = "from evaluation.sources import load_text; load_text('wikitext2', 'test')"
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    run = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | settings, capture_output=True, text=True
    )
    assert run.stderr.splitlines()[-1] == (
        "ValueError: corpus 'wikitext2': the Hugging Face hub could not be reached or did not "
        "serve it (ConnectionError: Couldn't reach 'Salesforce/wikitext' on the Hub "
        "(OfflineModeIsEnabled)); use 'embedded' or a local .txt, .jsonl, .parquet file instead"
    )


# Windows


def test_even_windows_are_spread_over_the_text(
    numbers_file: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = token_windows(tokenizer, numbers_file, "all", 3, 2, None).tokens
    assert tokens.tolist() == [[0, 1], [33, 34], [66, 67]]


def test_all_windows_are_contiguous_and_whole(
    numbers_file: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = token_windows(tokenizer, numbers_file, "all", None, 7, None).tokens
    assert torch.equal(tokens, torch.arange(98).view(14, 7))


def test_seeded_windows_are_runs_of_the_text(
    numbers_file: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = token_windows(tokenizer, numbers_file, "all", 40, 5, 1).tokens
    assert torch.equal(tokens - tokens[:, :1], torch.arange(5).expand(40, 5))


def test_seeded_windows_repeat_with_the_seed(
    numbers_file: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    draws = [token_windows(tokenizer, numbers_file, "all", 8, 5, s).tokens for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_seeded_window_may_be_the_whole_text(
    numbers_file: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = token_windows(tokenizer, numbers_file, "all", 2, 100, 0).tokens
    assert torch.equal(tokens, torch.arange(100).expand(2, 100))


def test_windows_are_int64(numbers_file: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert token_windows(tokenizer, numbers_file, "all", 2, 3, 0).tokens.dtype == torch.int64


def test_provenance_says_where_the_tokens_come_from(
    numbers_file: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    provenance = token_windows(tokenizer, numbers_file, "[:100%]", None, 30, None).provenance
    assert json.loads(json.dumps(provenance)) == {
        "corpus": numbers_file,
        "split": "[:100%]",
        "windows": 3,
        "length": 30,
        "tokens": 90,
        "seed": None,
        "bos": False,
        "text_sha256": hashlib.sha256(NUMBERS.encode()).hexdigest(),
    }


def test_long_text_raises_no_tokenizer_warning(
    numbers_file: str, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    token_windows(tokenizer, numbers_file, "all", None, 10, None)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("windows", "length", "seed", "needs"),
    [
        (3, 34, None, "3 windows without overlap of 34 need 102"),
        (None, 101, None, "a window of 101 need 101"),
        (5, 101, 0, "a window of 101 need 101"),
    ],
)
def test_short_text_names_tokens_had_and_needed(
    numbers_file: str,
    tokenizer: PreTrainedTokenizerFast,
    windows: int | None,
    length: int,
    seed: int | None,
    needs: str,
) -> None:
    with pytest.raises(ValueError) as error:
        token_windows(tokenizer, numbers_file, "all", windows, length, seed)
    assert str(error.value) == f"corpus {numbers_file!r}, split 'all' has 100 tokens; {needs}"


@pytest.mark.parametrize(
    ("windows", "length", "seed", "message"),
    [
        (0, 8, None, "windows must be at least 1, or None for all; got 0"),
        (1, 0, None, "length must be at least 1 token; got 0"),
        (1, 8, -1, "seed must be at least 0, or None; got -1"),
        (None, 8, 3, "seed must be None when windows is None (all windows); got 3"),
    ],
)
def test_impossible_layout_is_refused(
    tokenizer: PreTrainedTokenizerFast,
    windows: int | None,
    length: int,
    seed: int | None,
    message: str,
) -> None:
    with pytest.raises(ValueError) as error:
        token_windows(tokenizer, "embedded", "report", windows, length, seed)
    assert str(error.value) == message


# Overlaps


def test_disjoint_texts_give_no_line(text_file: str) -> None:
    texts = {
        "calibration": [("embedded", "calibration"), ("embedded", "training")],
        "fitness": [("embedded", "fitness[:50%]")],
        "selection": [("embedded", "fitness[50%:]")],
        "report": [(text_file, "all")],
    }
    assert check_disjoint(texts) == []


def test_overlapping_slices_are_described() -> None:
    texts = {
        "fitness": [("c4", "train"), ("ptb", "train[:51%]")],
        "report": [("ptb", "train[50%:]")],
    }
    assert check_disjoint(texts) == [
        "fitness and report overlap: ptb train[:51%] and ptb train[50%:]"
    ]


def test_each_overlapping_pair_has_a_line() -> None:
    assert len(check_disjoint({role: [("c4", "train")] for role in "abc"})) == 3


def test_two_ways_to_write_a_path_are_one_corpus(
    text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(text_file).parent)
    texts = {"fitness": [(text_file, "train")], "report": [("./lines.txt", "test")]}
    assert check_disjoint(texts) == [
        f"fitness and report overlap: {text_file} train and ./lines.txt test"
    ]


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
