"""Configs: shipped ones load, and every mistake is one line with the key, value and rule."""

import json
from typing import get_args

import jsonschema
import pytest
import yaml
from refusals import refusal

from prunevolve.configs import schema
from prunevolve.configs.files import FOLDER
from prunevolve.pruning.masks import WEIGHTS

SHIPPED = sorted(FOLDER.glob("*.yaml"))
PATTERN = "pattern must be unstructured, neurons or n:m with 0 < n < m"
LENGTHS = "corpus, split and share must have equal lengths"
UNKNOWN = "is an unknown key; configs/schema.json lists the known ones"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_load_reads_a_shipped_config_and_to_yaml_gives_it_back(path, tmp_path):
    config = schema.load(path, [])
    (tmp_path / "config.yaml").write_text(schema.to_yaml(config))
    assert schema.load(tmp_path / "config.yaml", []) == config
    written = yaml.safe_load(schema.to_yaml(config))
    assert list(written) == list(schema.Config.model_fields)
    assert list(written["search"]) == list(schema.Search.model_fields)


def test_load_of_the_paper_is_the_algorithm_that_it_states():
    search = schema.load("paper", []).search
    assert (search.population, search.lag, search.parents) == (50, 0, 10)
    assert (search.primitives, search.crossover, search.mutation) == ("release", 1.0, 0.5)
    assert (search.stages, search.seeds) == ([], [])


def test_names_in_the_schema_are_those_of_the_code():
    assert get_args(schema.GroupName) == tuple(WEIGHTS)


FITNESS = {"corpus": "ptb", "split": "validation", "windows": 4, "length": 64}


def test_tasks_are_filled_in_from_the_experiment():
    config = schema.load(
        None,
        [
            f"tasks=[{{model: models/other, weight: 2}}, {{sparsity: 0.1, dtype: bfloat16}}, "
            f"{{pattern: '4:8', fitness: {FITNESS}}}]",
            "pruning.sparsity=0.7",
        ],
    )
    fields = ("model", "dtype", "sparsity", "pattern", "weight", "name")
    assert [tuple(getattr(task, name) for name in fields) for task in config.tasks] == [
        ("models/other", "float32", 0.7, "unstructured", 2, "other 70%"),
        ("embedded", "bfloat16", 0.1, "unstructured", 1, "embedded 10%"),
        ("embedded", "float32", 0.5, "4:8", 1, "embedded 4:8"),
    ]
    selection = schema.Texts(**config.selection.model_dump(exclude={"model"}))
    assert config.tasks[2].texts == {
        **{"calibration": config.calibration, "fitness": schema.Texts.model_validate(FITNESS)},
        **{"selection": selection, "report": config.report},
    }


def test_an_override_reaches_the_tasks_of_a_written_config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(schema.to_yaml(schema.load(None, ["tasks=[{}, {sparsity: 0.1}]"])))
    again = schema.load(path, ["pruning.sparsity=0.7", "fitness.windows=4"])
    assert [task.sparsity for task in again.tasks] == [0.7, 0.1]
    assert [task.fitness.windows for task in again.tasks] == [4, 4]


@pytest.mark.parametrize(("pattern", "removed"), [("2:4", 0.5), ("1:4", 0.75), ("6:8", 0.25)])
def test_pattern_owns_its_sparsity(pattern, removed):
    assert schema.load(None, [f"pruning.pattern={pattern}"]).pruning.sparsity == removed
    both = f"tasks=[{{pattern: '{pattern}', sparsity: 0.7}}, {{sparsity: 0.7}}]"
    patterned, plain = schema.load(None, [both]).tasks
    assert (patterned.sparsity, plain.sparsity) == (removed, 0.7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.candidate=5", "search.candidate is an unknown key; did you mean candidates?"),
        ("tasks=[{}, {zzz: 3}]", f"tasks.1.zzz {UNKNOWN}"),
        ("base=paper", f"base {UNKNOWN}"),
        (
            "tasks=[{pruning: {sparsity: 0.5}}]",
            "tasks.0.pruning is an unknown key: a task takes model, dtype, sparsity, pattern, "
            "weight, calibration, fitness, selection, report directly",
        ),
        ("pruning.sparsity=1", "pruning.sparsity = '1': Input should be less than 1"),
        (
            "fitness.windows=1000000001",
            "fitness.windows = '1000000001': Input should be less than or equal to 1000000000",
        ),
        ("report.windows=65537", "report: windows must be at most 65536 of 256 tokens, got 65537"),
        (
            "ray.address=x",
            r"ray.address = 'x': String should match pattern '^(local|auto|.+:\d+)$'",
        ),
        ("search.initial_depth=[1]", "search.initial_depth.1 is missing: it has no default"),
        ("tasks=[5]", "tasks.0 = '5': Input should be a valid dictionary or instance of Task"),
        ("search.stages=[2, 2]", "search: stages must be ascending window counts, got [2, 2]"),
        ("search.initial_depth=[2, 1]", "search: initial_depth must ascend, got [2, 1]"),
        ("report.split=[a, b]", f"report: {LENGTHS}, got [1, 2, 1]"),
        ("pruning.pattern=3:2", f"pruning: {PATTERN}, got '3:2'"),
        ("tasks=[{pattern: 4:4}]", f"tasks.0: {PATTERN}, got '4:4'"),
    ],
)
def test_load_refuses_a_key_a_value_or_a_contradiction_and_says_the_rule(override, message):
    refused = refusal(schema.load, None, [override])
    assert refused == f"config {schema.DEFAULT} with --set: {message}"


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
    assert config.report.split == ["report[:50%]"]
    assert config.search.units == "off"  # which YAML reads as false
    assert config.model == "a=b"
    assert config.search.seed == 2  # the last counts


@pytest.mark.parametrize("pattern", ["2:4", "1:59", "16:32", "unstructured"])
def test_pattern_is_read_as_it_is_written_not_as_a_number_to_base_60(pattern, tmp_path):
    config = schema.load(None, [f"pruning.pattern={pattern}"])
    path = tmp_path / "c.yaml"
    path.write_text(f"base: embedded\npruning: {{pattern: {pattern}}}\n")
    assert config.pruning.pattern == pattern
    assert schema.load(path, []) == config


def test_json_schema_allows_the_shipped_files_and_refuses_what_load_refuses():
    check = jsonschema.Draft202012Validator(json.loads((FOLDER / "schema.json").read_text()))
    for path in SHIPPED:
        text = path.read_text(encoding="utf-8")
        assert [error.message for error in check.iter_errors(yaml.safe_load(text))] == [], path.name
        assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert not check.is_valid({"modle": "embedded"})
    assert not check.is_valid({"search": {"population": 1}})
    assert not check.is_valid({"tasks": [{"base": "embedded"}]})
    assert not check.is_valid({"fitness": {"corpus": [5]}})


def test_load_finds_a_shipped_experiment_from_anywhere_but_prefers_a_file(tmp_path, monkeypatch):
    expected = schema.load(FOLDER / "paper.yaml", [])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "paper"
    path.mkdir()  # a folder is no config
    assert schema.load("paper", []) == expected
    path.rmdir()
    path.write_text("{base: embedded, search: {seed: 5}}")
    assert schema.load("paper", []).search.seed == 5


def test_mappings_of_a_base_are_merged_key_by_key_and_lists_are_replaced(tmp_path):
    path = tmp_path / "above.yaml"
    own = "search: {seed: 3, stages: [2, 3]}, fitness: {windows: 7}"
    path.write_text(f"{{base: smollm2_135m, {own}}}")
    config, shipped = schema.load(path, []), schema.load("smollm2_135m", [])
    assert config.search == shipped.search.model_copy(update={"seed": 3, "stages": [2, 3]})
    assert config.fitness == shipped.fitness.model_copy(update={"windows": 7})
    over = schema.load(path, ["fitness.corpus.0=valid.txt"])
    assert over.fitness.corpus == ["valid.txt", "embedded"]


def test_base_is_looked_for_beside_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    below = schema.to_yaml(schema.load(None, ["search.seed=9"]))
    (tmp_path / "deep/below.yaml").write_text(below)
    (tmp_path / "deep/above.yaml").write_text("base: below.yaml")
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
