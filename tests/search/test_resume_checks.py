"""A run that is continued is the same experiment: config, models, texts and code."""

from functools import partial
from platform import python_version
from shutil import copytree, ignore_patterns

import pytest
from refusals import refusal

from prunevolve.configs import schema
from prunevolve.search.experiment import resolve
from prunevolve.search.pool import worker
from prunevolve.search.prepare import check_identity, identity
from prunevolve.search.run_folder import FolderError, RunFolder

refused = partial(refusal, error=FolderError)


def identity_with(*overrides):
    config = schema.load(None, ["search.seeds=[wanda]", *overrides])
    return identity(resolve(config).read_texts())


@pytest.fixture(scope="module")
def known():
    return identity_with()


@pytest.fixture
def folder(tmp_path, known):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_json("environment.json", {"identity": known})
    yield folder
    folder.close()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.seed=3", "search.seed is 3 but was 0 when the run in {path} began: restore it, "),
        ("tasks=[{}, {}]", "tasks is "),
        ("fitness.split=training", "fitness.split is ['training'] but was ['fitness'] when the "),
    ],
)
def test_run_that_differs_in_anything_but_what_is_mutable_is_refused(folder, override, message):
    other = identity_with(override)
    found = refused(check_identity, folder, other)
    assert found.startswith(message.format(path=folder.path))


@pytest.mark.parametrize("what", ["files of models.embedded", "tokens of texts", "code"])
def test_models_texts_and_code_that_changed_are_refused_by_name(folder, known, what):
    other = {"files of models": {"embedded": "x"}} if "." in what else {what: "x"}
    folder.write_json("environment.json", {"identity": known | other})
    message = refused(check_identity, folder, known)
    assert message.startswith(f"{what} is ")
    assert "but was 'x' when the run in" in message


def test_texts_of_another_python_are_refused_with_both_versions(folder, known):
    before = {"python": "3.99.1", "identity": known | {"tokens of texts": ["x"]}}
    folder.write_json("environment.json", before)
    message = refused(check_identity, folder, known)
    versions = (
        f" began on Python 3.99.1, this is {python_version()}: restore it, or start a new run"
    )
    assert message.startswith("tokens of texts is ") and message.endswith(versions)
    folder.write_json("environment.json", before | {"python": python_version()})
    assert "Python" not in refused(check_identity, folder, known)


def test_code_is_that_of_an_evaluation_with_configs_and_without_the_report(tmp_path, monkeypatch):
    for package in worker.PACKAGES:
        copytree(worker.ROOT / package, tmp_path / package, ignore=ignore_patterns("*.safetensors"))
    digests = [worker.code_digest()]
    monkeypatch.setattr(worker, "ROOT", tmp_path)
    assert worker.code_digest() == digests[0]
    for file in ("configs/schema.py", "search/evaluator.py", "pruning/masks.py"):
        with (tmp_path / file).open("a") as source:
            source.write("# changed\n")
        digests.append(worker.code_digest())
    assert len({*digests}) == len(digests)
    (tmp_path / "search/report.py").write_text("# changed\n")
    assert worker.code_digest() == digests[-1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read: "), ("[]", "cannot be read: "), ("{}", "lacks identity: ")],
)
def test_environment_that_is_missing_or_damaged_is_refused(folder, known, content, problem):
    path = folder.path / "environment.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    message = refused(check_identity, folder, known)
    assert message.startswith(f"{path} {problem}")
