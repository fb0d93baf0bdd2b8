"""The worker that is this process: what is raised in it means what it means everywhere."""

import errno
import re
from dataclasses import replace

import pytest
import torch
from toy_setup import (
    SNIP,
    WANDA,
    brief,
    embedded_setup,
    jobs_of,
    made_of,
    outcomes_of,
    quiet_pool,
    small,
)

from prunevolve.search import descent
from prunevolve.search.evaluator import Resident
from prunevolve.search.pool.worker import InProcess, fault_of
from prunevolve.search.records import Candidate

PLAIN, OTHER = Candidate(0, WANDA), Candidate(1, SNIP)
DESCENT = Candidate(5, SNIP, "descent", (2,))
CUDA = "CUDA error: an illegal memory access was encountered"
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4294967296 bytes. Error code 12"
)
LACKING = {
    "OutOfMemoryError: out of memory": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
    ),
    f"RuntimeError: {CUDA}": RuntimeError(f"{CUDA}\nCUDA kernel errors might be reported later"),
    "MemoryError: out of memory": MemoryError(),
    "RuntimeError: out of memory": RuntimeError(ALLOCATOR),
    "OSError: out of memory": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
"""Errors by their reasons, which are the same whatever the sizes are: the journal has them."""


@pytest.mark.parametrize(("reason", "error"), LACKING.items())
def test_lack_of_memory_and_errors_of_devices_are_one_kind_of_fault(reason, error):
    fault = fault_of(error)
    assert (fault.kind, fault.reason) == ("out of memory", reason)


@pytest.fixture(scope="module")
def setup(tiny_llama_dir):
    """An experiment on a tiny model, and descents on it that take a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "STEPS", 3)
        patch.setattr(descent, "STEPS_OF_TASK", 0)
        patch.setattr(descent, "LAST_STEPS", 1)
        settings = (f"model={tiny_llama_dir}", *small(2, length=16), "ray.workers=0")
        yield embedded_setup(*settings, terminals="XGVHM")


@pytest.fixture(scope="module")
def alone(setup):
    """The outcomes of an evaluator that no pool has."""
    evaluator = made_of(setup)
    return {candidate: evaluator.evaluate(candidate) for candidate in (PLAIN, OTHER, DESCENT)}


@pytest.fixture(scope="module")
def pool(setup):
    pool = quiet_pool(InProcess(setup), setup)
    brief(pool, setup)
    return pool


def test_error_fails_its_candidate_with_type_and_place(pool, alone, monkeypatch):
    prune = Resident.prune

    def raises(self, metric, *more):
        if metric == WANDA.metric:
            raise TypeError(f"got {object()}")
        return prune(self, metric, *more)

    monkeypatch.setattr(Resident, "prune", raises)
    pool.workers.faults.clear()
    failed, other = jobs_of(pool, [PLAIN, OTHER])
    assert other.outcome == alone[OTHER]
    assert failed.outcome.kind == "failed"
    # An address would differ between attempts.
    reason = r"TypeError: got <object object at 0x\.\.\.> at search/evaluator\.py:[1-9]\d*"
    assert re.fullmatch(reason, failed.outcome.reason)
    assert failed.trace.startswith("Traceback") and "TypeError" in failed.trace
    assert pool.workers.faults == {"error": 1}


def test_descent_makes_one_step_each_time_that_its_worker_is_asked(pool, alone):
    pool.submit(DESCENT)
    pool.submit(PLAIN)
    done, seen = [], []
    while len(done) < 2:
        if job := pool.next_done():
            done.append(job)
        seen += pool.workers.descents
    assert {index for index, _ in seen} == {DESCENT.index}
    assert [step.done for _, step in seen] == list(range(1, len(seen) + 1))
    assert len(seen) >= 4
    assert [job.candidate for job in done] == [DESCENT, PLAIN]
    assert [job.outcome for job in done] == [alone[DESCENT], alone[PLAIN]]
    assert done[0].outcome.tuned and done[0].timing["seconds"] > 0


def test_worker_begins_the_next_job_after_an_error_in_a_step(pool, alone, monkeypatch):
    step, calls = descent.Descent.step, []

    def raises(self, rate):
        calls.append(rate)
        if len(calls) == 3:
            raise KeyError("X")
        step(self, rate)

    monkeypatch.setattr(descent.Descent, "step", raises)
    fails = replace(DESCENT, index=6, criterion=WANDA)
    failed, *others = outcomes_of(pool, [fails, DESCENT, PLAIN])
    assert failed.reason.startswith("KeyError: 'X' at search/descent.py:")
    assert others == [alone[DESCENT], alone[PLAIN]]  # nothing is left of it
