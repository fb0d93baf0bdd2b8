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


@pytest.mark.parametrize("name", files.shipped())
def test_load_finds_a_shipped_experiment_by_name_from_anywhere(name, tmp_path, monkeypatch):
    expected = schema.load(files.FOLDER / f"{name}.yaml", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a folder is no config
    assert schema.load(name, []) == expected


def test_load_prefers_a_file_to_a_shipped_experiment_of_its_name(write, tmp_path, monkeypatch):
    write("paper", {"base": "embedded", "search": {"seed": 5}})
    monkeypatch.chdir(tmp_path)
    assert schema.load("paper", []).search.seed == 5


def test_load_of_an_unknown_name_gives_a_near_match_and_the_list():
    assert refusal(schema.load, "smollm2_135", []) == (
        "config 'smollm2_135' is neither a file nor a shipped experiment: did you mean "
        f"smollm2_135m? give a file or one of {', '.join(files.shipped())}"
    )
    too_long = refusal(schema.load, "x" * 300, [])
    assert "is neither a file nor a shipped experiment: give a file or one of" in too_long


def test_mappings_of_a_base_are_merged_key_by_key_and_lists_are_replaced(write):
    write("below.yaml", {"base": "smollm2_135m", "search": {"seed": 3, "stages": [1]}})
    above = {"search": {"stages": [2, 3]}, "fitness": {"windows": 7}}
    path = write("above.yaml", {"base": "below.yaml", **above})
    config, shipped = schema.load(path, []), schema.load("smollm2_135m", [])
    assert config.search == shipped.search.model_copy(update={"seed": 3, "stages": [2, 3]})
    assert config.fitness == shipped.fitness.model_copy(update={"windows": 7})
    assert config.report == shipped.report


def test_overrides_go_over_the_base_also_into_its_lists(write):
    path = write("c.yaml", {"base": "smollm2_135m"})
    text = schema.load(path, ["fitness.mix.0.corpus=valid.txt"]).fitness
    assert [part.corpus for part in text.mix] == ["valid.txt", "embedded"]


def test_null_takes_a_value_of_the_base_away(write):
    mix = [{"corpus": "embedded", "split": "fitness"}]
    path = write(
        "c.yaml", {"base": "embedded", "fitness": {"corpus": None, "split": None, "mix": mix}}
    )
    assert [part.split for part in schema.load(path, []).fitness.parts] == ["fitness"]


def test_base_is_looked_for_beside_the_file_that_names_it(write, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    write("deep/below.yaml", {"base": "embedded", "search": {"seed": 9}})
    write("deep/above.yaml", {"base": "below.yaml"})
    write("below.yaml", {"base": "embedded", "search": {"seed": 1}})
    monkeypatch.chdir(tmp_path)
    assert schema.load("deep/above.yaml", []).search.seed == 9


def test_task_takes_model_and_texts_of_its_base_and_keeps_its_own_keys(write):
    task = {"base": "embedded", "sparsity": 0.3, "fitness": {"windows": 16}}
    path = write("c.yaml", {"base": "smollm2_135m", "tasks": [{}, task]})
    first, second = schema.load(path, []).all_tasks
    embedded = schema.load("embedded", [])
    assert first.model == "models/smollm2-135m"
    assert (second.model, second.dtype, second.sparsity) == ("embedded", "float32", 0.3)
    assert second.fitness == embedded.fitness.model_copy(update={"windows": 16})
    assert second.report == embedded.report


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"base": 5}, "{path}: base must name a config, got '5'"),
        (
            {"base": "embedded", "tasks": [{"base": {}}]},
            "{path}: tasks.0.base must name a config, got '{{}}'",
        ),
        ({"base": "embeded"}, "'embeded' is neither a file nor a shipped experiment: did you mean"),
        ({"base": "gone.yaml"}, "{path.parent}/gone.yaml cannot be read: No such file or directo"),
        (
            {"base": "embedded", "fitness": {"base": "paper"}},
            "{path}: fitness.base is an unknown key; ",
        ),
    ],
)
def test_base_that_names_no_config_is_refused(content, problem, write):
    path = write("c.yaml", content)
    assert refusal(schema.load, path, []).startswith(f"config {problem.format(path=path)}")


def test_chain_of_bases_has_an_end(write, tmp_path):
    write("a.yaml", {"base": "b.yaml"})
    write("b.yaml", {"base": "a.yaml"})
    assert refusal(schema.load, tmp_path / "a.yaml", []) == (
        f"config {tmp_path / 'a.yaml'} has a chain of over {files.MOST_BASES} bases: "
        "a.yaml > b.yaml > a.yaml > b.yaml > a.yaml > b.yaml > a.yaml"
    )
    write("0.yaml", {"base": "embedded"})
    for number in range(1, files.MOST_BASES + 1):
        write(f"{number}.yaml", {"base": f"{number - 1}.yaml"})
    assert schema.load(tmp_path / f"{files.MOST_BASES - 1}.yaml", []).model == "embedded"
    assert "has a chain of over" in refusal(schema.load, tmp_path / f"{files.MOST_BASES}.yaml", [])


def test_base_is_no_override():
    assert refusal(schema.load, None, ["base=paper"]) == (
        f"config {schema.DEFAULT}: base cannot be given with --set: name the config itself"
    )
