"""Telling the C library to keep freed memory: where it can be told, and where it cannot."""

import ctypes
from types import SimpleNamespace

import pytest

from pruning.memory import keep_freed_memory


def test_keep_freed_memory_says_whether_the_library_could_be_told():
    has_mallopt = hasattr(ctypes.CDLL(None), "mallopt")
    assert keep_freed_memory() is has_mallopt


def test_keep_freed_memory_leaves_a_library_without_mallopt_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_keep_freed_memory_does_without_a_library_that_cannot_be_opened(monkeypatch, error):
    def refuse(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert keep_freed_memory() is False


@pytest.mark.parametrize(("answers", "told"), [([1, 1], True), ([0, 1], False), ([1, 0], False)])
def test_keep_freed_memory_needs_both_settings_to_be_taken(monkeypatch, answers, told):
    left = iter(answers)
    library = SimpleNamespace(mallopt=lambda parameter, value: next(left))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory() is told
