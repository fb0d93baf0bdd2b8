"""The bound of what a pruning holds, worked by hand."""

from types import SimpleNamespace

import pytest
from toy_models import toy_model

from prunevolve.pruning import memory
from prunevolve.pruning.masks import Model, Row, Target
from prunevolve.pruning.memory import (
    LIBRARIES,
    Work,
    cgroup_rooms,
    held,
    plan_pruning,
    put_aside,
)
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.passes import Recipe
from prunevolve.pruning.run.job import recipe_of
from prunevolve.pruning.run.options import Method

# Of the toy LLaMA: two blocks; q and o 16 x 16, k and v 8 x 16, gate and up 24 x 16, down 16 x 24.
BLOCK = 2 * 256 + 2 * 128 + 3 * 384
INPUTS, NORMS = 6 * 16 + 24, 2 * 16
OUTSIDE = 2 * 61 * 16 + 16  # embeddings, head, norm
LOGITS = 3 * 4 * 256 * 61


def work_of(metric="mul(W, G)", group=None, device="cpu", family="llama", **methods):
    criterion = Criterion.parse(metric, (group or Row()).name)
    recipe = recipe_of(Method(**methods), criterion, own_masks=False)
    return Work(toy_model(family), recipe, "float32", device, "bfloat16", (3, 12), (2, 10))


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
    # A device adds a whole gradient of this size at once, with up to 16 bytes for each element.
    device = work_of(group=Model(), device="cuda")
    assert held(device.passes[1], device) == expected | {"work": window + 16 * 384}


def test_group_model_waits_with_all_statistics():
    work = work_of(group=Model())
    assert [one.name for one in work.passes] == ["forward", "backward", "threshold", "prune"]
    assert held(work.passes[2], work) == {"scores": 4 * 3 * 384}
    # The inputs of every block wait for the backward pass.
    states = 4 * 16 * (3 * 3 * 12 + 2 * 2 * 10)
    assert put_aside(work) == {"hidden states": states, "statistics": 4 * 2 * BLOCK}


def test_gram_matrix_and_training_are_work_on_a_block(headless):
    update = work_of("W", update="sparsegpt")
    (one,) = update.passes
    assert held(one, update)["work"] >= 2 * BLOCK + 4 * (2 * 384 + 4 * 24**2)
    trained = work_of("W", update="reconstruct")
    (one,) = trained.passes
    window = 4 * 12 * (18 * 16 + 9 * 24 + 2 * 12 * 4)
    assert held(one, trained)["work"] == 2 * BLOCK + 4 * 8 * BLOCK + window


def test_plan_holds_all_where_that_fits_and_puts_aside_what_does_not():
    work = work_of(group=Model())
    plan = plan_pruning(work, 1000, "10GiB")
    assert plan.resident and plan.disk == 1000
    blocks = {"other blocks": 2 * 4 * (BLOCK + NORMS)}
    assert plan.beside == {"libraries": LIBRARIES} | put_aside(work) | blocks
    least = LIBRARIES + max(sum(rows.values()) for _, rows in plan.passes)
    tight = plan_pruning(work, 1000, f"{least}B")
    assert (tight.resident, tight.peak, tight.on_disk) == (False, least, put_aside(work))
    assert tight.disk == 1000 + sum(put_aside(work).values())
    with pytest.raises(ValueError, match="max-memory must be at least 6"):
        plan_pruning(work, 1000, f"{least - 1}B")


def test_scores_that_a_device_sorts_take_forty_bytes_each(headless):
    # The largest matrix has 384 weights; the loop on the CPU needs three fp32 values for each.
    for group, device, each in ((Row(), "cpu", 12), (Row(), "cuda", 40), (Model(), "cuda", 12)):
        recipe = Recipe(Metric("W"), Target(0.5, group))
        shapes = toy_model("llama")
        work = Work(shapes, recipe, "float32", device, "bfloat16", (0, 2), (2, 2))
        assert held(work.passes[-1], work)["work"] == 2 * BLOCK + each * 384


def test_eager_attention_holds_the_scores_of_all_queries(headless):
    work = work_of(family="gemma2")
    forward, backward, _ = work.passes
    # Five times 10 x 10 scores in 4 heads, with a graph nine; a query matrix has 32 x 16 weights.
    assert held(forward, work)["work"] == 4 * 10 * (18 * 16 + 9 * 24 + 5 * 10 * 4)
    window = 4 * 12 * (18 * 16 + 9 * 24 + 9 * 12 * 4) + 2 * 4 * 512
    assert held(backward, work)["work"] == work.shard + window


def test_blocks_on_a_gpu_take_nothing_of_the_host(monkeypatch):
    work = work_of(group=Model(), device="cuda:0")
    on_gpu = max(sum(held(one, work).values()) for one in work.passes) + 4 * (BLOCK + NORMS)
    blocks = 2 * 4 * (BLOCK + NORMS)
    for free, resident in ((on_gpu + blocks, True), (on_gpu + blocks - 1, False)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, 1 << 40))
        least = LIBRARIES + 2 * BLOCK + sum(put_aside(work).values())
        plan = plan_pruning(work, 1000, f"{least}B")
        assert (plan.resident, plan.on_disk, plan.peak) == (resident, {}, least)
        assert plan.beside == {"libraries": LIBRARIES} | put_aside(work)
    with pytest.raises(ValueError, match=r"max-memory .* the whole model "):
        plan_pruning(work, 1000, f"{LIBRARIES + blocks}B", whole=True)  # loaded by way of the host
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (on_gpu - 1, 1 << 40))
    with pytest.raises(ValueError, match=r"device 'cuda:0' must have .* free, got "):
        plan_pruning(work, 1000, None)


def test_limit_of_a_control_group_and_of_those_above_counts(tmp_path, monkeypatch):
    def group(place, limit, used, **stat):
        folder = tmp_path / "sys/fs/cgroup" / place
        folder.mkdir(parents=True, exist_ok=True)
        rows = "".join(f"{name} {size}\n" for name, size in stat.items())
        for name, text in {**limit, **used, "memory.stat": rows}.items():
            (folder / name).write_text(str(text))

    assert cgroup_rooms(tmp_path) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/slurm/job\n1:name=x:/\n0::/a/b\n")
    stat = {"inactive_file": 5, "total_inactive_file": 30}
    group("memory/slurm", {"memory.limit_in_bytes": 1000}, {"memory.usage_in_bytes": 100}, **stat)
    # What is in use, 100, less the cache that is given back at once, 30.
    assert cgroup_rooms(tmp_path) == [930]
    group("a/b", {"memory.max": "max"}, {"memory.current": 50}, **stat)
    group("a", {"memory.max": 200}, {"memory.current": 60}, **stat)
    group("", {"memory.max": 40}, {"memory.current": 60}, **stat)  # as in a container
    assert sorted(cgroup_rooms(tmp_path)) == [0, 145, 930]
    free = SimpleNamespace(available=2 * LIBRARIES)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    for rooms, budget in (([], 2 * LIBRARIES), ([LIBRARIES + 10**6], LIBRARIES + 10**6)):
        monkeypatch.setattr(memory, "cgroup_rooms", lambda root, rooms=rooms: rooms)
        assert plan_pruning(work_of("W"), 1000, None).budget == budget


def test_whole_model_counts_where_it_is_loaded(headless):
    recipe = Recipe(Metric("W"), Target(0.5, Row()))
    model = toy_model("llama", vocab_size=200_000, max_position_embeddings=64)
    work = Work(model, recipe, "float32", "cpu", "float32", (0, 12), (2, 1))
    with pytest.raises(
        ValueError, match=r"max-memory .* \(libraries 614.4 MiB, the whole model 24"
    ):
        plan_pruning(work, 1000, "615MiB", whole=True)
