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

CANDIDATES = [Candidate(0, WANDA), Candidate(1, SNIP)]
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


def test_error_fails_its_candidate_with_type_and_place(monkeypatch):
    setup = embedded_setup("ray.workers=0")
    pool = quiet_pool(InProcess(setup), setup)
    brief(pool, setup)
    prune, undisturbed = Resident.prune, outcomes_of(pool, CANDIDATES)

    def raises(self, metric, *more):
        if metric == WANDA.metric:
            raise TypeError(f"got {object()}")
        return prune(self, metric, *more)

    monkeypatch.setattr(Resident, "prune", raises)
    failed, other = jobs_of(pool, CANDIDATES)
    assert other.outcome == undisturbed[1]
    assert failed.outcome.kind == "failed"
    # An address would differ between attempts.
    reason = r"TypeError: got <object object at 0x\.\.\.> at search/evaluator\.py:[1-9]\d*"
    assert re.fullmatch(reason, failed.outcome.reason)
    assert failed.trace.startswith("Traceback") and "TypeError" in failed.trace
    assert pool.workers.faults == {"error": 1}


@pytest.fixture
def in_steps(tiny_llama_dir, monkeypatch):
    """Return an experiment on a tiny model, and a descent on it that takes a few steps."""
    monkeypatch.setattr(descent, "STEPS", 3)
    monkeypatch.setattr(descent, "STEPS_OF_TASK", 0)
    monkeypatch.setattr(descent, "LAST_STEPS", 1)
    settings = (f"model={tiny_llama_dir}", *small(2, length=16), "ray.workers=0")
    setup = embedded_setup(*settings, terminals="XGVHM")
    return setup, Candidate(5, SNIP, "descent", (2,))


def test_descent_makes_one_step_each_time_that_its_worker_is_asked(in_steps):
    setup, candidate = in_steps
    pool = quiet_pool(InProcess(setup), setup)
    brief(pool, setup)
    pool.submit(candidate)
    pool.submit(Candidate(6, WANDA))
    done, seen = [], []
    while len(done) < 2:
        if job := pool.next_done():
            done.append(job)
        seen += pool.workers.descents
    (index,), steps = {index for index, _ in seen}, [step for _, step in seen]
    assert index == 5
    assert [step.done for step in steps] == list(range(1, len(steps) + 1))
    assert len(steps) >= 4
    assert [job.candidate.index for job in done] == [5, 6]
    whole = made_of(setup)
    assert [job.outcome for job in done] == [whole.evaluate(job.candidate) for job in done]
    assert done[0].outcome.tuned and done[0].timing["seconds"] > 0


def test_worker_begins_the_next_job_after_an_error_in_a_step(in_steps, monkeypatch):
    setup, candidate = in_steps
    pool = quiet_pool(InProcess(setup), setup)
    brief(pool, setup)
    (expected,) = outcomes_of(pool, [candidate])
    step, calls = descent.Descent.step, []

    def raises(self, rate):
        calls.append(rate)
        if len(calls) == 3:
            raise KeyError("X")
        step(self, rate)

    monkeypatch.setattr(descent.Descent, "step", raises)
    again = replace(candidate, index=6, criterion=WANDA)
    failed, _, other = outcomes_of(pool, [candidate, again, CANDIDATES[0]])
    assert failed.reason.startswith("KeyError: 'X'") and other.kind == "evaluated"
    assert outcomes_of(pool, [candidate]) == [expected]  # nothing is left of it
