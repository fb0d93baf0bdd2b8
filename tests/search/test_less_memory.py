"""Less memory in the config, the same results."""

import pytest
import torch
from toy_setup import SNIP, WANDA, made_of, setup_of, words

from configs.schema import Memory
from pruning.criterion import Criterion
from search.fitness import Evaluator, Setup
from search.population import Candidate


def setup(memory: Memory) -> Setup:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    windows = (words(3),)
    return setup_of(windows=windows, leaves=frozenset("XGM"), device=device, memory=memory)


@pytest.fixture(scope="module")
def plenty():
    return made_of(setup(Memory()))


@pytest.mark.parametrize("group", ["row", "model"])
def test_copy_on_the_host_and_scores_made_again_change_nothing(plenty, group):
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copy_on_the_host_is_pinned_beside_a_gpu():
    resident = Evaluator(setup(Memory(master="host"))).residents[0]
    assert all(copy.is_pinned() for copy in resident.master.values())
