"""The bound of what a pruning holds, worked by hand."""

from functools import partial
from types import SimpleNamespace

import pytest
from toy_models import toy_model

from prunevolve.pruning import memory
from prunevolve.pruning.memory import LIBRARIES, cgroup_rooms, peak_of, plan_pruning, put_aside
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.passes import passes_of, procedure_of
from prunevolve.pruning.run.options import Method

# Of the toy LLaMA: two blocks; q and o 16 x 16, k and v 8 x 16, gate and up 24 x 16, down 16 x 24.
BLOCK = 2 * 256 + 2 * 128 + 3 * 384
OPEN = 4 * (BLOCK + 2 * 16)  # with its norms
OUTSIDE = 4 * (2 * 61 * 16 + 16)  # embeddings, head, norm
LOGITS = 3 * 4 * 256 * 61
TOKENS = 12
BACK = 4 * TOKENS * (18 * 16 + 9 * 24 + 2 * TOKENS * 4)
"""A window's graph: 18 x 16 + 9 x 24 values a token, and twice attention to all in 4 heads."""


class Held:
    def __init__(self, metric="mul(W, G)", group="row", device="cpu", tokens=TOKENS, **methods):
        criterion = Criterion.parse(metric, group)
        recipe = procedure_of(Method(**methods), criterion)
        kinds = {"dtype": "float32", "own_dtype": "bfloat16", "device": device}
        kinds |= {"shapes": toy_model("llama"), "seqlen": tokens, "file_size": 1000}
        model = SimpleNamespace(**kinds)
        passes = passes_of(recipe, recipe.dense_terminals)
        self.passes = {each.name: peak_of(each, model, recipe) for each in passes}
        self.aside = put_aside(model, passes, calibration=3, held_back=0, evaluation=2)
        self.plan = partial(plan_pruning, model, recipe, 3, 0, 2)


def test_pass_without_gradients_holds_a_block_and_a_scored_matrix_or_the_head():
    held = Held("mul(W, sqrt(X))")
    # Larger than the block with what is scored and written of it.
    assert held.passes == {"prune": OUTSIDE + LOGITS + 2 * BLOCK}
    assert OPEN + 3 * 4 * 384 + 2 * BLOCK < LOGITS
    # Of two blocks' inputs a block's, and what leaves it; twice for evaluation.
    assert held.aside == {"hidden states": 4 * 16 * TOKENS * (3 * 2 + 2 * 2), "statistics": 0}


@pytest.fixture
def headless(monkeypatch):
    """Leave out the head, which is larger than a toy's block."""
    monkeypatch.setattr(memory, "HEAD_TOKENS", -8)


def test_backward_pass_holds_gradients_beside_their_sums(headless):
    expected = OPEN + 4 * BLOCK + BACK + 2 * 4 * 384
    assert Held().passes["backward"] == expected + 2 * BLOCK
    # Where nothing is pruned on the way back.
    assert Held(group="model").passes["backward"] == expected
    # A device adds a whole gradient of this size at once, with up to 16 bytes for each element.
    assert Held(group="model", device="cuda").passes["backward"] == expected + 16 * 384


def test_group_model_waits_with_all_statistics():
    held = Held(group="model")
    assert list(held.passes) == ["forward", "backward", "threshold", "prune"]
    assert held.passes["threshold"] == 4 * 3 * 384
    # The inputs of every block wait for the backward pass.
    states = 4 * 16 * TOKENS * (3 * 3 + 2 * 2)
    assert held.aside == {"hidden states": states, "statistics": 4 * 2 * BLOCK}


def test_gram_matrix_and_training_are_work_on_a_block(headless):
    sums = 4 * (6 * 16**2 + 24**2)
    updated = Held("W", update="sparsegpt").passes["prune"]
    assert updated >= OPEN + sums + 2 * BLOCK + 4 * (2 * 384 + 4 * 24**2)
    trained = Held("W", update="reconstruct").passes["prune"]
    without = 4 * BLOCK  # the block beside it, which the guard compares with
    assert trained == OPEN + 2 * BLOCK + without + 4 * 8 * BLOCK + BACK


def test_scores_that_a_device_sorts_take_forty_bytes_each(headless):
    # The largest matrix has 384 weights; the loop on the CPU needs three fp32 values for each.
    for group, device, each in (("row", "cpu", 12), ("row", "cuda", 40), ("model", "cuda", 12)):
        held = Held("W", group, device, tokens=2)
        assert held.passes["prune"] == OPEN + 2 * BLOCK + each * 384


def test_eager_attention_holds_the_scores_of_all_queries():
    model = SimpleNamespace(shapes=toy_model("gemma2"), seqlen=TOKENS)
    # In 4 heads five times 12 x 12 scores, with a graph nine.
    for backward, scores in ((False, 5), (True, 9)):
        values = TOKENS * (18 * 16 + 9 * 24 + scores * TOKENS * 4)
        assert memory.activations(model, backward) == values


def test_plan_holds_all_where_that_fits_and_puts_aside_what_does_not():
    held = Held(group="model")
    aside, most = sum(held.aside.values()), max(held.passes.values())
    plan = held.plan(10 << 30)
    assert plan.resident and (plan.on_disk, plan.disk) == ([], 1000)
    assert plan.peak == LIBRARIES + most + aside + 2 * OPEN
    least = LIBRARIES + most
    tight = held.plan(least)
    assert (tight.resident, tight.peak, tight.on_disk) == (False, least, list(held.aside))
    assert tight.disk == 1000 + aside
    with pytest.raises(ValueError, match="max-memory must be at least 6"):
        held.plan(least - 1)


def test_blocks_on_a_gpu_take_nothing_of_the_host(monkeypatch):
    held = Held(group="model", device="cuda:0")
    on_gpu, aside = max(held.passes.values()) + OPEN, sum(held.aside.values())
    for free, resident in ((on_gpu + 2 * OPEN, True), (on_gpu + 2 * OPEN - 1, False)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, 1 << 40))
        least = LIBRARIES + 2 * BLOCK + aside
        plan = held.plan(least)
        assert (plan.resident, plan.on_disk, plan.peak) == (resident, [], least)
    with pytest.raises(ValueError, match=r"max-memory .* the whole model\)"):
        held.plan(LIBRARIES + 2 * OPEN, loads=True)  # loaded by way of the host
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (on_gpu - 1, 1 << 40))
    with pytest.raises(ValueError, match=r"device 'cuda:0' must have .* free, got "):
        held.plan(None)


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
        assert Held("W").plan(None).budget == budget


def test_whole_model_counts_where_it_is_loaded(headless):
    held, needed = Held("W", tokens=1), LIBRARIES + 2 * OPEN + OUTSIDE
    assert held.plan(needed, loads=True).peak == needed
    with pytest.raises(ValueError, match=r"max-memory .* the rest for the whole model\), got "):
        held.plan(needed - 1, loads=True)
    assert held.plan(needed - 1).peak < needed
