"""Where texts come from: CPython's own help topics, the Hugging Face hub, local files.

A corpus is one of four names or a path. `embedded` is the English text that every CPython carries
(`pydoc_data.topics`), so that the whole project runs with no download; `wikitext2`, `c4` and `ptb`
are the field's and come from the Hugging Face hub; a path ends in .txt, .json, .jsonl or .parquet.

A split is `name` or `name[a%:b%]` (either bound may be left out); a local file has a single one,
whatever its name. Slices cut the text, not the tokens, so that they mean the same for every
tokenizer, and not the rows of a table, of which one may be a whole text; neighbouring slices share
nothing.
"""

import difflib
import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

# Topics that quote each other are in one part, and each part has its share of statements, data
# model and expressions. Any other topic, including those that a later CPython adds, is for
# training, so none of its wording can be in a text that is measured.
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
SPLIT_RULE = "must be name, name[a%:b%], name[a%:] or name[:b%], whole percents, a < b <= 100"
READERS = {
    ".txt": {"path": "text", "sample_by": "document"},
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".parquet": {"path": "parquet"},
}
"""How `datasets.load_dataset` reads a local file, by the end of its name."""


@dataclass(frozen=True)
class HubCorpus:
    """Where a corpus is on the hub. `joins`: split -> what goes between documents.

    `data_files` gives one file per split when a whole corpus would be too much; the first
    `documents` of it are streamed.
    """

    path: str
    revision: str
    joins: Mapping[str, str]
    name: str | None = None
    column: str = "text"
    data_files: Mapping[str, str] | None = None
    documents: int | None = None


HUB_CORPORA = {
    # Joined as in the data loaders of SparseGPT (arXiv:2301.00774) and Wanda (arXiv:2306.11695).
    "wikitext2": HubCorpus(
        path="Salesforce/wikitext",
        name="wikitext-2-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        joins={"train": " ", "validation": "\n\n", "test": "\n\n"},
    ),
    # 4,000 documents are about 2 million tokens: 128 windows of 4,096 tokens four times over.
    "c4": HubCorpus(
        path="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        joins={"train": " ", "validation": " "},
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        documents=4000,
    ),
    # The main revision is a loading script, which datasets 4 and later refuse to run.
    "ptb": HubCorpus(
        path="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        column="sentence",
        joins={"train": " ", "validation": " ", "test": " "},
    ),
}


def load_text(corpus: str, split: str) -> str:
    """Return the text of a split, the documents joined, the slice cut at line starts.

    Raises:
        ValueError: If the corpus or split is unknown or malformed, a file is missing or is not of
            the kind its suffix says, or the hub does not serve the corpus.
    """
    check_available(corpus, split)
    name, first, last = _parse_split(split)
    if corpus == EMBEDDED:
        text = _embedded_text(name)
    elif source := HUB_CORPORA.get(corpus):
        text = source.joins[name].join(load_documents(corpus, name, source.documents))
    else:
        text = "\n\n".join(_local_documents(corpus))
    return text[_cut(text, first) : _cut(text, last)]


def load_documents(corpus: str, split: str, first: int | None = None) -> Sequence[str]:
    """Download a hub corpus, or read it from the hub's cache when HF_HUB_OFFLINE is set.

    Args:
        first: Stream only so many documents; None for all, each read when it is looked at.

    Raises:
        ValueError: If the hub does not serve the corpus.
    """
    source = HUB_CORPORA[corpus]
    import datasets  # here, since the embedded text does not need it and it takes a second

    try:
        rows = datasets.load_dataset(
            source.path,
            source.name,
            revision=source.revision,
            data_files={split: source.data_files[split]} if source.data_files else None,
            split=split,
            streaming=first is not None,
        )
        if first is None:
            documents: Sequence[str] = rows[source.column]
            return documents
        return [row[source.column] for row in rows.take(first)]
    except (OSError, datasets.exceptions.DatasetsError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"corpus {corpus!r}: the Hugging Face hub could not be reached or did not serve it "
            f"({type(error).__name__}: {cause}); use {EMBEDDED!r} or a local "
            f"{', '.join(READERS)} file instead"
        ) from error


def check_available(corpus: str, split: str) -> str | None:
    """Check what can be checked without a network or reading a text.

    Returns:
        One line if the corpus comes from the hub, which is not contacted here; otherwise None.

    Raises:
        ValueError: If the corpus or split is unknown or malformed, or a local file is missing or
            has the wrong suffix.
    """
    name, _, _ = _parse_split(split)
    if known := _splits(corpus):
        if name not in known:
            raise ValueError(f"split of corpus {corpus!r} must be one of {known}; got {name!r}")
    elif Path(corpus).suffix not in READERS:
        names = [EMBEDDED, *HUB_CORPORA]
        near = difflib.get_close_matches(corpus.lower(), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"corpus must be one of {names} or a path ending in {', '.join(READERS)}; "
            f"got {corpus!r}{hint}"
        )
    elif not (path := _local_path(corpus)).is_file():
        raise ValueError(f"corpus file {corpus!r} is not there; looked at {str(path)!r}")
    if corpus in HUB_CORPORA:
        return f"corpus {corpus!r}, split {split!r} comes from the Hugging Face hub: not checked"
    return None


def check_disjoint(texts: Mapping[str, Sequence[tuple[str, str]]]) -> list[str]:
    """Describe each pair of texts of different roles that overlap, in one line per pair.

    Args:
        texts: role -> a (corpus, split) for each kind of text. Paths are the same corpus if they
            resolve to one file; a file has one split, so only its slices are compared.

    Raises:
        ValueError: If a split is malformed.
    """
    return [
        f"{role} and {other} overlap: {' '.join(a)} and {' '.join(b)}"
        for role, other in combinations(texts, 2)
        for a, b in product(texts[role], texts[other])
        if _overlap(*a, *b)
    ]


def _overlap(corpus: str, split: str, other_corpus: str, other_split: str) -> bool:
    text, first, last = _span(corpus, split)
    other_text, other_first, other_last = _span(other_corpus, other_split)
    return text == other_text and max(first, other_first) < min(last, other_last)


def _span(corpus: str, split: str) -> tuple[object, int, int]:
    """Return what tells a text from others, and the bounds of its slice in percent."""
    name, first, last = _parse_split(split)
    return (corpus, name) if _splits(corpus) else _local_path(corpus), first, last


def _splits(corpus: str) -> list[str]:
    """Return the splits of a named corpus; none for a path."""
    if corpus == EMBEDDED:
        return list(EMBEDDED_PARTS)
    return list(HUB_CORPORA[corpus].joins) if corpus in HUB_CORPORA else []


def _parse_split(split: str) -> tuple[str, int, int]:
    """Return the name ('' if there is none) and the bounds of the slice in percent."""
    match = re.fullmatch(r"([\w-]*)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", split)
    if not match or not split:
        raise ValueError(f"split {SPLIT_RULE}; got {split!r}")
    first, last = int(match[2] or 0), int(match[3] or 100)
    if not first < last <= 100:
        raise ValueError(f"split {SPLIT_RULE}; got {split!r}")
    return match[1], first, last


def _cut(text: str, percent: int) -> int:
    """Return the first line start at or after `percent` of the characters.

    A text of one line (documents joined by spaces) is cut between words.
    """
    position = len(text) * percent // 100
    if position == 0 or percent == 100:
        return position
    end = text.find("\n" if "\n" in text else " ", position - 1)
    return end + 1 if end >= 0 else len(text)


def _local_path(corpus: str) -> Path:
    """Return the file that a path leads to, the same for every way of writing the path.

    Raises:
        ValueError: If it begins at an unknown user's home, or its links form a loop.
    """
    try:
        return Path(corpus).expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"corpus file {corpus!r} cannot be found: {error}") from error


def _embedded_text(part: str) -> str:
    """Return one part of CPython's help topics; no two parts share a paragraph.

    Topics quote each other at length (`compound` holds the whole of `try`). A paragraph is kept
    where it first appears, and held-out parts come before training, so a held-out paragraph is
    never trained on because another topic quotes it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("corpus 'embedded' needs pydoc_data, which this Python lacks") from error
    parts = {name: sorted(names.split()) for name, names in HELD_OUT_TOPICS.items()}
    parts["training"] = sorted(set(topics) - {topic for names in parts.values() for topic in names})
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name, names in parts.items():
        kept[name] = []
        for paragraph in "\n\n".join(topics.get(topic, "") for topic in names).split("\n\n"):
            words = " ".join(paragraph.split())  # an indented quotation is still a quotation
            if words and words not in seen:
                seen.add(words)
                kept[name].append(paragraph.strip("\n"))
    return "\n\n".join(kept[part]) + "\n"


def _local_documents(corpus: str) -> list[str]:
    """Return the documents of a local file: a .txt file is one, the others have one per row."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or it tells the hub of each load
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are told below
    path = _local_path(corpus)
    try:
        # Streamed, it is neither copied to a cache nor taken from one that is older than the file.
        rows = list(
            datasets.load_dataset(
                **READERS[Path(corpus).suffix],
                data_files=glob.escape(str(path)),
                split="train",
                streaming=True,
            )
        )
    except StopIteration:  # of the library, at a .jsonl file without a line
        return []
    except (OSError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"corpus file {corpus!r} cannot be read ({type(error).__name__}: {cause})"
        ) from error
    documents = [row["text"] for row in rows if row.get("text") is not None]
    if rows and not (documents and all(isinstance(text, str) for text in documents)):
        raise ValueError(
            f"corpus file {corpus!r} must have a string column 'text'; has {list(rows[0])}"
        )
    return documents
