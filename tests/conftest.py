"""Fixtures that more than one test module reads, and the order of the files.

Nothing here imports torch, which takes seconds: the process that only hands out tests reads it too.
"""

import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from search_process import started

from prunevolve.search import command as run_search

LONGEST = ("test_run_prune.py", "test_run_search.py")
"""Files that are begun first, so that all processes end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def heard_signals() -> None:
    """Let signals reach what is tested also under `nohup` and in the background, where they are
    ignored: by a handler, which the processes that tests start do not inherit.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep updates whatever they do to the loss, which says nothing of a random model."""
    from prunevolve.pruning import api
    from prunevolve.pruning.run import job

    def procedure_of(*arguments: object, **keywords: object) -> object:
        return replace(known(*arguments, **keywords), guarded=False)

    known = job.procedure_of
    for module in (api, job):
        monkeypatch.setattr(module, "procedure_of", procedure_of)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random LLaMA with tied embeddings and a tokenizer of bytes; never written to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from toy_models import toy_model
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    toy_model("llama", vocab_size=256, tie_word_embeddings=True).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


@pytest.fixture
def model_copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run the search in an empty folder; see `started`."""
    monkeypatch.chdir(tmp_path)
    return partial(started, run_search)
