"""Windows held back choose how much of an update stays."""

import math
from dataclasses import replace

import pytest
import torch
from toy_models import assert_same_tensors, losses_in, tensors_of, toy_model, toy_windows

import prunevolve
from prunevolve.evaluation.perplexity import window_losses
from prunevolve.pruning.checkpoint import Checkpoint
from prunevolve.pruning.masks import Target, group_of, pattern_group
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import linear_layers
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.reconstruct import HELD_BACK
from prunevolve.pruning.store import FolderStore, ResidentStore
from prunevolve.pruning.walk import part_chosen

WINDOWS = toy_windows(count=HELD_BACK + 2)
HELD = WINDOWS[::HELD_BACK]
OTHERS = torch.cat([WINDOWS[1:HELD_BACK], WINDOWS[HELD_BACK + 1 :]])
TEXTS = {"calibration": OTHERS, "held_back": HELD}
FAMILY = "opt_projected"  # its layers have biases, which a narrower one loses some of
NEURONS = Target(0.5, replace(pattern_group("neurons", None), multiple=1))
TARGETS = {
    "row": Target(0.5, group_of("row")),
    "model": Target(0.5, group_of("model")),
    "2:4": Target(0.5, pattern_group("2:4", None)),
    "neurons": NEURONS,
}
targets = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def masked(target):
    return Procedure(Metric.parse("mul(W, X)"), target)


def updated(target, update):
    return replace(masked(target), update=update, guarded=True)


def harmful(weight, removal, gram):
    """Weights that are not finite, nor are the losses by them: a random model minds no others."""
    return torch.full_like(weight, torch.nan).masked_fill(removal, 0), 0


def twice(weight, removal, gram):
    return weight.masked_fill(removal, 0) * 2, 0


def run(store, procedure):
    """Prune and measure; return what was recorded."""
    records = {}
    windows = {**TEXTS, "dense": WINDOWS[:2], "pruned": WINDOWS[:2]}
    prune(
        store,
        procedure,
        windows,
        record=lambda kind, value: records.setdefault(kind, {}).update(value),
        losses=window_losses,
    )
    return records


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    toy_model(FAMILY).save_pretrained(folder)
    return folder


def folder_store(dense, folder, keeps):
    folder.mkdir()
    config = toy_model(FAMILY).config
    return FolderStore(Checkpoint(dense), config, "float32", "cpu", folder, keeps)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("losses", "part"),
    [
        ((2.0, 1.0, 2.0), 0.5),
        ((3.0, 1.0, 1.0), 0.8),  # 3 - 6 p + 4 p², lowest at 0.75
        ((1.0, 1.2, 1.6), 0.0),  # lowest below 0
        ((2.0, 1.4, 1.0), 1.0),  # lowest beyond 1
        ((1.0, 2.0, 1.5), 0.0),  # no lowest point
        ((1.5, 2.0, 1.0), 1.0),
        ((1.0, 1.0, 1.0), 0.0),
        ((1.0, 0.9, math.nan), 0.5),
        ((1.0, math.inf, math.nan), 0.0),
        ((math.nan, math.nan, math.nan), 0.0),
    ],
)
def test_part_is_where_a_parabola_through_the_losses_is_lowest(losses, part):
    assert part_chosen(*losses) == part


@pytest.fixture(params=[None, False, True], ids=["memory", "folder", "folder that keeps"])
def ended(request, dense, tmp_path):
    """Run a procedure on a store of its own; return what it is, ends with and recorded."""

    def run_of(name, procedure):
        if request.param is None:
            made = ResidentStore(toy_model(FAMILY), narrows=True)
        else:
            made = folder_store(dense, tmp_path / name, request.param)
        records = run(made, procedure)
        in_memory = request.param is None
        return made, state_of(made.model) if in_memory else tensors_of(tmp_path / name), records

    return run_of


@targets
def test_what_is_left_out_leaves_the_masked_model(ended, target):
    _, expected, was = ended("plain", masked(target))
    _, tensors, now = ended("guarded", updated(target, harmful))
    assert_same_tensors(tensors, expected)
    assert now["losses"] == was["losses"]
    assert now["guard"]["part"] == 0
    assert "guard" not in was


@targets
def test_weights_are_mixed_by_the_part(ended, target, monkeypatch):
    monkeypatch.setattr("prunevolve.pruning.walk.part_chosen", lambda *losses: 0.25)
    _, expected, _ = ended("plain", masked(target))
    mixed, tensors, now = ended("mixed", updated(target, twice))
    for name in linear_layers(toy_model(FAMILY)):  # 1 and a quarter of the way to 2
        expected[f"{name}.weight"] *= 1.25
    assert_same_tensors(tensors, expected)
    if isinstance(mixed, ResidentStore):
        losses = losses_in(mixed, WINDOWS[:2]).tolist()
        assert now["losses"]["pruned"] == pytest.approx(losses, rel=1e-5)


def test_weights_are_mixed_by_the_masks_of_the_update_behind_pruned_blocks(monkeypatch):
    monkeypatch.setattr("prunevolve.pruning.walk.part_chosen", lambda *losses: 0.5)
    model = toy_model(FAMILY)
    how = {"update": "sparsegpt", "propagation": "sequential", "group": "row"}
    report = prunevolve.prune(model, "wanda", WINDOWS, sparsity=0.5, **how)
    assert all(layer.pattern_ok for layer in report.layers)


@targets
def test_losses_are_those_without_half_and_all_of_the_update(target, monkeypatch):
    monkeypatch.setattr("prunevolve.pruning.walk.part_chosen", lambda *losses: 1.0)
    guard = run(ResidentStore(toy_model(FAMILY), narrows=True), updated(target, twice))["guard"]
    for name, factor in (("without", 1), ("half", 1.5), ("with", 2)):
        store = ResidentStore(toy_model(FAMILY))
        prune(store, masked(target), {"calibration": OTHERS})
        for layer in store.layers.values():
            for weight in layer.values():
                weight.weight.data *= factor
        loss = float(losses_in(store, HELD).mean())
        assert guard[name] == pytest.approx(loss, rel=1e-5), name


def test_every_update_is_guarded_and_the_report_says_what_came_of_it(monkeypatch):
    monkeypatch.setattr("prunevolve.pruning.passes.compensate", lambda *x, pattern: harmful(*x))
    options = {"sparsity": 0.5, "group": "row"}
    model, plain = toy_model(FAMILY), toy_model(FAMILY)
    report = prunevolve.prune(model, "wanda", WINDOWS, update="sparsegpt", **options)
    assert report.update_part == 0
    given = {"held_back": HELD, "update": "sparsegpt", **options}
    assert prunevolve.prune(toy_model(FAMILY), "wanda", OTHERS, **given).update_part == 0
    assert prunevolve.prune(plain, "wanda", OTHERS, **options).update_part is None
    assert_same_tensors(state_of(model), state_of(plain))
