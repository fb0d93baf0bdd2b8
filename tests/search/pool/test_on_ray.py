"""The backend on Ray without a Ray: what its watch tells the guard, and when Ray is lost."""

import os
import select
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from search_process import until
from toy_setup import embedded_setup

from prunevolve.command_line import Resumable
from prunevolve.search.pool import guard

NODE = {"NodeID": "here", "Alive": True, "Resources": {"CPU": 2}}


@pytest.fixture
def guarded(monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr(guard, "_to_guard", write)
    yield read
    os.close(write)
    os.close(read)


@pytest.fixture
def opened(monkeypatch, guarded):
    from prunevolve.search.pool import on_ray  # it imports Ray

    @contextmanager
    def opened(nodes, load=lambda model, dtype: None):
        here = SimpleNamespace(get_node_id=lambda: "here")
        fake = SimpleNamespace(
            nodes=nodes, get_runtime_context=lambda: here, put=lambda value: 0, get=None
        )
        fake.util = SimpleNamespace(register_serializer=lambda kind, **how: None)
        fake.remote = lambda **resources: lambda actor: SimpleNamespace(remote=actor)
        monkeypatch.setattr(on_ray, "ray", fake)
        monkeypatch.setattr(on_ray, "_LOOK_SECONDS", 0.001)
        monkeypatch.setattr(on_ray, "load_model", load)
        before = threading.active_count()
        try:
            with on_ray.RayBackend.opened("local", embedded_setup()) as backend:
                yield backend
        finally:
            until(lambda: threading.active_count() == before, 10)

    return opened


def told(guarded, seconds):
    has_more = select.select([guarded], [], [], seconds)[0]
    return os.read(guarded, 1 << 16).split() if has_more else []


def test_guard_hears_that_ray_answers_while_models_are_loaded(opened, guarded):
    heard = []
    with opened(lambda: [NODE], lambda *_: heard.extend(told(guarded, 10))):
        assert set(heard) == {b"answers"}


def test_error_of_ray_that_passes_ends_nothing_and_one_that_stays_does(opened):
    looks, fails = [], {}

    def nodes():
        looks.append(1)
        if fails["is"]():
            raise ConnectionError("\nthe head is busy\n")
        return [NODE]

    def events():
        seen = len(looks)
        until(lambda: len(looks) > seen + 10, 10)
        return backend.events(0)

    fails["is"] = lambda: False
    with opened(nodes) as backend:
        fails["is"] = lambda: len(looks) % 3
        assert events() == []
        fails["is"] = lambda: True
        with pytest.raises(Resumable, match=r"^Ray \(local\) failed: the head is busy$"):
            events()
        fails["is"] = lambda: False
        assert events() == []
