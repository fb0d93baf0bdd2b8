"""An update that raises the loss of windows that are held back is left out."""

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


def updated(target, update, metric="mul(W, X)"):
    return Procedure(Metric.parse(metric), target, update=update, guarded=True)


def harmful(weight, removal, gram):
    """Weights that are not finite, nor are the losses by them: a random model minds no others."""
    return torch.full_like(weight, torch.nan).masked_fill(removal, 0), 0


def harmless(weight, removal, gram):
    return weight.masked_fill(removal, 0), 0


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


@targets
def test_what_is_left_out_leaves_the_masked_model(target):
    plain, guarded = toy_model(FAMILY), toy_model(FAMILY)
    was = run(ResidentStore(plain, narrows=True), updated(target, harmful).without_update)
    now = run(ResidentStore(guarded, narrows=True), updated(target, harmful))
    assert_same_tensors(state_of(guarded), state_of(plain))
    assert now["losses"] == was["losses"]
    assert now["guard"]["left_out"]
    assert "guard" not in was


@targets
def test_losses_compared_are_those_of_windows_held_back(target):
    model = toy_model(FAMILY)
    guard = run(ResidentStore(model, narrows=True), updated(target, harmless))["guard"]
    plain = toy_model(FAMILY)  # by the other windows
    procedure = updated(target, harmless).without_update
    prune(ResidentStore(plain, narrows=True), procedure, {"calibration": OTHERS})
    assert_same_tensors(state_of(model), state_of(plain))
    expected = float(losses_in(ResidentStore(model), HELD).mean())
    assert guard == {
        "without": pytest.approx(expected, rel=1e-5),
        "with": pytest.approx(expected, rel=1e-5),
        "left_out": guard["without"] < guard["with"],
    }


def test_the_lower_loss_decides():
    model, plain = toy_model(FAMILY), toy_model(FAMILY)
    for each in (model, plain):  # whose losses are high
        for layer in linear_layers(each).values():
            layer.weight.data *= 50
    run(ResidentStore(plain), updated(TARGETS["row"], harmful).without_update)

    def smaller(weight, removal, gram):
        return weight.masked_fill(removal, 0) / 50, 0

    guard = run(ResidentStore(model), updated(TARGETS["row"], smaller))["guard"]
    losses = [float(losses_in(ResidentStore(x), HELD).mean()) for x in (plain, model)]
    assert [guard["without"], guard["with"]] == pytest.approx(losses)
    assert not guard["left_out"] and losses[1] < losses[0]

    def larger(weight, removal, gram):
        return weight.masked_fill(removal, 0) * 50, 0

    model = toy_model(FAMILY)
    guard = run(ResidentStore(model), updated(TARGETS["row"], larger))["guard"]
    assert guard["left_out"] == (guard["without"] < guard["with"])


@targets
@pytest.mark.parametrize("keeps", [False, True])
def test_shards_are_those_of_the_plain_pruning(dense, tmp_path, target, keeps):
    plain, guarded = tmp_path / "plain", tmp_path / "guarded"
    was = run(folder_store(dense, plain, keeps), updated(target, harmful).without_update)
    now = run(folder_store(dense, guarded, keeps), updated(target, harmful))
    assert_same_tensors(tensors_of(guarded), tensors_of(plain))
    assert now["losses"] == was["losses"]


class Killed(Exception):
    pass


@targets
@pytest.mark.parametrize("moment", ["first shard", "all shards", "no shard", "first shard again"])
def test_killed_at_any_moment_it_comes_to_the_same(dense, tmp_path, target, moment, monkeypatch):
    plain, guarded = tmp_path / "plain", tmp_path / "guarded"
    run(folder_store(dense, plain), updated(target, harmful).without_update)
    store, shards, found = folder_store(dense, guarded), [], {}

    def on_shard(path):
        shards.append(path)
        if len(shards) == {"first shard": 1, "first shard again": 3}.get(moment):
            raise Killed

    def record(kind, value):
        if kind == "guard":
            if moment == "no shard":
                raise Killed
            found.update(value)

    def restore(dense):
        if moment == "all shards":
            raise Killed
        FolderStore.restore(store, dense)

    store.on_shard, store.restore = on_shard, restore
    go = partial(
        prune, procedure=updated(target, harmful), windows=TEXTS,
        losses=window_losses,
    )  # fmt: skip
    with pytest.raises(Killed):
        go(store, record=record)
    resumed = folder_store(dense, guarded)
    if found:
        assert moment == "first shard again" and found["left_out"]
        prune(resumed, updated(target, harmful).without_update, {"calibration": OTHERS})
    else:
        go(resumed)
    assert_same_tensors(tensors_of(guarded), tensors_of(plain))


def test_every_update_is_guarded_and_the_report_says_what_came_of_it(monkeypatch):
    monkeypatch.setattr("prunevolve.pruning.run.job.compensate", lambda *x, pattern: harmful(*x))
    options = {"sparsity": 0.5, "group": "row"}
    model, plain = toy_model(FAMILY), toy_model(FAMILY)
    report = prunevolve.prune(model, "wanda", WINDOWS, update="sparsegpt", **options)
    assert report.left_out
    given = {"held_back": HELD, "update": "sparsegpt", **options}
    assert prunevolve.prune(toy_model(FAMILY), "wanda", OTHERS, **given).left_out
    assert not prunevolve.prune(plain, "wanda", OTHERS, **options).left_out
    assert_same_tensors(state_of(model), state_of(plain))
