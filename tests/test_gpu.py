"""Whole prunings and a search on another device end as on the CPU: on CUDA, and on a stand-in.

The stand-in refuses what mixes devices, so it shows what was forgotten. It shows no kernel, no
speed, no memory and no half precision of a GPU.
"""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import search_process
import torch
from far_device import CUDA, far_device
from toy_models import tensors_of, toy_model, toy_windows, weights_of

from prunevolve import evolve, prune, read_config, run_prune
from prunevolve.pruning.masks import Layer, Model, NOfM, Row, Target
from prunevolve.search import descent, run
from prunevolve.search.experiment import resolve
from prunevolve.search.run_folder import RunFolder

PRUNINGS = {
    "row": "--metric wanda --group row",
    "statistics": "--metric W*(G+X+V+H+abs(M)+B)",
    "layer": "--metric magnitude --group layer",
    "model": "--metric snip --group model",
    "2:4": "--metric gblm --pattern 2:4",
    "own masks": "--metric sparsegpt",
    "update": "--metric wanda --update sparsegpt",
    "training": "--metric wanda --update reconstruct",
    "sequential": "--metric wanda --propagation sequential",
    "fast": "--recipe fast",
}
WINDOWS = (
    "--samples 4 --seqlen 32 --corpus embedded --split calibration[:9%] "
    "--eval-windows 4 --eval-corpus embedded --eval-split report[:9%]"
)


# Now, while tests are collected: torch asks for devices once, at the first gradient.
FAR = far_device()

QUICK = ("statistics", "layer", "2:4", "own masks", "training")  # each with code of its own
PRUNINGS_BY_DEVICE = [
    *(pytest.param(*CUDA.values, way, marks=CUDA.marks) for way in PRUNINGS),
    *(pytest.param(FAR, way, marks=[pytest.mark.slow] * (way not in QUICK)) for way in PRUNINGS),
]


@pytest.fixture(params=[CUDA, FAR])
def device(request):
    return request.param


@pytest.fixture
def pruned(tiny_llama_dir, tmp_path):
    def run(name: str, device: str, words: str, code: int = 0) -> str:
        fixed = f"--model {tiny_llama_dir} --device {device} --out {tmp_path / name} {WINDOWS}"
        return search_process.started(run_prune, *f"{fixed} {words}".split(), code=code)[1]

    return run


def assert_as_on_the_cpu(out: Path, exact: bool = False) -> None:
    """See that two folders have nearly the same zeros, or exactly, and perplexities."""
    cpu, other = (tensors_of(out / place) for place in ("cpu", "device"))
    assert cpu.keys() == other.keys()
    apart = torch.cat([((cpu[name] == 0) != (other[name] == 0)).flatten() for name in cpu])
    # A near tie may fall the other way where sums run in another order.
    assert apart.float().mean() <= (0 if exact else 0.01)
    reports = [json.loads((out / x / "pruning_report.json").read_text()) for x in ("cpu", "device")]
    for name in ("dense_perplexity", "pruned_perplexity"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-3)


@pytest.mark.parametrize(("device", "way"), PRUNINGS_BY_DEVICE, indirect=["device"])
def test_pruning_ends_as_on_the_cpu(pruned, tmp_path, device, way):
    pruned("cpu", "cpu", PRUNINGS[way])
    pruned("device", device, PRUNINGS[way])
    assert_as_on_the_cpu(tmp_path, exact=way == "layer")  # whose scores are no sums


def test_streamed_pruning_ends_as_on_the_cpu(pruned, tmp_path, device):
    pruned("cpu", "cpu", PRUNINGS["fast"])
    refusal = pruned("device", device, f"{PRUNINGS['fast']} --max-memory 1KiB", code=2)
    least = re.search("must be at least ([0-9]+) KiB", refusal)[1]
    told = pruned("device", device, f"{PRUNINGS['fast']} --max-memory {least}KiB")
    assert "plan: streamed, one block at a time" in told
    assert_as_on_the_cpu(tmp_path)


@pytest.mark.parametrize("device", [CUDA, pytest.param(FAR, marks=pytest.mark.slow)], indirect=True)
def test_search_ends_as_on_the_cpu(monkeypatch, tmp_path, device):
    settings = [*search_process.SIZES, "search.candidates=10", "ray.workers=0"]
    for steps in ("STEPS", "MORE_STEPS", "LAST_STEPS"):
        monkeypatch.setattr(descent, steps, 2)
    fitness: list[dict[bool, list[float]]] = []
    for place in ("cpu", device):
        elsewhere = partial(replace, device=place)
        monkeypatch.setattr(run, "resolve", lambda config, to=elsewhere: to(resolve(config)))
        result = evolve(read_config("embedded", settings), tmp_path / place)
        assert (result.folder / "report.html").exists()
        records = RunFolder.look(result.folder).records()
        of = {True: list[float](), False: list[float]()}
        for record in records:
            value = -1 if record.fitness is None else record.fitness
            of[record.candidate.origin == "descent"].append(value)
        fitness.append(of)
    assert fitness[1][False] == pytest.approx(fitness[0][False], rel=5e-3)
    # The last bits of a derivative may decide which factor is left out.
    assert fitness[0][True] and fitness[1][True] == pytest.approx(fitness[0][True], rel=0.2)


@pytest.mark.parametrize(
    "target",
    [Target(0.5, Row()), Target(0.6, Layer()), Target(0.5, NOfM(2, 4)), Target(0.37, Model())],
)
def test_masks_are_those_of_the_cpu(target, device):
    # One decimal: many ties.
    scores = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    layers = {"a": scores, "b": 2 * scores}
    fractions = dict.fromkeys(layers, target.sparsity)
    elsewhere = dict(target.group.select(lambda name: layers[name].to(device), fractions))
    for name, mask in target.group.select(layers.__getitem__, fractions):
        assert torch.equal(elsewhere[name].cpu(), mask)


@pytest.mark.parametrize("update", ["sparsegpt", "reconstruct"])
def test_model_that_is_on_the_device_ends_as_on_the_cpu(update, device):
    weights = []
    for place in ("cpu", device):
        model = toy_model("llama").to(place)
        prune(model, "wanda", toy_windows(count=4), group="layer", update=update)
        weights.append(torch.cat([x.flatten().cpu() for x in weights_of(model).values()]))
    one, other = weights
    assert ((one == 0) != (other == 0)).float().mean() < 0.02
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99
