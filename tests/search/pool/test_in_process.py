"""The worker that is this process: what is raised in it means what it means everywhere."""

import errno
import re

import pytest
import torch
from toy_setup import SNIP, WANDA, brief, embedded_setup, jobs_of, outcomes_of, quiet_pool

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
