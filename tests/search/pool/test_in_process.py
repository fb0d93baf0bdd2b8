"""The worker that is this process: what is raised in it means what it means everywhere."""

import errno
import re

import pytest
import torch
from toy_setup import SNIP, WANDA, brief, embedded_setup, jobs_of, outcomes_of, quiet_pool

from prunevolve.search.pool.worker import InProcess, fault_of
from prunevolve.search.pool.workers import MOST
from prunevolve.search.records import Candidate
from prunevolve.search.resident import Resident

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


@pytest.fixture
def pool():
    setup = embedded_setup("ray.workers=0")
    made = quiet_pool(InProcess(setup), setup)
    brief(made, setup)
    return made


@pytest.fixture
def undisturbed(pool):
    return outcomes_of(pool, CANDIDATES)


@pytest.fixture
def injected(monkeypatch):
    """Let a method of `Resident` raise: at the calls that `when` picks, by number and arguments."""

    def inject(method, error, when):
        true, calls = getattr(Resident, method), []

        def raises(self, *arguments):
            calls.append(arguments)
            if when(len(calls), *arguments):
                raise error
            return true(self, *arguments)

        monkeypatch.setattr(Resident, method, raises)

    return inject


@pytest.mark.parametrize(("reason", "error"), LACKING.items())
def test_lack_of_memory_and_errors_of_devices_are_one_kind_of_fault(reason, error):
    fault = fault_of(error)
    assert (fault.kind, fault.reason) == ("out of memory", reason)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(CUDA)])
def test_lack_of_memory_that_passes_changes_no_outcome(pool, undisturbed, injected, error):
    times = MOST["out of memory"] - 1
    injected("prune", error, lambda call, *_: call <= times)
    assert outcomes_of(pool, CANDIDATES) == undisturbed
    assert pool.workers.faults == {"out of memory": times}


def test_error_fails_its_candidate_with_type_and_place(pool, undisturbed, injected):
    error = TypeError(f"got {object()}")
    injected("prune", error, lambda call, metric, _: metric == WANDA.metric)
    failed, other = jobs_of(pool, CANDIDATES)
    assert other.outcome == undisturbed[1]
    assert failed.outcome.kind == "failed"
    # An address would differ between attempts.
    reason = r"TypeError: got <object object at 0x\.\.\.> at search/evaluator\.py:[1-9]\d*"
    assert re.fullmatch(reason, failed.outcome.reason)
    assert failed.trace.startswith("Traceback") and "TypeError" in failed.trace
    assert pool.workers.faults == {"error": 1}
