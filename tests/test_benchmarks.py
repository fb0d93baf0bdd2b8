"""Benchmarks in a small form."""

import pytest
from search_process import figures_of

pytestmark = pytest.mark.slow


def test_a_driver_that_breeds_and_tunes_feeds_workers_that_sleep(tmp_path):
    figures = figures_of("scaling.py", tmp_path, "--only=16 x 2 s, even", "--seconds=4")
    (case,) = figures["cases"].values()
    assert case["candidates"] > 10 and 0 < case["busy"] <= 1


def test_methods_are_compared_with_a_reference_and_measured_once(tmp_path):
    options = ["--model=embedded", f"--out={tmp_path / 'kept'}", "--samples=4", "--target=60%"]
    options += ["--reference=sparsegpt", "--metric=wanda", "--variant=plain", "--variant=update"]
    first, again = (figures_of("compare.py", tmp_path, *options) for _ in range(2))
    assert again["embedded"] == first["embedded"]
    of = {name: by_cell["embedded own 60%"] for name, by_cell in first["relative_rises"].items()}
    assert of["sparsegpt"] == 1 and of["wanda update"] < of["wanda"]


def test_the_first_hour_on_a_gpu_runs_to_its_end_on_the_stand_in(tmp_path):
    written = figures_of("gpu.py", tmp_path, "--device=far")
    assert written["card"] == "NO GPU: a stand-in, on the CPU"
    checks = [row["ok"] for row in written["rows"]]
    assert False not in checks and checks.count(True) == 5
