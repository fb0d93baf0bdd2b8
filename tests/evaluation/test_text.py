"""Corpora and splits: offline, and nothing of ours replaced."""

from itertools import combinations

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from refusals import refusal

from prunevolve.evaluation.text import EMBEDDED_PARTS, find, load_text

LINES = [f"line {i} of a text\n" for i in range(101)]


@pytest.mark.parametrize("middle", [1, 37, 99])
def test_slices_of_a_text_together_are_the_text(tmp_path, middle):
    path = tmp_path / "lines.txt"
    path.write_text("".join(LINES))
    parts = load_text(str(path), f"[:{middle}%]") + load_text(str(path), f"train[{middle}%:]")
    assert parts == load_text(str(path), "all") == "".join(LINES)


@pytest.mark.parametrize(
    ("corpus", "split", "message"),
    [
        *[
            ("embedded", split, f"whole percents, a < b <= 100; got {split!r}")
            for split in ("", "report[10:20]", "report[60%:50%]")
        ],
        ("wikitext2", "valid", "must be one of train, validation, test; got 'valid'"),
        (__file__, "all", f".txt, .json, .jsonl, .parquet file that is there; got {__file__!r}"),
    ],
)
def test_corpus_or_split_that_is_not_there_is_refused(corpus, split, message):
    assert refusal(find, corpus, split).endswith(message)


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


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.parquet", b"no parquet", " (ArrowInvalid: "),
        ("a.jsonl", b'{"content": "one"}', " (KeyError: 'text'): give embedded, UTF-8 text, or "),
        ("a.jsonl", b'{"text": 1}', " (ValueError: column 'text' has other values): "),
        ("a.txt", "caf\u00e9".encode("latin-1"), " (UnicodeDecodeError: "),
    ],
)
def test_file_of_another_kind_is_refused(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(load_text, str(path), "all")
    assert message.startswith(f"corpus {str(path)!r} cannot be read{problem}")
