"""What a pruning needs, worked by hand."""

import dataclasses

import pytest
from prunevolve.pruning.sizes import (
    GIB,
    LIBRARIES,
    Work,
    plan_pruning,
    sizes_of,
    with_whole_model,
)
from toy_models import toy_model

from prunevolve.pruning import sizes
from prunevolve.pruning.leaves import LEAF_SETS
from prunevolve.pruning.masks import Model, Row, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.recipe import Recipe

# Of the toy LLaMA: two blocks; q and o 16 x 16, k and v 8 x 16, gate and up 24 x 16, down 16 x 24.
TOY_BLOCK = 2 * 256 + 2 * 128 + 3 * 384
TOY_PRUNABLE = 2 * TOY_BLOCK
TOY_PARAMETERS = TOY_PRUNABLE + 2 * 61 * 16 + 5 * 16  # embeddings, head, norms


def toy(dtype="float32", leaves="G", saved="float32", **options):
    work = Work(dtype, saved, frozenset(leaves), (3, 12), (2, 10), **{"values": 6, **options})
    return sizes_of(toy_model("llama"), work)


def test_sizes_of_a_model_are_those_of_its_layers():
    found = toy("float16", "W", saved="bfloat16")
    assert found.model == 2 * TOY_PARAMETERS
    assert found.blocks == (2 * (TOY_BLOCK + 2 * 16),) * 2
    assert found.new_weights == 2 * TOY_BLOCK
    assert found.scoring == 24 * 384 + 2 * TOY_BLOCK
    assert (found.statistics, found.sums) == (0, 0)


def test_sizes_of_statistics_are_those_of_matrices_and_vectors():
    inputs, outputs = 6 * 16 + 24, 16 + 8 + 8 + 16 + 24 + 24 + 16
    assert toy(leaves="WG").statistics == 4 * TOY_PRUNABLE
    assert toy(leaves="X").statistics == 2 * 4 * inputs
    everything = 2 * 4 * TOY_PRUNABLE + 8 * (3 * inputs + outputs + 2 * 7)
    assert toy(leaves=LEAF_SETS["extended"]).statistics == everything


def test_sizes_of_windows_count_gradients_where_a_leaf_needs_them():
    # Twelve tokens: 18 x 16 + 9 x 24 values each, and twice attention to 12 tokens in 4 heads.
    activations = 4 * 12 * (18 * 16 + 9 * 24 + 2 * 12 * 4)
    assert toy(leaves="X").window == activations
    assert toy(leaves="G").window == activations + 2 * 4 * 384
    # Inputs of the first block and what leaves it, or of both; twice for evaluation.
    assert toy(leaves="X").states == 4 * 16 * (3 * 2 * 12 + 2 * 2 * 10)
    assert toy(leaves="G").states == 4 * 16 * (3 * 3 * 12 + 2 * 2 * 10)
    assert toy("float16", "GMX").sums == 2 * 4 * TOY_BLOCK


def plan_of(group=None, metric="mul(W, G)", budget=10 * GIB):
    recipe = Recipe(Metric.parse(metric), Target(0.5, group or Row()))
    found = toy(leaves=recipe.leaves)
    return found, plan_pruning(found, recipe, 1000, "cpu", budget)


def test_plan_pruning_holds_all_where_that_fits():
    found, plan = plan_of(Model())
    assert plan.memory == {
        "libraries": LIBRARIES,
        "a block": found.blocks[0],
        "sums": found.sums,
        "work": max(
            found.scoring,
            found.window + found.new_weights,
            found.outside + found.logits + found.new_weights - found.blocks[0] - found.sums,
        ),
        "hidden states": found.states,
        "statistics": found.statistics,
        "other blocks": sum(found.blocks),
    }
    assert (plan.resident, plan.passes, plan.disk) == (True, 3, 1000)


def test_plan_pruning_puts_aside_on_disk_what_does_not_fit():
    found, plan = plan_of(Model())
    least = sum(plan.memory[name] for name in ("libraries", "a block", "sums", "work"))
    _, tight = plan_of(Model(), budget=least)
    assert (tight.resident, sum(tight.memory.values())) == (False, least)
    assert tight.on_disk == {"hidden states": found.states, "statistics": found.statistics}
    assert tight.disk == 1000 + found.states + found.statistics
    with pytest.raises(ValueError, match="max-memory must be at least 0"):
        plan_of(Model(), budget=least - 1)


def test_with_whole_model_counts_it_where_that_is_more_than_pruning_and_refuses_too_much():
    found, plan = plan_of()
    assert with_whole_model(plan, found) == plan
    large = dataclasses.replace(found, outside=GIB)
    whole = {"libraries": LIBRARIES, "the whole model": large.model}
    assert with_whole_model(plan, large) == dataclasses.replace(plan, memory=whole)
    tight = dataclasses.replace(plan, budget=sum(whole.values()) - 1)
    with pytest.raises(ValueError, match=r"max-memory must be at least 1\.61 GiB for zero-shot"):
        with_whole_model(tight, large)


@pytest.mark.parametrize(("size", "text"), [(GIB, "1.00 GiB"), (GIB // 20, "51.20 MiB")])
def test_sizes_are_told_in_the_unit_that_says_more(size, text):
    assert sizes.in_words({"a": size, "b": 0}) == f"a {text}"
