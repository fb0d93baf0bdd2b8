"""What a search will run, and where, before any work."""

import os

import pytest

from prunevolve.configs import schema
from prunevolve.search import plan


def lines_of(*overrides: str) -> list[str]:
    return plan.plan_of(schema.load(None, list(overrides)))


@pytest.mark.parametrize(
    ("workers", "lag", "asked"), [(4, 15, 64), (4, 16, 0), (64, 8, 1024), (1, 0, 0), (0, 0, 0)]
)
def test_a_lag_that_is_small_for_the_workers_is_said_to_be(workers, lag, asked, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    lines = lines_of(f"ray.workers={workers}", f"search.lag={lag}")
    warned = [line for line in lines if line.startswith("warning: ")]
    assert len(warned) == bool(asked)
    assert all(f"search.lag={asked}," in line for line in warned)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["ray.workers=0"], "workers: 1 in this process, 1 core each, of 8 cores"),
        (["ray.cpus_per_worker=3"], "workers: 2 here, 3 cores each, of 8 cores"),
        (
            ["ray.address=auto", "ray.workers=64", "ray.gpus_per_worker=1"],
            "workers: up to 64 on the cluster 'auto', 1 core and 1 GPU each",
        ),
    ],
)
def test_workers_are_said_with_their_place_cores_and_gpus(overrides, line, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert line in lines_of(*overrides)
