"""A run that is continued is the same experiment: config, models, texts and code."""

from functools import partial
from platform import python_version
from shutil import copytree, ignore_patterns

import pytest
from refusals import refusal

from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.search.experiment import resolve
from prunevolve.search.pool import worker
from prunevolve.search.prepare import check_identity, identity
from prunevolve.search.run_folder import FolderError, RunFolder

refused = partial(refusal, error=FolderError)


def config(*overrides: str) -> Config:
    return schema.load(None, [*overrides])


EXPERIMENT = resolve(config("search.seeds=[wanda]")).read_texts()


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_json("environment.json", {"identity": identity(EXPERIMENT)})
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
    other = resolve(config("search.seeds=[wanda]", override)).read_texts()
    assert refused(check_identity, folder, identity(other)).startswith(
        message.format(path=folder.path)
    )


@pytest.mark.parametrize("what", ["files of models.embedded", "tokens of texts", "code"])
def test_models_texts_and_code_that_changed_are_refused_by_name(folder, what):
    known = identity(EXPERIMENT)
    known |= {"files of models": {"embedded": "x"}} if "." in what else {what: "x"}
    folder.write_json("environment.json", {"identity": known})
    message = refused(check_identity, folder, identity(EXPERIMENT))
    assert message.startswith(f"{what} is ")
    assert "but was 'x' when the run in" in message


def test_texts_of_another_python_are_refused_with_both_versions(folder):
    known = {"python": "3.99.1", "identity": identity(EXPERIMENT) | {"tokens of texts": ["x"]}}
    folder.write_json("environment.json", known)
    message = refused(check_identity, folder, identity(EXPERIMENT))
    versions = (
        f" began on Python 3.99.1, this is {python_version()}: restore it, or start a new run"
    )
    assert message.startswith("tokens of texts is ") and message.endswith(versions)
    folder.write_json("environment.json", known | {"python": python_version()})
    assert "Python" not in refused(check_identity, folder, identity(EXPERIMENT))


@pytest.mark.parametrize(
    ("file", "matters"),
    [
        *(("configs/schema.py", True), ("search/evaluator.py", True), ("pruning/masks.py", True)),
        ("search/report.py", False),
    ],
)
def test_code_is_that_of_an_evaluation_with_configs_and_without_the_report(
    tmp_path, monkeypatch, file, matters
):
    for package in worker.PACKAGES:
        copytree(worker.ROOT / package, tmp_path / package, ignore=ignore_patterns("*.safetensors"))
    before = worker.code_digest()
    monkeypatch.setattr(worker, "ROOT", tmp_path)
    assert worker.code_digest() == before
    with (tmp_path / file).open("a") as source:
        source.write("# changed\n")
    assert (worker.code_digest() != before) == matters


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read: "), ("[]", "cannot be read: "), ("{}", "lacks identity: ")],
)
def test_environment_that_is_missing_or_damaged_is_refused(folder, content, problem):
    path = folder.path / "environment.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    message = refused(check_identity, folder, identity(EXPERIMENT))
    assert message.startswith(f"{path} {problem}")
