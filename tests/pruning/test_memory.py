"""The bound of what a pruning holds, worked by hand."""

import pytest
from toy_models import toy_model

from prunevolve.pruning import memory
from prunevolve.pruning.masks import Model, Row, Target
from prunevolve.pruning.memory import LIBRARIES, Work, held, plan_pruning, put_aside
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.recipe import Recipe, make_recipe

# Of the toy LLaMA: two blocks; q and o 16 x 16, k and v 8 x 16, gate and up 24 x 16, down 16 x 24.
BLOCK = 2 * 256 + 2 * 128 + 3 * 384
INPUTS, NORMS = 6 * 16 + 24, 2 * 16
OUTSIDE = 2 * 61 * 16 + 16  # embeddings, head, norm
LOGITS = 3 * 4 * 256 * 61


def work_of(metric="mul(W, G)", group=None, dtype="float32", **methods):
    target = Target(0.5, group or Row())
    recipe = make_recipe(Metric.parse(metric), target, **methods)
    return Work(toy_model("llama"), recipe, dtype, "bfloat16", (3, 12), (2, 10))


def test_pass_without_gradients_holds_a_block_and_a_scored_matrix_or_the_head():
    work = work_of("mul(W, sqrt(X))")
    (one,) = work.passes
    # Larger than the block with what is scored and written of it.
    assert held(one, work) == {
        "embeddings and head": 4 * OUTSIDE,
        "logits": LOGITS,
        "a shard": 2 * BLOCK,
    }
    assert 4 * (BLOCK + NORMS) + 3 * 4 * 384 + 2 * BLOCK < LOGITS
    # Of two blocks' inputs a block's, and what leaves it; twice for evaluation.
    states = 4 * 16 * (3 * 2 * 12 + 2 * 2 * 10)
    assert put_aside(work) == {"hidden states": states, "statistics": 0}


@pytest.fixture
def headless(monkeypatch):
    """Leave out the head, which is larger than a toy's block."""
    monkeypatch.setattr(memory, "HEAD_TOKENS", -8)


def test_backward_pass_holds_gradients_beside_their_sums(headless):
    work = work_of()
    _, backward, _ = work.passes
    # Twelve tokens: 18 x 16 + 9 x 24 values each, and twice attention to 12 tokens in 4 heads.
    window = 4 * 12 * (18 * 16 + 9 * 24 + 2 * 12 * 4) + 2 * 4 * 384
    expected = {"a block": 4 * (BLOCK + NORMS), "sums": 4 * BLOCK}
    assert held(backward, work) == expected | {"work": 2 * BLOCK + window}
    waits = work_of(group=Model())  # where nothing is pruned on the way back
    assert held(waits.passes[1], waits) == expected | {"work": window}


def test_group_model_waits_with_all_statistics():
    work = work_of(group=Model())
    assert [one.name for one in work.passes] == ["forward", "backward", "threshold", "prune"]
    assert held(work.passes[2], work) == {"scores": 4 * 3 * 384}
    # The inputs of every block wait for the backward pass.
    states = 4 * 16 * (3 * 3 * 12 + 2 * 2 * 10)
    assert put_aside(work) == {"hidden states": states, "statistics": 4 * 2 * BLOCK}


def test_gram_matrix_and_training_are_work_on_a_block(headless):
    swaps = work_of("W", refine="swaps")
    (one,) = swaps.passes
    assert held(one, swaps)["work"] >= 2 * BLOCK + 4 * (2 * 384 + 4 * 24**2)
    trained = work_of("W", update="reconstruct")
    (one,) = trained.passes
    window = 4 * 12 * (18 * 16 + 9 * 24 + 2 * 12 * 4)
    assert held(one, trained)["work"] == 2 * BLOCK + 4 * 8 * BLOCK + window


def test_plan_holds_all_where_that_fits_and_puts_aside_what_does_not():
    work = work_of(group=Model())
    plan = plan_pruning(work, 1000, "cpu", "10GiB")
    assert plan.resident and plan.disk == 1000
    blocks = {"other blocks": 2 * 4 * (BLOCK + NORMS)}
    assert plan.beside == {"libraries": LIBRARIES} | put_aside(work) | blocks
    least = LIBRARIES + max(sum(rows.values()) for _, rows in plan.passes)
    tight = plan_pruning(work, 1000, "cpu", f"{least}B")
    assert (tight.resident, tight.peak, tight.on_disk) == (False, least, put_aside(work))
    assert tight.disk == 1000 + sum(put_aside(work).values())
    with pytest.raises(ValueError, match="max-memory must be at least 6"):
        plan_pruning(work, 1000, "cpu", f"{least - 1}B")


def test_whole_model_counts_where_it_is_loaded(headless):
    recipe = Recipe(Metric("W"), Target(0.5, Row()))
    model = toy_model("llama", vocab_size=200_000, max_position_embeddings=64)
    work = Work(model, recipe, "float32", "float32", (0, 12), (2, 1))
    with pytest.raises(
        ValueError, match=r"max-memory .* \(libraries 614.4 MiB, the whole model 24"
    ):
        plan_pruning(work, 1000, "cpu", "615MiB", whole=True)
