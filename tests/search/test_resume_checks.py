"""A run that is continued is the same experiment: config, fingerprints, the journal's beginning."""

from dataclasses import replace
from functools import partial

import pytest
from refusals import refusal
from toy_records import record_of

from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.search.experiment import resolve
from prunevolve.search.launch import check_config, check_records
from prunevolve.search.population import Outcome, Record, State
from prunevolve.search.prepare import check_fingerprints
from prunevolve.search.run_folder import FolderError, RunFolder

refused = partial(refusal, error=FolderError)
FINGERPRINTS = {"model": ["ab"], "texts": [{"report": "cd"}]}


def config(*overrides: str) -> Config:
    return schema.load(None, ["search.brood=1", *overrides])


EXPERIMENT = resolve(config("search.seeds=[wanda]"))


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that noted what it was made with."""
    folder = RunFolder.create(tmp_path / "run")
    check_fingerprints(folder, EXPERIMENT, FINGERPRINTS)
    yield folder
    folder.close()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.seed=3", "search.seed is 3 in {path}/config.yaml but was 0 when the run began: "),
        ("dtype=bfloat16", "dtype is 'bfloat16' in {path}/config.yaml but was 'float32' when "),
        ("tasks=[{}, {}]", "tasks is "),
    ],
)
def test_config_that_differs_in_anything_but_what_is_free_is_refused(folder, override, message):
    seeds = "search.seeds=['mul(W, sqrt(X))']"
    expected = message.format(path=folder.path)
    assert refused(check_config, folder, config(seeds, override), 5).startswith(expected)
    more = ("search.candidates=9", "ray.workers=3", "low_memory=true")
    check_config(folder, config(seeds, *more), 5)


def test_journal_without_its_environment_is_refused(folder):
    (folder.path / "environment.json").unlink()
    check_config(folder, config(), 0)
    message = refused(check_config, folder, config(), 1)
    assert message.startswith(f"{folder.path} has a journal and no environment.json: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "") for content in ("", "[]", '{"config": {}}', '{"fingerprints": {}}')),
        ('{"config": [], "fingerprints": {}}', "config in {path} must be an object"),
    ],
)
def test_environment_that_is_damaged_is_refused(folder, content, message):
    path = folder.path / "environment.json"
    path.write_text(content)
    expected = message.format(path=path) or str(path)
    assert refused(check_config, folder, config(), 1).startswith(expected)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"model": ["xy"]}, "the run's model had fingerprint ['ab'] and has ['xy'] here: "),
        ({"texts": [{"report": "xy"}]}, "the run's texts had fingerprint [{'report': 'cd'}] and "),
        ({"probe": ["xy"]}, "the run's probe had fingerprint None and has ['xy'] here: "),
    ],
)
def test_fingerprints_that_differ_are_refused_by_name(folder, now, message):
    before = (folder.path / "environment.json").read_bytes()
    changed = {**FINGERPRINTS, **now}
    assert refused(check_fingerprints, folder, EXPERIMENT, changed).startswith(message)
    check_fingerprints(folder, EXPERIMENT, FINGERPRINTS)
    assert (folder.path / "environment.json").read_bytes() == before


class Marks:
    """Masks by the metric's text; in another probe, others."""

    def __init__(self, probe: str = "a") -> None:
        self.probe = probe

    def fingerprint(self, criterion):
        return f"{self.probe} {criterion.text}"

    def distance(self, one, other):
        return 1.0


def begun() -> list[Record]:
    candidates = [EXPERIMENT.breeder.brood(index, State())[0] for index in range(6)]
    return [
        Record(replace(one, fingerprint=Marks().fingerprint(one.criterion)), Outcome("failed"))
        for one in candidates
    ]


def test_records_that_the_search_would_breed_are_taken_and_with_other_masks_are_not(folder):
    for count in (0, 1, 6):
        check_records(folder, EXPERIMENT, Marks(), begun()[:count])
    message = refused(check_records, folder, EXPERIMENT, Marks("b"), begun())
    assert "line 1 is not what this run's settings breed" in message


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (0, record_of(0, "mul(W, sqr(G))", 2.0)),
        (3, record_of(3, "mul(W, sqr(G))", 2.0)),
        # One with parents where there was no population.
        (2, Record(replace(begun()[2].candidate, parents=(0, 1)), Outcome("failed"))),
    ],
)
def test_records_of_another_search_are_refused(folder, place, other):
    records = begun()
    records[place] = other
    assert refused(check_records, folder, EXPERIMENT, Marks(), records) == (
        f"{folder.path / 'journal.jsonl'} line {place + 1} is not what this run's settings breed: "
        "it is another run's journal"
    )
