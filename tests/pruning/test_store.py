"""A folder of shards against a model in memory: one walk, the same bits."""

import signal
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest
import torch
from refusals import refusal
from toy_models import (
    FAMILIES,
    assert_same_tensors,
    change_weights,
    tensors_of,
    toy_model,
    toy_windows,
    weights_of,
)
from transformers import AutoModelForCausalLM

from prunevolve.evaluation.perplexity import window_losses
from prunevolve.pruning.checkpoint import (
    Checkpoint,
    outside_blocks,
    read_tensor,
    write_tensors,
)
from prunevolve.pruning.masks import Layer, Model, NOfM, Row, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import load_config, load_model
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.store import FolderStore, ResidentStore
from prunevolve.pruning.stream import BlockCall

MAGNITUDE, WANDA, SNIP = "W", "mul(W, sqrt(X))", "mul(W, G)"
ALL_SOURCES = "mul(W, add(G, add(X, abs(M))))"
TARGETS = {
    "row": Target(0.5, Row()),
    "layer": Target(0.4, Layer()),
    "model": Target(0.6, Model()),
    "2:4": Target(0.5, NOfM(2, 4)),
}
DECIDING = [
    ("one-shot", WANDA, "row"),
    ("sequential", WANDA, "row"),
    ("one-shot", SNIP, "row"),
    ("sequential", ALL_SOURCES, "row"),
    ("one-shot", ALL_SOURCES, "model"),
]
"""A recipe for each walk in which blocks are decided."""
COVER = {
    True: [("one-shot", SNIP, "row"), ("sequential", ALL_SOURCES, "2:4")],
    False: [("one-shot", WANDA, "model"), ("sequential", MAGNITUDE, "layer")],
}
"""Each propagation, metric and group once, half of them with tied embeddings."""
CASES = [("llama", tied, not tied, case) for tied in (True, False) for case in DECIDING]
CASES += [
    (family, tied, False, case)
    for family, tied in zip(FAMILIES, cycle([True, False]))
    for case in COVER[tied]
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    @cache
    def folder_of(family, tied=False):
        folder = tmp_path_factory.mktemp("dense") / family
        toy_model(family, tie_word_embeddings=tied).save_pretrained(folder, max_shard_size="4KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        return folder

    return folder_of


def opened(folder, shards=Path("none"), keeps=False, kind=FolderStore):
    config = load_config(str(folder))
    return kind(Checkpoint(folder), config, "float32", "cpu", shards, keeps)


def procedure_of(propagation, metric, group):
    return Procedure(Metric.parse(metric), TARGETS[group], propagation == "sequential")


@cache
def resident_of(folder):
    made = ResidentStore(load_model(str(folder), "float32"))
    return made, weights_of(made.model)


def expected_tensors(folder, recipe):
    """Return the source's tensors with the weights that a model in memory ends with."""
    resident, master = resident_of(folder)
    resident.restore(master)
    prune(resident, recipe, {"calibration": toy_windows()})
    tensors = tensors_of(folder)
    names = Checkpoint(folder).published(resident.model)
    for layer, weight in weights_of(resident.model).items():
        published = names[f"{layer}.weight"]
        assert (weight == 0).any()
        tensors[published] = weight.to(tensors[published].dtype)
    return tensors


def pruned_tensors(folder, shards, recipe, keeps=False):
    shards.mkdir()
    made = opened(folder, shards, keeps)
    prune(made, recipe, {"calibration": toy_windows()})
    made.write_outside()
    return tensors_of(shards)


@pytest.mark.parametrize(("family", "tied", "keeps", "case"), CASES, ids=str)
def test_folder_gives_the_bits_that_memory_gives(dense, tmp_path, family, tied, keeps, case):
    folder, recipe, shards = dense(family, tied), procedure_of(*case), tmp_path / "shards"
    expected = expected_tensors(folder, recipe)
    assert_same_tensors(pruned_tensors(folder, shards, recipe, keeps), expected)
    load_config(str(folder)).save_pretrained(shards)
    loaded = AutoModelForCausalLM.from_pretrained(shards)
    assert_same_tensors(weights_of(loaded), weights_of(resident_of(folder)[0].model))


@pytest.mark.parametrize("propagation", ["one-shot", "sequential"])
def test_folder_in_bf16_keeps_its_dtype_under_passes_in_fp32(tmp_path, propagation):
    toy_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    recipe = procedure_of(propagation, ALL_SOURCES, "row")
    written = pruned_tensors(tmp_path / "dense", tmp_path / "shards", recipe)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert_same_tensors(written, expected_tensors(tmp_path / "dense", recipe))


def real_blocks(made):
    modules = ((name, made.model.get_submodule(name)) for name in made.blocks)
    return {name for name, block in modules if any(not p.is_meta for p in block.parameters())}


def outside_is_meta(made):
    return {parameter.is_meta for parameter in outside_blocks(made.model).values()}


class Watched(FolderStore):
    """Looks, while the outside is open, whether blocks are empty."""

    @contextmanager
    def outside(self):
        with super().outside() as model:
            assert self._keeps or not real_blocks(self)
            assert outside_is_meta(self) == {False}
            yield model


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("metric", [WANDA, ALL_SOURCES])
@pytest.mark.parametrize("propagation", ["one-shot", "sequential"])
def test_store_opens_one_block_or_the_outside(tmp_path, monkeypatch, propagation, metric, keeps):
    toy_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    made, most, run = opened(tmp_path / "dense", tmp_path, keeps, kind=Watched), [0], BlockCall.run

    def watched(call, block, hidden):
        real = real_blocks(made)
        assert block in [made.model.get_submodule(name) for name in real]
        assert outside_is_meta(made) == {True}
        most[0] = max(most[0], len(real))
        return run(call, block, hidden)

    monkeypatch.setattr(BlockCall, "run", watched)
    windows = {name: toy_windows(2) for name in ("dense", "pruned")}
    texts = {"calibration": toy_windows(), **windows}
    prune(made, procedure_of(propagation, metric, "row"), texts, losses=window_losses)
    # A block that is written when it is first opened is never kept.
    assert most[0] == (3 if keeps and metric == ALL_SOURCES else 1)
    assert outside_is_meta(made) == {True}
    assert real_blocks(made) == set()  # a written block is kept no more


def rewritten(tmp_path, change, family="llama"):
    toy_model(family).save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    return tmp_path


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_tensor_of_integers_is_refused(tmp_path):
    folder = rewritten(tmp_path, lambda tensors: tensors.update({DOWN: tensors[DOWN].char()}))
    assert refusal(opened, folder).endswith(f"{DOWN} must be F32, BF16 or F16, got I8")


def test_checkpoint_of_the_base_model_alone_keeps_its_names(tmp_path):
    toy_model("llama", tie_word_embeddings=True).model.save_pretrained(tmp_path / "dense")
    assert "layers.0.mlp.up_proj.weight" in tensors_of(tmp_path / "dense")
    recipe = procedure_of("one-shot", ALL_SOURCES, "row")
    written = pruned_tensors(tmp_path / "dense", tmp_path / "shards", recipe)
    assert_same_tensors(written, expected_tensors(tmp_path / "dense", recipe))


def test_image_part_under_other_names_is_carried_over(tmp_path):
    def rename(tensors):
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            tensors[name.replace(".", ".vision_model.", 1)] = tensors.pop(name)

    folder = rewritten(tmp_path / "dense", rename, "gemma3")
    written = pruned_tensors(folder, tmp_path / "shards", procedure_of("one-shot", WANDA, "row"))
    images = {name: t for name, t in tensors_of(folder).items() if "vision_model" in name}
    assert_same_tensors({name: written[name] for name in images}, images)


def test_fingerprint_follows_the_tensors_and_not_the_files(dense, tmp_path):
    toy_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "one")
    mark = Checkpoint(tmp_path / "one").fingerprint()
    assert mark == Checkpoint(dense("llama")).fingerprint()
    changed = rewritten(tmp_path / "two", lambda tensors: tensors[DOWN].mul_(2))
    assert Checkpoint(changed).fingerprint() != mark


def test_interrupt_while_a_tensor_is_read_is_raised(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    write_tensors(tmp_path / "a", {"tensor": torch.ones(9)})
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(200):  # torch turns about every sixth into a ValueError
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-4 * (1 + i % 10))
                while True:
                    read_tensor(tmp_path / "a", "tensor")
    finally:
        signal.signal(signal.SIGALRM, before)
