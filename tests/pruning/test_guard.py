"""Windows held back choose how much of an update stays."""

import math
from dataclasses import replace
from functools import partial

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


def harmless(weight, removal, gram):
    return weight.masked_fill(removal, 0), 0


def twice(weight, removal, gram):
    return weight.masked_fill(removal, 0) * 2, 0


def run(store, procedure, **more):
    """Prune and measure; return what was recorded."""
    records = {}
    windows = {**TEXTS, "dense": WINDOWS[:2], "pruned": WINDOWS[:2]}
    prune(
        store,
        procedure,
        windows,
        record=lambda kind, value: records.setdefault(kind, {}).update(value),
        losses=window_losses,
        **more,
    )
    return records


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    toy_model(FAMILY).save_pretrained(folder)
    return folder


def folder_store(dense, folder, keeps=False):
    folder.mkdir(exist_ok=True)
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
        ((1.0, 1.1, 2.0), 0.2),
        ((2.0, 1.1, 1.0), 0.8),
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


@targets
def test_what_is_left_out_leaves_the_masked_model(target):
    plain, guarded = toy_model(FAMILY), toy_model(FAMILY)
    was = run(ResidentStore(plain, narrows=True), masked(target))
    now = run(ResidentStore(guarded, narrows=True), updated(target, harmful))
    assert_same_tensors(state_of(guarded), state_of(plain))
    assert now["losses"] == was["losses"]
    assert now["guard"]["part"] == 0
    assert "guard" not in was


@targets
@pytest.mark.parametrize("keeps", [None, False, True])
def test_weights_are_mixed_by_the_part(dense, tmp_path, target, keeps, monkeypatch):
    monkeypatch.setattr("prunevolve.pruning.walk.part_chosen", lambda *losses: 0.25)

    def stores():
        return (
            [ResidentStore(toy_model(FAMILY), narrows=True) for _ in range(2)]
            if keeps is None
            else [folder_store(dense, tmp_path / name, keeps) for name in ("plain", "mixed")]
        )

    plain, mixed = stores()
    run(plain, masked(target))
    now = run(mixed, updated(target, twice))
    if keeps is None:
        tensors, expected = state_of(mixed.model), state_of(plain.model)
    else:
        tensors, expected = (tensors_of(tmp_path / name) for name in ("mixed", "plain"))
    for name in linear_layers(toy_model(FAMILY)):  # 1 and a quarter of the way to 2
        expected[f"{name}.weight"] *= 1.25
    assert_same_tensors(tensors, expected)
    measured = [float(x) for x in now["losses"]["pruned"]]
    if keeps is None:
        losses = losses_in(mixed, WINDOWS[:2])
        assert measured == pytest.approx([float(x) for x in losses], rel=1e-5)


def test_weights_are_mixed_by_the_masks_of_the_update_behind_pruned_blocks(monkeypatch):
    monkeypatch.setattr("prunevolve.pruning.walk.part_chosen", lambda *losses: 0.5)
    model = toy_model(FAMILY)
    how = {"update": "sparsegpt", "propagation": "sequential", "group": "row"}
    report = prunevolve.prune(model, "wanda", WINDOWS, sparsity=0.5, **how)
    assert all(layer.pattern_ok for layer in report.layers)


@targets
def test_losses_compared_are_those_of_windows_held_back(target):
    model = toy_model(FAMILY)
    guard = run(ResidentStore(model, narrows=True), updated(target, harmless))["guard"]
    plain = toy_model(FAMILY)  # by the other windows
    prune(ResidentStore(plain, narrows=True), masked(target), {"calibration": OTHERS})
    assert_same_tensors(state_of(model), state_of(plain))
    expected = float(losses_in(ResidentStore(model), HELD).mean())
    assert guard == {
        "without": pytest.approx(expected, rel=1e-5),
        "half": pytest.approx(expected, rel=1e-5),
        "with": pytest.approx(expected, rel=1e-5),
        "part": guard["part"],
    }


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


@targets
@pytest.mark.parametrize("keeps", [False, True])
def test_shards_are_those_of_the_plain_pruning(dense, tmp_path, target, keeps):
    plain, guarded = tmp_path / "plain", tmp_path / "guarded"
    was = run(folder_store(dense, plain, keeps), masked(target))
    now = run(folder_store(dense, guarded, keeps), updated(target, harmful))
    assert_same_tensors(tensors_of(guarded), tensors_of(plain))
    assert now["losses"] == was["losses"]


class Killed(Exception):
    pass


@targets
@pytest.mark.parametrize("part", [0.0, 0.3])
@pytest.mark.parametrize("moment", ["first shard", "no record", "record", "first shard again"])
def test_killed_at_any_moment_it_comes_to_the_same(
    dense, tmp_path, target, moment, part, monkeypatch
):
    monkeypatch.setattr("prunevolve.pruning.walk.part_chosen", lambda *losses: part)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(folder_store(dense, whole), updated(target, twice))
    store, shards, found = folder_store(dense, killed), [], {}

    def on_shard(path):
        shards.append(path)
        if len(shards) == {"first shard": 1, "first shard again": 3}.get(moment):
            raise Killed

    def record(kind, value):
        if kind == "guard":
            if moment == "no record":
                raise Killed
            found.update(value)
            if moment == "record":
                raise Killed

    store.on_shard = on_shard
    go = partial(
        prune, procedure=updated(target, twice), windows=TEXTS,
        losses=window_losses,
    )  # fmt: skip
    with pytest.raises(Killed):
        go(store, record=record)
    resumed = folder_store(dense, killed)
    assert bool(found) == (moment in ("record", "first shard again"))
    if found:
        resumed.mix({})
        assert len(resumed.written) == (moment == "first shard again")
        prune(resumed, replace(updated(target, twice), part=part), {})
    else:
        go(resumed)
    assert_same_tensors(tensors_of(killed), tensors_of(whole))


def test_every_update_is_guarded_and_the_report_says_what_came_of_it(monkeypatch):
    monkeypatch.setattr("prunevolve.pruning.run.job.compensate", lambda *x, pattern: harmful(*x))
    options = {"sparsity": 0.5, "group": "row"}
    model, plain = toy_model(FAMILY), toy_model(FAMILY)
    report = prunevolve.prune(model, "wanda", WINDOWS, update="sparsegpt", **options)
    assert report.update_part == 0
    given = {"held_back": HELD, "update": "sparsegpt", **options}
    assert prunevolve.prune(toy_model(FAMILY), "wanda", OTHERS, **given).update_part == 0
    assert prunevolve.prune(plain, "wanda", OTHERS, **options).update_part is None
    assert_same_tensors(state_of(model), state_of(plain))
