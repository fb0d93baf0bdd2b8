"""What a search needs of this machine: a model of 7B is told to fit, or refused, by its config."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from prunevolve.configs import schema
from prunevolve.pruning.sizes import GIB
from prunevolve.search import plan
from prunevolve.search.experiment import resolve

LLAMA2 = Path(schema.__file__).parent / "llama2_7b.yaml"
DEFAULTS = ("memory.statistics=float32", "memory.master=device", "memory.scores=keep")


def memory_lines(path: Path | None, *overrides: str) -> list[str]:
    return plan.memory_lines(resolve(schema.load(path, list(overrides))))


@pytest.fixture
def llama2(tmp_path, monkeypatch):
    """The config of LLaMA-2-7B and nothing else, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    words = {"vocab_size": 32000, "max_position_embeddings": 4096}
    config = LlamaConfig(num_attention_heads=32, **shape, **words)
    config.save_pretrained(tmp_path / "llama2")
    return f"model={tmp_path / 'llama2'}"


def device_total(line: str) -> float:
    """Return the GiB that a line says of a worker's device."""
    return float(line.removeprefix("memory: device of a worker ").split()[0])


def test_llama2_fits_a_gpu_of_80_gb_as_the_file_says(llama2):
    lines = memory_lines(LLAMA2, llama2, "search.primitives=release")
    # 6,738,415,616 parameters, 6,476,005,376 of them in the blocks' matrices, all of 2 bytes, as G
    # is; 24 bytes for each weight of a matrix of 4,096 x 11,008 and 2 for each of a block's
    # 202,375,168; 256 x 32,000 logits of 12 bytes; CUDA.
    assert lines[0] == (
        "memory: device of a worker 39.16 GiB of 79.00 GiB: model 12.55 GiB, master copy 12.06 "
        "GiB, statistics 12.07 GiB, work 1.48 GiB, CUDA 1.00 GiB"
    )
    # 128 windows of 2,048 tokens of 4,096 values of 2 bytes, at 33 places: 66 GiB.
    assert "collecting 78.07 GiB" in lines[2]
    extended = memory_lines(LLAMA2, llama2)
    # M comes to it, and the vectors V, B and H.
    assert device_total(extended[0]) == pytest.approx(39.16 + 12.07, abs=0.02)


def test_llama2_fits_a_gpu_of_48_gb_with_the_copy_on_the_host(llama2):
    lines = memory_lines(LLAMA2, llama2, "ray.gpu_memory=47", "memory.master=host")
    assert device_total(lines[0]) == pytest.approx(39.16 + 12.07 - 12.06, abs=0.02)
    assert "master copy 12.06 GiB" in lines[1]


@pytest.mark.parametrize(("primitives", "needed"), [("release", "99.47"), ("extended", "123.62")])
def test_llama2_with_the_defaults_is_refused(llama2, primitives, needed):
    # More than the file's: 12.06 GiB for each of G and M, and two times 24.13 GiB of scores.
    with pytest.raises(ValueError, match=r"^a worker's device must have ") as error:
        memory_lines(LLAMA2, llama2, f"search.primitives={primitives}", *DEFAULTS)
    assert f"must have {needed} GiB (model 12.55 GiB, master copy 12.06 GiB" in str(error.value)
    assert "got 79.00 GiB: set memory.scores=recompute, " in str(error.value)


def test_host_is_checked_where_workers_run_on_this_machine(llama2, monkeypatch):
    free = SimpleNamespace(available=100 * GIB)
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: free)
    local = (llama2, "ray.address=local", "search.primitives=release")
    with pytest.raises(ValueError, match=r"free for 1 worker .*got 100\.00 GiB: take fewer c"):
        memory_lines(LLAMA2, *local)
    fewer = memory_lines(LLAMA2, *local, "calibration.windows=32")
    assert fewer[-1].startswith("memory: host with 1 worker ")
    assert memory_lines(LLAMA2, llama2)


def test_refusal_of_too_many_workers_names_the_most_that_fit(monkeypatch):
    free = SimpleNamespace(available=100 * GIB)
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: free)
    with pytest.raises(ValueError, match=r"set ray\.workers to ") as error:
        plan.check(schema.load("embedded", ["ray.workers=1000"]))
    most = int(str(error.value).partition("set ray.workers to ")[2].split()[0])
    assert plan.check(schema.load("embedded", [f"ray.workers={most}"]))
    with pytest.raises(ValueError, match=f"set ray.workers to {most} at most"):
        plan.check(schema.load("embedded", [f"ray.workers={most + 1}"]))


def test_part_of_a_gpu_has_a_part_of_its_memory_and_one_of_unknown_size_is_said_to_be(llama2):
    with pytest.raises(ValueError, match=r"got 39\.50 GiB"):
        memory_lines(LLAMA2, llama2, "ray.gpus_per_worker=0.5")
    lines = memory_lines(LLAMA2, llama2, "ray.gpu_memory=null")
    assert "of an unknown size: state ray.gpu_memory: " in lines[0]


def test_text_of_unknown_size_is_said_to_be_not_counted():
    lines = memory_lines(None, "calibration.windows=null", "calibration.seed=null")
    assert lines[0].startswith("memory: calibration has windows: null: ")
    assert "fitness" not in memory_lines(None, "fitness.windows=null")[0]


@pytest.mark.parametrize(
    ("workers", "lag", "asked"), [(4, 15, 64), (4, 16, 0), (64, 8, 1024), (1, 0, 0), (0, 0, 0)]
)
def test_a_lag_that_is_small_for_the_workers_is_said_to_be(workers, lag, asked, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(plan, "memory_lines", lambda experiment: [])
    config = schema.load(None, [f"ray.workers={workers}", f"search.lag={lag}"])
    warned = [line for line in plan.plan_of(config) if line.startswith("warning: ")]
    assert len(warned) == bool(asked)
    assert all(f"search.lag={asked}," in line for line in warned)
