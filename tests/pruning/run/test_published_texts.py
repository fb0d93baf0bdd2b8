"""The recipes of published tables: their texts and windows, on files laid out as the hub's."""

import gzip
import json
import random
from dataclasses import replace
from functools import cache

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import processors
from transformers import AutoTokenizer

from prunevolve.evaluation.text import CORPORA
from prunevolve.pruning.run.job import calibration_texts, evaluation_texts
from prunevolve.pruning.run.options import Request, read_recipe

C4_FILE = "en/c4-train.00000-of-01024.json.gz"
WIKITEXT_CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
---
"""


def pages(count: int, longest: int) -> list[str]:
    generator = random.Random(7)
    letters = "abcdefgh é\n"
    lengths = [int(longest ** generator.random()) for _ in range(count)]
    return ["".join(generator.choices(letters, k=length)) for length in lengths]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> tuple[list[str], list[str]]:
    """C4's first shard and WikiText-2's test rows in local files of the hub's layout."""
    documents = pages(30, longest=9000)
    shard = tmp_path / "c4" / C4_FILE
    shard.parent.mkdir(parents=True)
    record = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://example.com"}
    with gzip.open(shard, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text} | record) + "\n" for text in documents)
    rows = [" = Title = \n", "", *pages(20, longest=7000)]
    table = tmp_path / "wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet"
    table.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": rows}), table)
    (tmp_path / "wikitext/README.md").write_text(WIKITEXT_CARD)
    for corpus, folder in (("c4", "c4"), ("wikitext2", "wikitext")):
        source = replace(CORPORA[corpus], path=str(tmp_path / folder))
        monkeypatch.setitem(CORPORA, corpus, source)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return documents, rows


@pytest.mark.parametrize(("recipe", "length"), [("wanda-2048", 2048), ("wanda-4096", 4096)])
def test_recipe_draws_the_published_windows(hub, tiny_llama_dir, recipe, length):
    documents, rows = hub
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    bos = processors.TemplateProcessing(single="b $A", special_tokens=[("b", 9)])
    tokenizer.backend_tokenizer.post_processor = bos  # before each document, as LLaMA 2 has it
    request = Request(**read_recipe(recipe, None))
    drawn, judged = (
        texts_of(request, request.seqlen)[0].cut(tokenizer)
        for texts_of in (calibration_texts, evaluation_texts)
    )

    @cache
    def ids_of(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    random.seed(0)
    calibration = []
    while len(calibration) < 128:
        ids = ids_of(documents[random.randint(0, len(documents) - 1)])
        if len(ids) > length:
            start = random.randint(0, len(ids) - length - 1)
            calibration.append(ids[start : start + length])
    assert drawn.tokens.tolist() == calibration
    whole = ids_of("\n\n".join(rows))
    count = len(whole) // length
    assert judged.tokens.flatten().tolist() == whole[: count * length]
    said = {"corpus": "c4", "split": "train", "windows": 128, "seed": 0, "by_document": True}
    assert drawn.provenance | said == drawn.provenance
