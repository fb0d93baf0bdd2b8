"""Config files: found by name or path, and laid over their bases."""

import pytest
import yaml
from refusals import refusal

from prunevolve.configs import files, schema


@pytest.fixture
def write(tmp_path):
    def written(name, content):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content))
        return path

    return written


def test_load_finds_a_shipped_experiment_from_anywhere_but_prefers_a_file(
    write, tmp_path, monkeypatch
):
    expected = schema.load(files.FOLDER / "paper.yaml", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").mkdir()  # a folder is no config
    assert schema.load("paper", []) == expected
    (tmp_path / "paper").rmdir()
    write("paper", {"base": "embedded", "search": {"seed": 5}})
    assert schema.load("paper", []).search.seed == 5


def test_mappings_of_a_base_are_merged_key_by_key_and_lists_are_replaced(write):
    above = {"search": {"seed": 3, "stages": [2, 3]}, "fitness": {"windows": 7}}
    path = write("above.yaml", {"base": "smollm2_135m", **above})
    config, shipped = schema.load(path, []), schema.load("smollm2_135m", [])
    assert config.search == shipped.search.model_copy(update={"seed": 3, "stages": [2, 3]})
    assert config.fitness == shipped.fitness.model_copy(update={"windows": 7})
    over = schema.load(path, ["fitness.corpus.0=valid.txt"])
    assert over.fitness.corpus == ["valid.txt", "embedded"]


def test_base_is_looked_for_beside_the_file_that_names_it(write, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    plain = schema.load(None, []).model_dump(mode="json")
    write("deep/below.yaml", plain | {"search": {"seed": 9}})
    write("deep/above.yaml", {"base": "below.yaml"})
    monkeypatch.chdir(tmp_path)
    assert schema.load("deep/above.yaml", []).search.seed == 9


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("base: embeded", "{path.parent}/embeded cannot be read: No such file or directory; "),
        ("base: paper", "{path}: its base must have no base itself, got 'embedded': "),
        ("- a", "{path} must be a mapping of keys, got list"),
    ],
)
def test_load_refuses_a_base_or_a_file_that_is_none(content, problem, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert refusal(schema.load, path, []).startswith(f"config {problem.format(path=path)}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.seed", "--set takes key.path=value, got 'search.seed'"),
        ("model.name=x", "--set: name must be below a mapping or a list, got 'embedded'"),
        ("search.stages.9=1", "--set: 9 must be an index from 0 to 1"),
        ("model=!!python/name:os.system", "--set model: '!!python/name:os.system' is not YAML: "),
    ],
)
def test_overrides_that_cannot_be_put_in_are_refused(override, message):
    assert refusal(schema.load, None, ["search.stages=[1, 2]", override]).startswith(message)


def test_overrides_make_sections_and_change_one_entry_of_a_shared_list():
    assert files.apply_overrides({"a": 1}, ["b.c=2", "b.d=x"]) == {"a": 1, "b": {"c": 2, "d": "x"}}
    raw = yaml.safe_load("a: [&one {b: {c: 1}}, *one]")
    assert files.apply_overrides(raw, ["a.1.b.c=3"]) == {"a": [{"b": {"c": 1}}, {"b": {"c": 3}}]}
