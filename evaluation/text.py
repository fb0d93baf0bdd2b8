"""Texts: CPython's own help topics, corpora of the Hugging Face hub, local files.

A corpus is a name or a path, which ends in .txt, .json, .jsonl or .parquet. `embedded` is the text
that every CPython carries (`pydoc_data.topics`), so that all runs with no download; `wikitext2`,
`c4` and `ptb` are the field's and come from the hub.

A split is `name` or `name[a%:b%]` (either bound may be left out); a local file has a single one,
whatever its name. Slices cut the text, not tokens, which are each tokenizer's, nor rows, of which
one may be a whole text; neighbouring slices share nothing.
"""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Topics that quote each other are in one part, and each part has its share of statements, data
# model and expressions. Any other topic, also of a later CPython, is for training.
HELD_OUT_TOPICS = {
    "report": "sequence-types numeric-types callable-types import strings for while if else break "
    "continue assert pass subscriptions slicings exprlists",
    "selection": "typesmapping dict async await with context-managers execmodel naming "
    "dynamic-features calls unary bitwise shifting",
    "fitness": "customization function class lambda assignment augassign del global nonlocal "
    "return booleans",
    "calibration": "attribute-access try raise exceptions comparisons in binary",
}
EMBEDDED = "embedded"
EMBEDDED_PARTS = ("training", *reversed(HELD_OUT_TOPICS))

# How `datasets` reads a local file, by the end of its name.
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Corpus:
    """How `datasets` reads a corpus."""

    path: str
    joins: Mapping[str, str]  # split -> what goes between documents
    revision: str | None = None
    name: str | None = None
    column: str = "text"
    data_files: Mapping[str, str] | None = None  # one for each split of a large corpus
    documents: int | None = None  # that are streamed of it, from the first
    splits: tuple[str, str] = ("train", "test")  # for calibration and for evaluation


CORPORA = {
    EMBEDDED: Corpus(
        path="pydoc_data", joins=dict.fromkeys(EMBEDDED_PARTS, ""), splits=("calibration", "report")
    ),
    # Joined as in the data loaders of SparseGPT (arXiv:2301.00774) and Wanda (arXiv:2306.11695).
    "wikitext2": Corpus(
        path="Salesforce/wikitext",
        name="wikitext-2-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        joins={"train": " ", "validation": "\n\n", "test": "\n\n"},
    ),
    # 4,000 documents are about 2 million tokens: 128 windows of 4,096 tokens four times over.
    "c4": Corpus(
        path="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        joins={"train": " ", "validation": " "},
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        documents=4000,
        splits=("train", "validation"),
    ),
    # The main revision is a loading script, which datasets 4 and later refuse to run.
    "ptb": Corpus(
        path="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        column="sentence",
        joins={"train": " ", "validation": " ", "test": " "},
    ),
}


class Slice(NamedTuple):
    """A slice of a text, in percent."""

    corpus: str  # a name, or the full path of a file
    split: str
    first: int
    last: int
    source: Corpus


def find(corpus: str, split: str) -> Slice:
    """Return where a text is, without reading it; raises ValueError if it is not there."""
    match = re.fullmatch(r"([\w-]*)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", split)
    first, last = (int(match[2] or 0), int(match[3] or 100)) if match else (0, 0)
    if not match or not split or not first < last <= 100:
        rule = "name, name[a%:b%], name[a%:] or name[:b%], whole percents, a < b <= 100"
        raise ValueError(f"split must be {rule}; got {split!r}")
    if source := CORPORA.get(corpus):
        if match[1] not in source.joins:
            rule = f"must be one of {', '.join(source.joins)}"
            raise ValueError(f"split of corpus {corpus!r} {rule}; got {match[1]!r}")
        return Slice(corpus, match[1], first, last, source)
    reader = READERS.get(Path(corpus).suffix)
    file = os.path.realpath(os.path.expanduser(corpus))  # noqa: PTH111  # Path's may raise
    if not reader or not Path(file).is_file():
        rule = f"{', '.join(CORPORA)} or a {', '.join(READERS)} file that is there"
        raise ValueError(f"corpus must be {rule}; got {corpus!r}")
    local = Corpus(reader, joins={"train": "\n\n"}, data_files={"train": glob.escape(file)})
    return Slice(file, "train", first, last, local)


def load_text(corpus: str, split: str) -> str:
    """Return a split's documents, joined, and cut at line starts; raises as `load_documents`."""
    part = find(corpus, split)
    text = part.source.joins[part.split].join(load_documents(part, part.source.documents))

    def position(percent: int) -> int:
        # Of the first line at or after a percentage; in a text of one line, of the first word.
        start = len(text) * percent // 100
        if start == 0 or percent == 100:
            return start
        end = text.find("\n" if "\n" in text else " ", start - 1)
        return end + 1 if end >= 0 else len(text)

    return text[position(part.first) : position(part.last)]


def load_documents(part: Slice, first: int | None = None) -> Sequence[str]:
    """Return the documents of a split, without its slice: the rows of a table, a whole .txt file.

    Only the first so many are streamed; of all, each of the hub's is read when it is looked at.
    Raises ValueError if a file is not of the kind its suffix says, or the hub does not serve it.
    """
    source, split = part.source, part.split
    if part.corpus == EMBEDDED:
        return [_embedded_text(split)]
    import datasets  # here, since the embedded text does not need it and it takes a second

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or it tells the hub of each local file
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are told below
    # A streamed file is neither copied to a cache nor taken from one that is older than the file.
    streaming = first is not None or part.corpus not in CORPORA
    files = source.data_files and {split: source.data_files[split]}
    where = {"revision": source.revision, "data_files": files, "split": split}
    try:
        if source.path == "text":
            return [Path(part.corpus).read_text(encoding="utf-8")]
        rows = datasets.load_dataset(source.path, source.name, streaming=streaming, **where)
        documents: Sequence[str] = (rows if first is None else rows.take(first))[source.column]
        if streaming:
            documents = [text for text in documents if text is not None]
            if not all(isinstance(text, str) for text in documents):
                raise ValueError(f"column {source.column!r} has other values")
        return documents
    except (OSError, KeyError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as e:
        cause = f"{type(e).__name__}: {e}".partition("\n")[0]
        way_out = f"give {EMBEDDED}, UTF-8 text, or rows with a string column {source.column!r}"
        raise ValueError(f"corpus {part.corpus!r} cannot be read ({cause}): {way_out}") from e


def _embedded_text(part: str) -> str:
    """Return one part of CPython's help topics, which quote each other; no two share a paragraph.

    It is kept where it first appears; held-out parts come first, so none of theirs is trained on.
    """
    from pydoc_data.topics import topics

    parts = {name: sorted(names.split()) for name, names in HELD_OUT_TOPICS.items()}
    parts["training"] = sorted(set(topics).difference(*parts.values()))
    first: dict[str, tuple[str, str]] = {}  # part and paragraph in which words appear first
    for name, names in parts.items():
        for paragraph in "\n\n".join(topics.get(topic, "") for topic in names).split("\n\n"):
            # An indented quotation is still a quotation.
            first.setdefault(" ".join(paragraph.split()), (name, paragraph.strip("\n")))
    kept = (paragraph for words, (name, paragraph) in first.items() if words and name == part)
    return "\n\n".join(kept) + "\n"
