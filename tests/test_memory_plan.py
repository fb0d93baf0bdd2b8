"""What workers hold, worked by hand; what cannot fit is refused; less memory, the same results."""

import sys
from pathlib import Path

import pytest
import torch
from test_fitness import EMBEDDED, HALF, SNIP, WANDA, words
from toy_models import toy_model
from transformers import LlamaConfig

import run_search
from configs import schema
from pruning.leaves import LEAF_SETS, Statistics
from pruning.result.plan import GIB
from search import validation, worker_memory
from search.fitness import Evaluator, Setup
from search.population import Candidate
from search.resident import Memory
from search.worker_memory import Held, device_line, host_lines, needs_of

LLAMA2 = Path(schema.__file__).parent / "llama2_7b.yaml"
DEFAULTS = ("memory.statistics=float32", "memory.master=device", "memory.scores=keep")
ALL_LEAVES = frozenset(LEAF_SETS["extended"])

# Of the toy LLaMA: two blocks; q and o 16 x 16, k and v 8 x 16, gate and up 24 x 16, down 16 x 24.
TOY_BLOCK = 2 * 256 + 2 * 128 + 3 * 384
TOY_PRUNABLE = 2 * TOY_BLOCK
TOY_PARAMETERS = TOY_PRUNABLE + 2 * 61 * 16 + 5 * 16  # embeddings, head, norms


def toy(dtype: str = "float32", kept_tokens: int = 0) -> Held:
    return Held(toy_model("llama"), dtype, 3, 12, 10, kept_tokens)


@pytest.fixture
def llama2(tmp_path):
    """A folder with the config of LLaMA-2-7B and nothing else."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    ).save_pretrained(tmp_path / "llama2")
    return f"model={tmp_path / 'llama2'}"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


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
    assert size(model, ALL_LEAVES, dtype) == 2 * item * TOY_PRUNABLE + 8 * (3 * inputs + outputs)


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
    for name in ("scores", "activations", "logits"):
        assert two[name] == one[name]


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


# LLaMA-2-7B


def device_total(line: str) -> float:
    """Return the GiB that a line says of a worker's device."""
    return float(line.removeprefix("memory: device of a worker ").split()[0])


def test_llama2_fits_a_gpu_of_80_gb_as_the_file_says(llama2, no_gpu):
    lines = validation.memory_lines(schema.load(LLAMA2, [llama2]))
    # 6,738,415,616 parameters, 6,476,005,376 of them in the blocks' matrices, all of 2 bytes, as G
    # is; X of 35,584 inputs a block in fp32; 24 bytes for each weight of a matrix of 4,096 x
    # 11,008 and 2 for each of a block's 202,375,168; 4,096 tokens with 18 x 4,096 + 9 x 11,008
    # values and attention of 2 x 64 x 32, of 2 bytes; 256 x 32,000 logits of 12 bytes; CUDA.
    assert lines[0] == (
        "memory: device of a worker 40.51 GiB of 79.00 GiB: model 12.55 GiB, master copy 12.06 "
        "GiB, statistics 12.07 GiB, scores 1.38 GiB, activations 1.35 GiB, logits 93.75 MiB, "
        "CUDA 1.00 GiB"
    )
    # 128 windows of 2,048 tokens of 4,096 values, at 33 places.
    assert 128 * 2048 * 4096 * 2 * 33 / GIB == 66.0
    assert "collecting 78.07 GiB" in lines[2]
    extended = validation.memory_lines(schema.load(LLAMA2, [llama2, "search.primitives=extended"]))
    # M, A, V and B come to it.
    assert device_total(extended[0]) == pytest.approx(40.51 + 12.07, abs=0.02)


def test_llama2_fits_a_gpu_of_48_gb_with_the_copy_on_the_host(llama2, no_gpu):
    smaller = (
        llama2,
        "ray.gpu_memory=47",
        "search.primitives=extended",
        "memory.master=host",
    )
    lines = validation.memory_lines(schema.load(LLAMA2, list(smaller)))
    assert device_total(lines[0]) == pytest.approx(40.51 + 12.07 - 12.06, abs=0.02)
    assert "master copy 12.06 GiB" in lines[1]


@pytest.mark.parametrize(("primitives", "needed"), [("release", "100.82"), ("extended", "124.96")])
def test_llama2_with_the_defaults_is_refused(llama2, no_gpu, primitives, needed):
    # More than the file's: 12.06 GiB for each of G and M, and two times 24.13 GiB of scores.
    config = schema.load(LLAMA2, [llama2, f"search.primitives={primitives}", *DEFAULTS])
    with pytest.raises(ValueError, match=r"^a worker's device must have ") as error:
        validation.memory_lines(config)
    assert f"must have {needed} GiB (model 12.55 GiB, master copy 12.06 GiB" in str(error.value)
    assert "got 79.00 GiB: set memory.scores=recompute, " in str(error.value)


def test_validate_refuses_in_one_line_with_exit_2(llama2, no_gpu, monkeypatch, capsys):
    words = ["--validate", "--config", str(LLAMA2)]
    for override in (llama2, *DEFAULTS):
        words += ["--set", override]
    monkeypatch.setattr(sys, "argv", ["prunevolve-search", *words])
    with pytest.raises(SystemExit) as end:
        run_search.main()
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: a worker's device must have ")


def test_the_host_is_checked_where_workers_run_on_this_machine(llama2, no_gpu, monkeypatch):
    monkeypatch.setattr(validation.psutil, "virtual_memory", lambda: Free(100 * GIB))
    local = (llama2, "ray.address=local")
    with pytest.raises(
        ValueError, match=r"free for 1 worker .*got 100\.00 GiB: lower ray\.workers"
    ):
        validation.memory_lines(schema.load(LLAMA2, list(local)))
    fewer = validation.memory_lines(schema.load(LLAMA2, [*local, "calibration.windows=32"]))
    assert fewer[-1].startswith("memory: host with 1 worker ")
    assert validation.memory_lines(schema.load(LLAMA2, [llama2]))


class Free:
    """What psutil says of memory, of which only this is asked."""

    def __init__(self, available: int) -> None:
        self.available = available


def test_a_part_of_a_gpu_has_a_part_of_its_memory(llama2, no_gpu):
    config = schema.load(LLAMA2, [llama2, "ray.gpus_per_worker=0.5"])
    with pytest.raises(ValueError, match=r"got 39\.50 GiB"):
        validation.memory_lines(config)


def test_a_gpu_of_unknown_size_is_said_to_be_one(llama2, no_gpu):
    lines = validation.memory_lines(schema.load(LLAMA2, [llama2, "ray.gpu_memory=null"]))
    assert "of a size not known here: state ray.gpu_memory: " in lines[0]


def test_a_whole_text_of_unknown_length_is_said_to_be_not_counted():
    lines = validation.memory_lines(
        schema.load(None, ["calibration.windows=null", "calibration.seed=null"])
    )
    assert lines[0].startswith("memory: calibration has windows: null: ")
    config = schema.load(None, ["fitness.windows=null"])
    assert "fitness" not in validation.memory_lines(config)[0]
    config = schema.load(None, ["fitness.windows=null", "search.objective=kl"])
    assert validation.memory_lines(config)[0].startswith("memory: fitness has windows: null: ")


def test_a_model_whose_config_is_not_here_is_not_known():
    assert validation.memory_lines(schema.load(None, ["model=nobody/nothing"])) == [
        "memory: model nobody/nothing: its config is not here: not known"
    ]


# Less memory, the same results


def setup(memory: Memory) -> Setup:
    return Setup(
        subjects=(EMBEDDED,),
        windows=(words(3),),
        tasks=(HALF,),
        leaves=frozenset("XGM"),
        objective="nll",
        device="cuda" if torch.cuda.is_available() else "cpu",
        threads=1,
        stages=(),
        slack=0.1,
        hopeless=100.0,
        memory=memory,
    )


@pytest.fixture(scope="module")
def plenty():
    made = Evaluator(setup(Memory()))
    made.collect_statistics(0)
    return made


@pytest.mark.parametrize("group", ["row", "model"])
def test_a_copy_on_the_host_and_scores_made_again_change_nothing(plenty, group):
    sparing = Evaluator(setup(Memory(master="host", scores="recompute")))
    statistics = sparing.collect_statistics(0)
    assert sparing.model_digest(0) == plenty.model_digest(0)
    for name, tensor in plenty.residents[0].statistics.to_tensors().items():
        assert torch.equal(statistics[name], tensor.cpu())
    for metric in (SNIP, WANDA):
        candidate = Candidate(0, metric, group)
        assert sparing.evaluate(candidate) == plenty.evaluate(candidate)
        both = (metric, group), (WANDA, "row")
        assert sparing.zeros_and_overlap(0, *both) == plenty.zeros_and_overlap(0, *both)


def test_collected_matrices_are_rounded_once_and_scores_stay_fp32(plenty):
    rounding = Evaluator(setup(Memory(statistics="bfloat16")))
    rounded = rounding.collect_statistics(0)
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
    assert rounding.evaluate(Candidate(0, SNIP, "model")).kind == "evaluated"


def test_statistics_rounded_to_fp32_are_the_same_tensors():
    statistics = Statistics(G={"a": torch.ones(2, 3)}, X={"a": torch.ones(1, 3)})
    for name, tensor in statistics.rounded(torch.float32).to_tensors().items():
        assert tensor is statistics.to_tensors()[name]


def test_bf16_statistics_go_through_the_object_store_bit_for_bit():
    workers = pytest.importorskip("search.workers")
    tensors = {
        "G/a": torch.tensor([[1.5, -0.25]], dtype=torch.bfloat16),
        "X/a": torch.tensor([[1.1, 2.2]]),
    }
    for tensor in tensors.values():
        found = workers._read_only_tensor(workers._to_array(tensor))
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_on_the_host_is_pinned_beside_a_gpu():
    resident = Evaluator(setup(Memory(master="host"))).residents[0]
    assert all(copy.is_pinned() for copy in resident.master.values())
