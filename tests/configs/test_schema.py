"""Configs: shipped ones load, and every mistake is one line with the key, value and rule."""

import json
import re
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from refusals import refusal

from prunevolve.configs import schema
from prunevolve.pruning.masks import GROUPS
from prunevolve.search.breeding.variation import MUTATIONS

SHIPPED = sorted(Path(schema.__file__).parent.glob("*.yaml"))
NAMED = f"config {schema.DEFAULT}: "


def refused(*overrides: str, path: Path | None = None) -> str:
    return refusal(schema.load, path, list(overrides))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_load_reads_a_shipped_config_and_to_yaml_gives_it_back(path, tmp_path):
    config = schema.load(path, [])
    (tmp_path / "config.yaml").write_text(schema.to_yaml(config))
    assert schema.load(tmp_path / "config.yaml", []) == config
    written = yaml.safe_load(schema.to_yaml(config))
    assert "base:" not in schema.to_yaml(config)
    assert list(written) == list(schema.Config.model_fields)
    assert list(written["search"]) == list(schema.Search.model_fields)


def test_load_without_a_path_is_the_embedded_experiment():
    config = schema.load(None, [])
    assert config.model == "embedded"
    assert config.search == schema.Search()
    (task,) = config.all_tasks
    assert {text.corpus for text in task.texts.values()} == {"embedded"}
    assert list(task.texts) == ["calibration", "fitness", "selection", "report"]


def test_load_of_the_paper_is_the_algorithm_that_it_states():
    search = schema.load(schema.DEFAULT.with_name("paper.yaml"), []).search
    assert (search.population, search.lag, search.parents) == (50, 0, 10)
    assert (search.crossover, search.mutation, search.mutations) == (1.0, 0.5, ["node"])
    assert (search.stages, search.crowding, search.brood) == ([], 0, 1)
    assert search.seeds == []


def test_names_in_the_schema_are_those_of_the_code():
    assert get_args(schema.GroupName) == GROUPS
    assert list(get_args(schema.Mutation)) == list(MUTATIONS)


def test_tasks_are_filled_in_from_the_experiment():
    fitness = {"corpus": "ptb", "split": "validation", "windows": 4, "length": 64}
    overrides = [
        "pruning.sparsity=0.7",
        f"tasks=[{{model: models/other, weight: 2}}, {{sparsity: 0.1, dtype: bfloat16}}, "
        f"{{pattern: '4:8', fitness: {fitness}}}]",
    ]
    config = schema.load(None, overrides)
    fields = ("model", "dtype", "sparsity", "pattern", "weight")
    assert [tuple(getattr(task, name) for name in fields) for task in config.all_tasks] == [
        ("models/other", "float32", 0.7, "unstructured", 2),
        ("embedded", "bfloat16", 0.1, "unstructured", 1),
        ("embedded", "float32", 0.5, "4:8", 1),
    ]
    third = config.all_tasks[2]
    others = config.all_tasks[0].texts
    assert third.texts == {**others, "fitness": schema.Text.model_validate(fitness)}
    assert [task.name for task in config.all_tasks] == [
        *("other 70%", "embedded 10%", "embedded 4:8")
    ]
    again = schema.parse(yaml.safe_load(schema.to_yaml(config)), "written")
    assert again.all_tasks == config.all_tasks


@pytest.mark.parametrize(("pattern", "removed"), [("2:4", 0.5), ("1:4", 0.75), ("6:8", 0.25)])
def test_pattern_brings_its_sparsity(pattern, removed, tmp_path):
    path = tmp_path / "c.yaml"
    plain = schema.load(None, []).model_dump() | {"pruning": {"pattern": pattern}}
    path.write_text(json.dumps(plain))
    assert schema.load(path, []).pruning.sparsity == removed
    # By an override too, which takes the place of the file's sparsity.
    assert schema.load(None, [f"pruning.pattern={pattern}"]).pruning.sparsity == removed
    overrides = ["tasks=[{sparsity: 0.7}]", f"tasks.0.pattern={pattern}"]
    assert schema.load(None, overrides).all_tasks[0].sparsity == removed


@pytest.mark.parametrize(
    "overrides",
    [
        ["pruning.pattern=2:4", "pruning.sparsity=0.7"],
        ["pruning={pattern: '2:4', sparsity: 0.7}"],
        ["tasks=[{pattern: '2:4', sparsity: 0.7}]"],
        ["pruning.pattern=2:4", "tasks=[{sparsity: 0.7}]"],
    ],
)
def test_sparsity_that_contradicts_its_pattern_is_refused(overrides):
    assert refused(*overrides).endswith("sparsity must be 0.5 with pattern 2:4, got 0.7")


@pytest.mark.parametrize(
    ("selection", "models"),
    [
        ("selection.model=other", ["other"]),
        ("selection.model=[one, two]", ["one", "two"]),
        ("selection.windows=4", []),
    ],
)
def test_tasks_that_only_choose_come_last_at_each_target_of_the_others(selection, models):
    tasks = "tasks=[{sparsity: 0.5}, {sparsity: 0.7}, {pattern: '2:4'}, {sparsity: 0.5, weight: 2}]"
    config = schema.load(None, [tasks, selection])
    searched, choosing = config.all_tasks[:4], config.all_tasks[4:]
    assert [task.weight for task in searched] == [1, 1, 1, 2]
    assert {task.model for task in searched} == {"embedded"}
    targets = [(0.5, "unstructured"), (0.7, "unstructured"), (0.5, "2:4")]
    assert [(task.model, (task.sparsity, task.pattern), task.weight) for task in choosing] == [
        (model, target, 0) for model in models for target in targets
    ]
    assert all(task.selection == config.selection for task in choosing)
    assert schema.parse(yaml.safe_load(schema.to_yaml(config)), "written") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.candidate=5", "search.candidate is an unknown key; did you mean candidates?"),
        (
            "ray.zzz=1",
            "ray.zzz is an unknown key; known keys are address, workers, cpus_per_worker, "
            "gpus_per_worker",
        ),
        (
            "tasks=[{}, {fitness: {corpus: x, split: y, windows: 1, length: 2, sed: 3}}]",
            "tasks.1.fitness.sed is an unknown key; did you mean seed?",
        ),
    ],
)
def test_load_refuses_an_unknown_key_and_says_which_are_known(override, message):
    assert refused(override).startswith(NAMED + message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning.sparsity=1", "pruning.sparsity = '1': Input should be less than 1"),
        ("pruning.group=free", "pruning.group = 'free': Input should be 'row', 'layer' or 'model'"),
        ("search.population=1", "search.population = '1': Input should be greater than or equal "),
        ("search.mutations=[hop]", "search.mutations.0 = 'hop': Input should be 'node', 'factor'"),
        ("search.mutations=[]", "search.mutations = '[]': List should have at least 1 item after "),
        ("search.initial_depth=[1]", "search.initial_depth.1 is missing: it has no default"),
        ("search.units=on", "search.units = 'True': Input should be 'off' or 'required'"),
        ("search.stages=[0, 2]", "search.stages.0 = '0': Input should be greater than or equal to"),
        ("search.crowding=1", "search.crowding = '1': Input should be less than 1"),
        ("tasks=[{weight: 0}]", "tasks.0.weight = '0': Input should be greater than 0"),
        ("tasks=[{pattern: 2-4}]", "tasks.0.pattern = '2-4': String should match pattern"),
        ("search=5", "search = '5': Input should be a valid dictionary"),
        ("dtype=int8", "dtype = 'int8': Input should be 'float32', 'bfloat16' or 'float16'"),
        ("fitness.length=1", "fitness.length = '1': Input should be greater than or equal to 2"),
        ("ray.cpus_per_worker=0", "ray.cpus_per_worker = '0': Input should be greater than or "),
    ],
)
def test_load_refuses_a_value_and_says_its_rule(override, message):
    assert refused(override).startswith(NAMED + message)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("search.stages=[2, 2]", "stages must be ascending window counts, got [2, 2]"),
        ("search.initial_depth=[3, 2]", "in ascending order, from 0 to 8, got [3, 2]"),
        ("search.initial_depth=[1, 9]", "in ascending order, from 0 to 8, got [1, 9]"),
        (
            "search={primitives: release, mutations: [constant]}",
            "which has no numbers to change, got ['constant']",
        ),
        ("calibration.windows=null", ": seed must be null if windows is null, got 0"),
    ],
)
def test_load_refuses_values_that_contradict_each_other(override, rule):
    message, section = refused(override), re.split("[.=]", override)[0]
    assert message.startswith(f"{NAMED}{section} = ")
    assert message.endswith(rule)


def test_text_of_several_kinds_replaces_one_and_one_replaces_several(tmp_path):
    several = ["fitness.mix=[{corpus: c4, split: train}]"]
    assert schema.load(None, several).fitness.corpus is None
    path = tmp_path / "c.yaml"
    path.write_text("base: smollm2_135m\nfitness: {corpus: ptb, split: test}\n")
    assert schema.load(path, []).fitness.mix == []
    assert schema.load(path, several).fitness.parts[0].corpus == "c4"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["fitness.corpus=null"], "corpus or split is missing: give both, or mix"),
        (
            ["fitness.mix=[{corpus: c4, split: train}]", "fitness.split=train"],
            "mix replaces corpus and split",
        ),
        (["fitness.mix=[{corpus: c4, split: train, share: 0}]"], "greater than 0"),
    ],
)
def test_load_refuses_a_text_of_neither_one_kind_nor_several(overrides, problem):
    assert problem in refused(*overrides)


def test_load_names_a_missing_key(tmp_path):
    raw = yaml.safe_load(schema.DEFAULT.read_text())
    del raw["fitness"]["length"]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    expected = f"config {path}: fitness.length is missing: it has no default"
    assert refused(path=path) == expected


def test_overrides_reach_nested_keys_and_are_read_as_yaml():
    overrides = [
        *("search.seeds=[wanda, 'mul(W, G)']", "fitness.windows=null", "search.crossover=2e-1"),
        *("report.split=report[:50%]", "search.units=off", "model=a=b"),
        *("search.seed=1", "search.seed=2"),
    ]
    config = schema.load(None, overrides)
    assert config.search.seeds == ["wanda", "mul(W, G)"]
    assert config.fitness.windows is None
    assert config.search.crossover == 0.2
    assert config.report.split == "report[:50%]"
    assert config.search.units == "off"  # which YAML reads as false
    assert config.model == "a=b"
    assert config.search.seed == 2  # the last counts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.seed", "--set takes key.path=value, got 'search.seed'"),
        ("=5", "--set takes key.path=value, got '=5'"),
        ("model.name=x", "--set model.name=x: model is a value and has no keys below it"),
        ("model=!!python/name:os.system", "--set model: '!!python/name:os.system' is not a "),
        ("model=" + "[" * 1000, f"--set model: {'[' * 60!r} is not a YAML value"),
    ],
)
def test_overrides_that_cannot_be_put_in_are_refused(override, message):
    assert refused(override).startswith(message)


def test_overrides_make_sections_and_reach_into_a_list_by_the_place():
    assert schema.apply_overrides({"model": "x"}, ["ray.workers=2"]) == {
        "model": "x",
        "ray": {"workers": 2},
    }
    raw = {"a": [{"b": 1}, {"b": 2}]}
    assert schema.apply_overrides(raw, ["a.1.b=3", "a.0=4"]) == {"a": [4, {"b": 3}]}
    for place in ("2", "b"):
        with pytest.raises(ValueError, match=rf"a.{place}=x: a has indices 0 to 1, not {place}"):
            schema.apply_overrides(raw, [f"a.{place}=x"])


@pytest.mark.parametrize("pattern", ["2:4", "1:59", "unstructured"])
def test_pattern_is_read_as_it_is_written_not_as_a_number_to_base_60(pattern, tmp_path):
    config = schema.load(None, [f"pruning.pattern={pattern}"])
    path = tmp_path / "c.yaml"
    path.write_text(schema.to_yaml(config))
    assert config.pruning.pattern == schema.load(path, []).pruning.pattern == pattern
    path.write_text(f"base: embedded\npruning: {{pattern: {pattern}}}\n")
    assert schema.load(path, []) == config


def test_load_refuses_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "missing.yaml"
    assert refused(path=path) == f"config {path} cannot be read: No such file or directory"
    assert refused(path=tmp_path) == f"config {tmp_path} cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", " must be a mapping of keys, got NoneType"),
        ("- a", " must be a mapping of keys, got list"),
        ("1: 2", ": "),
        ("model: {a: 1}", ": model = "),
    ],
)
def test_load_refuses_a_file_that_is_no_mapping_of_keys(content, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert refused(path=path).startswith(f"config {path}{message}")


def test_json_schema_allows_the_shipped_files():
    check = jsonschema.Draft202012Validator(schema.json_schema())
    for path in SHIPPED:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert [error.message for error in check.iter_errors(raw)] == [], path.name
        assert path.read_text(encoding="utf-8").startswith(
            "# yaml-language-server: $schema=schema.json\n"
        )


@pytest.mark.parametrize(
    "raw",
    [
        {"modle": "embedded"},
        {"search": {"population": 1}},
        {"tasks": [{"base": 5}]},
        {"fitness": {"base": "embedded"}},
        {"pruning": {"pattern": "2-4"}},
    ],
)
def test_json_schema_refuses_what_load_refuses(raw):
    assert not jsonschema.Draft202012Validator(schema.json_schema()).is_valid(raw)
