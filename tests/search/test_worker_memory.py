"""What workers hold, worked by hand; less memory, the same results."""

import pytest
import torch
from toy_models import toy_model
from toy_setup import SNIP, WANDA, made_of, setup_of, words

from pruning.criterion import Criterion
from pruning.leaves import LEAF_SETS, Statistics
from pruning.result.plan import GIB
from search import worker_memory
from search.fitness import Evaluator, Setup
from search.population import Candidate
from search.resident import Memory
from search.worker_memory import Held, device_line, host_lines, needs_of

ALL_LEAVES = frozenset(LEAF_SETS["extended"])

# Of the toy LLaMA: two blocks; q and o 16 x 16, k and v 8 x 16, gate and up 24 x 16, down 16 x 24.
TOY_BLOCK = 2 * 256 + 2 * 128 + 3 * 384
TOY_PRUNABLE = 2 * TOY_BLOCK
TOY_PARAMETERS = TOY_PRUNABLE + 2 * 61 * 16 + 5 * 16  # embeddings, head, norms


def toy(dtype: str = "float32", kept_tokens: int = 0) -> Held:
    return Held(toy_model("llama"), dtype, 3, 12, 10, kept_tokens)


# The arithmetic


def test_sizes_of_a_model_are_those_of_its_layers():
    held = toy("float16")
    assert (held.item, held.parameters) == (2, TOY_PARAMETERS)
    assert (held.prunable, held.block, held.matrix) == (TOY_PRUNABLE, TOY_BLOCK, 384)


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_statistics_round_matrices_and_not_vectors(dtype, item):
    model = toy_model("llama")
    inputs, outputs = 6 * 16 + 24, 16 + 8 + 8 + 16 + 24 + 24 + 16
    size = worker_memory.statistics_size
    assert size(model, frozenset("WG"), dtype) == item * TOY_PRUNABLE
    assert size(model, frozenset("X"), dtype) == 2 * 4 * inputs
    assert size(model, frozenset("B"), dtype) == 2 * 4 * outputs
    assert size(model, ALL_LEAVES, dtype) == 2 * item * TOY_PRUNABLE + 8 * (
        4 * inputs + outputs + 3 * 7
    )


def test_an_evaluating_device_holds_model_copy_statistics_scores_and_a_window():
    assert worker_memory.evaluating([toy()], frozenset("G"), Memory(), True) == {
        "model": 4 * TOY_PARAMETERS,
        "master copy": 4 * TOY_PRUNABLE,
        "statistics": 4 * TOY_PRUNABLE,
        # Of two formulas; six values for each weight of a matrix; a block's new weights.
        "scores": 2 * 4 * TOY_PRUNABLE + 24 * 384 + 4 * TOY_BLOCK,
        "final states": 0,
        # Ten tokens: 18 x 16 + 9 x 24 values each, and twice attention to 10 tokens in 4 heads.
        "activations": 4 * 10 * (18 * 16 + 9 * 24 + 2 * 10 * 4),
        "logits": 3 * 4 * 256 * 61,
    }


def test_less_memory_is_held_as_the_config_says():
    less = Memory("bfloat16", "host", "recompute")
    rows = worker_memory.evaluating([toy("float16")], frozenset("G"), less, True)
    assert rows["master copy"] == 0
    assert rows["statistics"] == 2 * TOY_PRUNABLE
    assert rows["scores"] == 24 * 384 + 2 * TOY_BLOCK
    patterns = worker_memory.evaluating([toy("float16")], frozenset("G"), Memory(), False)
    assert patterns["scores"] == rows["scores"]


def test_the_objective_kl_keeps_the_final_states():
    rows = worker_memory.evaluating([toy(kept_tokens=20)], frozenset("G"), Memory(), True)
    assert (rows["final states"], rows["logits"]) == (4 * 20 * 16, 2 * 3 * 4 * 256 * 61)


def test_a_collecting_device_holds_the_sums_of_one_block():
    rows = worker_memory.collecting([toy("float16")], frozenset("GMX"), Memory())
    assert rows["sums"] == 2 * 4 * TOY_BLOCK
    assert rows["gradients"] == 2 * 2 * 384
    assert worker_memory.collecting([toy()], frozenset("X"), Memory())["gradients"] == 0


def test_several_models_are_held_together_and_work_one_after_the_other():
    one = worker_memory.evaluating([toy()], frozenset("G"), Memory(), True)
    two = worker_memory.evaluating([toy(), toy()], frozenset("G"), Memory(), True)
    for name in ("model", "master copy", "statistics"):
        assert two[name] == 2 * one[name]
    for name in ("activations", "logits"):
        assert two[name] == one[name]
    # The last formula's scores of the other model stay until its own turn.
    assert two["scores"] == one["scores"] + 4 * TOY_PRUNABLE


def test_a_node_on_gpus_holds_statistics_for_ray_the_driver_and_the_collection():
    needs = needs_of([toy()], frozenset("GW"), Memory(master="host"), True, True, True)
    statistics = 4 * TOY_PRUNABLE
    # Three windows of 12 tokens: every block's inputs, and what leaves the last.
    states = 4 * 3 * 12 * 16 * 3
    assert needs.worker["model while it is loaded"] == 4 * TOY_PARAMETERS
    assert needs.worker["master copy"] == 4 * TOY_PRUNABLE
    assert needs.node["statistics in Ray's object store"] == statistics
    assert needs.node["the driver"] == int(0.6 * GIB) + 2 * statistics
    assert needs.node["collecting"] == statistics + states
    assert needs.device["CUDA"] == GIB
    assert needs.host(3) == sum(needs.node.values()) + 3 * sum(needs.worker.values())


def test_workers_on_the_cpu_share_the_statistics():
    for memory in (Memory(), Memory(master="host")):
        needs = needs_of([toy()], frozenset("G"), memory, True, False, True)
        assert needs.device == {}
        assert needs.worker["statistics"] == 0
        assert needs.worker["model"] == 4 * TOY_PARAMETERS
        assert needs.worker["master copy"] == 4 * TOY_PRUNABLE
    alone = needs_of([toy()], frozenset("G"), Memory(), True, False, False)
    assert alone.node["statistics in Ray's object store"] == 0
    assert alone.node["the driver"] == 4 * TOY_PRUNABLE


def test_what_does_not_fit_is_refused_with_what_is_needed_and_what_is_there():
    needs = worker_memory.Needs({"model": 3 * GIB}, {"libraries": GIB}, {"the driver": 2 * GIB})
    assert device_line(needs, 3 * GIB) == (
        "memory: device of a worker 3.00 GiB of 3.00 GiB: model 3.00 GiB"
    )
    assert "state ray.gpu_memory" in device_line(needs, None)
    with pytest.raises(ValueError, match=r"must have 3\.00 GiB \(model .*got 2\.00 GiB: set mem"):
        device_line(needs, 2 * GIB)
    assert host_lines(needs, 2, 4 * GIB)[-1] == "memory: host with 2 workers 4.00 GiB of 4.00 GiB"
    assert len(host_lines(needs, None, 0)) == 2
    with pytest.raises(ValueError, match=r"have 5\.00 GiB free for 3 workers .*got 4\.00 GiB: low"):
        host_lines(needs, 3, 4 * GIB)


# Less memory, the same results


def setup(memory: Memory) -> Setup:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    windows = (words(3),)
    return setup_of(windows=windows, leaves=frozenset("XGM"), device=device, memory=memory)


@pytest.fixture(scope="module")
def plenty():
    return made_of(setup(Memory()))


@pytest.mark.parametrize("group", ["row", "model"])
def test_a_copy_on_the_host_and_scores_made_again_change_nothing(plenty, group):
    sparing = Evaluator(setup(Memory(master="host", scores="recompute")))
    statistics = sparing.collect_statistics(0)
    sparing.use_statistics(0, statistics)
    sparing.use_scale(plenty.scale)
    assert sparing.digests == plenty.digests
    for name, tensor in plenty.residents[0].statistics.to_tensors().items():
        assert torch.equal(statistics[name], tensor.cpu())
    for metric in (SNIP.metric, WANDA.metric):
        criterion = Criterion(metric, group)
        candidate = Candidate(0, criterion)
        assert sparing.evaluate(candidate) == plenty.evaluate(candidate)
        both = criterion, WANDA
        assert sparing.zeros_and_overlap(0, *both) == plenty.zeros_and_overlap(0, *both)


def test_collected_matrices_are_rounded_once_and_scores_stay_fp32(plenty):
    rounding = Evaluator(setup(Memory(statistics="bfloat16")))
    rounded = rounding.collect_statistics(0)
    rounding.use_statistics(0, rounded)
    rounding.use_scale(plenty.scale)
    exact = plenty.residents[0].statistics.to_tensors()
    assert rounded.keys() == exact.keys()
    for name, tensor in rounded.items():
        expected = exact[name].cpu()
        if not name.startswith("X/"):
            expected = expected.bfloat16()
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, expected)
        assert tensor.dtype == expected.dtype
    probe = rounding.probe_tensors(0)
    name = next(name for name in probe if name.startswith("G/"))
    assert probe[name].dtype == torch.float32
    assert torch.equal(probe[name], probe[name].bfloat16().float())
    assert rounding.evaluate(Candidate(0, SNIP)).kind == "evaluated"


def test_statistics_rounded_to_fp32_are_the_same_tensors():
    statistics = Statistics(G={"a": torch.ones(2, 3)}, X={"a": torch.ones(1, 3)})
    for name, tensor in statistics.rounded(torch.float32).to_tensors().items():
        assert tensor is statistics.to_tensors()[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_on_the_host_is_pinned_beside_a_gpu():
    resident = Evaluator(setup(Memory(master="host"))).residents[0]
    assert all(copy.is_pinned() for copy in resident.master.values())
