"""Configs: shipped ones load, and every mistake is one line with the key, value and rule."""

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from configs import schema
from pruning.masks import GROUPS

SHIPPED = sorted(Path(schema.__file__).parent.glob("*.yaml"))
NAMED = f"config {schema.DEFAULT}: "


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ValueError) as error:
        schema.load(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


# Shipped configs


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_load_reads_a_shipped_config_and_to_yaml_gives_it_back(path, tmp_path):
    config = schema.load(path, [])
    (tmp_path / "config.yaml").write_text(schema.to_yaml(config))
    assert schema.load(tmp_path / "config.yaml", []) == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_to_yaml_writes_every_key_in_the_order_of_the_schema(path):
    written = yaml.safe_load(schema.to_yaml(schema.load(path, [])))
    assert list(written) == list(schema.Config.model_fields)
    assert list(written["search"]) == list(schema.Search.model_fields)


def test_load_without_a_path_is_the_embedded_experiment():
    config = schema.load(None, [])
    assert config == schema.load(schema.DEFAULT, [])
    assert config.model == "embedded"
    (task,) = config.all_tasks
    assert {text.corpus for text in task.texts.values()} == {"embedded"}
    assert list(task.texts) == ["calibration", "fitness", "selection", "report"]


def test_paper_config_is_the_algorithm_that_the_paper_states():
    search = schema.load(schema.DEFAULT.with_name("paper.yaml"), []).search
    assert (search.population, search.lag, search.pool, search.parents) == (50, 0, 0.5, 10)
    assert (search.crossover, search.mutation, search.stages) == (1.0, 0.5, [])
    assert (search.parsimony, search.crowding, search.patience) == (0, 0, None)
    assert (search.objective, search.simplify, search.seeds) == ("nll", True, [])
    others = {"subtree": 0, "hoist": 0, "insert": 0, "factor": 0, "constant": 0}
    assert search.mutations.model_dump() == {"node": 1} | others


def test_the_groups_are_those_that_masks_are_made_of():
    assert get_args(schema.GroupName) == GROUPS


# Tasks


def test_all_tasks_without_any_is_the_experiment_itself():
    config = schema.load(None, ["pruning.sparsity=0.7", "dtype=float16"])
    (task,) = config.all_tasks
    assert (task.model, task.dtype, task.sparsity, task.pattern, task.weight) == (
        *("embedded", "float16", 0.7, "unstructured", 1.0),
    )
    assert task.texts == {role: getattr(config, role) for role in schema.ROLES}


def test_all_tasks_fills_in_what_a_task_leaves_out():
    fitness = {"corpus": "ptb", "split": "validation", "windows": 4, "length": 64}
    overrides = [
        "pruning.sparsity=0.7",
        f"tasks=[{{model: other, weight: 2}}, {{sparsity: 0.1, dtype: bfloat16}}, "
        f"{{pattern: '4:8', fitness: {fitness}}}]",
    ]
    config = schema.load(None, overrides)
    fields = ("model", "dtype", "sparsity", "pattern", "weight")
    assert [tuple(getattr(task, name) for name in fields) for task in config.all_tasks] == [
        ("other", "float32", 0.7, "unstructured", 2),
        ("embedded", "bfloat16", 0.1, "unstructured", 1),
        ("embedded", "float32", 0.5, "4:8", 1),
    ]
    third = config.all_tasks[2]
    assert third.texts == {
        **config.all_tasks[0].texts,
        "fitness": schema.Text.model_validate(fitness),
    }


@pytest.mark.parametrize(("pattern", "removed"), [("2:4", 0.5), ("1:4", 0.75), ("6:8", 0.25)])
def test_a_pattern_brings_its_sparsity(pattern, removed, tmp_path):
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
def test_a_sparsity_that_contradicts_its_pattern_is_refused(overrides):
    message = refusal(*overrides)
    assert message.endswith("sparsity must be 0.5 with pattern 2:4, got 0.7")
    assert "\n" not in message


@pytest.mark.parametrize("key", ["pruning.sparsity=0", "tasks=[{sparsity: 0}]"])
def test_a_sparsity_of_nothing_is_refused(key):
    assert "Input should be greater than 0" in refusal(key)


def test_all_tasks_are_the_same_after_the_config_was_written(tmp_path):
    config = schema.load(None, ["tasks=[{sparsity: 0.4}, {pattern: '2:4', weight: 0.5}]"])
    path = tmp_path / "c.yaml"
    path.write_text(schema.to_yaml(config))
    assert schema.load(path, []).all_tasks == config.all_tasks


@pytest.mark.parametrize(
    ("selection", "models"),
    [
        ("selection.model=other", ["other"]),
        ("selection.model=[one, two]", ["one", "two"]),
        ("selection.windows=4", []),
    ],
)
def test_models_that_only_choose_come_last_at_each_target_of_the_tasks(selection, models):
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


@pytest.mark.parametrize(("text", "units"), [("off", "off"), ("required", "required")])
def test_units_are_off_although_yaml_reads_that_as_false(text, units):
    assert schema.load(None, [f"search.units={text}"]).search.units == units
    with pytest.raises(ValueError, match=r"search\.units = 'True': Input should be 'off' or 'req"):
        schema.load(None, ["search.units=on"])


def test_task_name_is_the_models_folder_and_what_is_removed():
    overrides = ["tasks=[{model: models/smollm2-135m}, {pattern: '2:4'}, {sparsity: 0.25}]"]
    names = [task.name for task in schema.load(None, overrides).all_tasks]
    assert names == ["smollm2-135m 60%", "embedded 2:4", "embedded 25%"]


# Unknown keys


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle=x", "modle is an unknown key; did you mean model?"),
        ("search.candidate=5", "search.candidate is an unknown key; did you mean candidates?"),
        (
            "search.mutations.hoisted=1",
            "search.mutations.hoisted is an unknown key; did you mean hoist?",
        ),
        (
            "ray.zzz=1",
            "ray.zzz is an unknown key; known keys are address, workers, cpus_per_worker, "
            "gpus_per_worker",
        ),
        ("tasks=[{modle: x}]", "tasks.0.modle is an unknown key; did you mean model?"),
        (
            "tasks=[{}, {fitness: {corpus: x, split: y, windows: 1, length: 2, sed: 3}}]",
            "tasks.1.fitness.sed is an unknown key; did you mean seed?",
        ),
        ("ray.=1", "ray. is an unknown key; known keys are address, workers, cpus_per_worker, "),
    ],
)
def test_load_refuses_an_unknown_key_and_says_which_are_known(override, message):
    assert refusal(override).startswith(NAMED + message)


# Values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning.sparsity=1", "pruning.sparsity = '1': Input should be less than 1"),
        ("pruning.sparsity=-0.1", "pruning.sparsity = '-0.1': Input should be greater than 0"),
        ("pruning.sparsity=half", "pruning.sparsity = 'half': Input should be a valid number, "),
        (
            "pruning.group=column",
            "pruning.group = 'column': Input should be 'row', 'layer', 'model' or ",
        ),
        ("pruning.pattern=2-4", "pruning.pattern = '2-4': String should match pattern"),
        ("pruning.propagation=sequential", "pruning.propagation = 'sequential': Input should be "),
        ("search.population=1", "search.population = '1': Input should be greater than or equal "),
        ("search.lag=-1", "search.lag = '-1': Input should be greater than or equal to 0"),
        ("search.candidates=many", "search.candidates = 'many': Input should be a valid integer"),
        ("search.candidates=1.5", "search.candidates = '1.5': Input should be a valid integer"),
        ("search.max_depth=17", "search.max_depth = '17': Input should be less than or equal to "),
        ("search.pool=0", "search.pool = '0': Input should be greater than 0"),
        ("search.mutations.node=-1", "search.mutations.node = '-1': Input should be greater than"),
        ("search.regroup=1.1", "search.regroup = '1.1': Input should be less than or equal to 1"),
        ("search.speciation=-1", "search.speciation = '-1': Input should be greater than or equal"),
        ("search.parsimony=-1", "search.parsimony = '-1': Input should be greater than or equal "),
        ("search.crowding=1", "search.crowding = '1': Input should be less than 1"),
        ("search.patience=0", "search.patience = '0': Input should be greater than or equal to 1"),
        ("search.objective=ppl", "search.objective = 'ppl': Input should be 'nll' or 'kl'"),
        ("tasks=[{weight: 0}]", "tasks.0.weight = '0': Input should be greater than 0"),
        ("tasks=[{sparsity: 1}]", "tasks.0.sparsity = '1': Input should be less than 1"),
        ("tasks=[{pattern: 2-4}]", "tasks.0.pattern = '2-4': String should match pattern"),
        ("search.seeds=wanda", "search.seeds = 'wanda': Input should be a valid list"),
        ("search=5", "search = '5': Input should be a valid dictionary"),
        ("dtype=int8", "dtype = 'int8': Input should be 'float32', 'bfloat16' or 'float16'"),
        ("fitness.length=1", "fitness.length = '1': Input should be greater than or equal to 2"),
        ("fitness.windows=0", "fitness.windows = '0': Input should be greater than or equal to 1"),
        ("ray.cpus_per_worker=0", "ray.cpus_per_worker = '0': Input should be greater than or "),
    ],
)
def test_load_refuses_a_value_and_says_its_rule(override, message):
    assert refusal(override).startswith(NAMED + message)


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["search.stages=[8, 2]"], "stages must be ascending window counts, got [8, 2]"),
        (["search.stages=[2, 2]"], "stages must be ascending window counts, got [2, 2]"),
        (["search.stages=[0, 2]"], "stages must be ascending window counts, got [0, 2]"),
        (
            ["search.min_initial_depth=5"],
            "min_initial_depth must not exceed max_initial_depth, got 5",
        ),
        (["search.max_initial_depth=9"], "max_initial_depth must not exceed max_depth, got 9"),
        (
            ["search.max_depth=3", "search.max_initial_depth=4"],
            "max_initial_depth must not exceed max_depth, got 4",
        ),
    ],
)
def test_load_refuses_values_that_contradict_each_other(overrides, rule):
    message = refusal(*overrides)
    assert message.startswith(f"{NAMED}search = ")
    assert message.endswith(f": {rule}")


def test_load_refuses_a_seed_of_windows_that_are_not_drawn():
    message = refusal("calibration.windows=null")
    assert message.startswith(f"{NAMED}calibration = ")
    assert message.endswith(": seed must be null if windows is null, got 0")
    assert schema.load(None, ["fitness.windows=null"]).fitness.windows is None


@pytest.mark.parametrize("stages", [[], [1], [1, 4, 9]])
def test_load_takes_ascending_stages(stages):
    assert schema.load(None, [f"search.stages={stages}"]).search.stages == stages


def test_several_kinds_of_text_replace_one_and_one_replaces_several(tmp_path):
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
        (["fitness.split=null"], "corpus or split is missing: give both, or mix"),
        (
            ["fitness.mix=[{corpus: c4, split: train}]", "fitness.split=train"],
            "mix replaces corpus and split",
        ),
        (["fitness.mix=[{corpus: c4, split: train, share: 0}]"], "greater than 0"),
    ],
)
def test_load_refuses_a_text_of_neither_one_kind_nor_several(overrides, problem):
    with pytest.raises(ValueError, match=problem):
        schema.load(None, overrides)


def test_load_names_a_missing_key(tmp_path):
    raw = yaml.safe_load(schema.DEFAULT.read_text())
    del raw["fitness"]["length"]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    expected = f"config {path}: fitness.length is missing: it has no default"
    assert refusal(path=path) == expected


def test_memory_is_by_default_what_is_fastest():
    assert schema.load(None, []).memory.model_dump() == {
        "statistics": "float32",
        "master": "device",
        "scores": "keep",
    }
    assert schema.load(None, []).ray.gpu_memory is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("memory.statistics=float16", "memory.statistics = 'float16': Input should be 'float32' "),
        ("memory.master=cpu", "memory.master = 'cpu': Input should be 'device' or 'host'"),
        ("memory.scores=true", "memory.scores = 'True': Input should be 'keep' or 'recompute'"),
        ("memory.score=keep", "memory.score is an unknown key; did you mean scores?"),
        ("ray.gpu_memory=0", "ray.gpu_memory = '0': Input should be greater than 0"),
    ],
)
def test_memory_that_is_not_one_of_the_choices_is_refused(override, problem):
    assert refusal(override).startswith(NAMED + problem)


# Overrides


def test_overrides_reach_nested_keys_and_are_read_as_yaml():
    config = schema.load(
        None,
        [
            "search.mutations.hoist=0.5",
            "search.seeds=[wanda, 'mul(W, G)']",
            "fitness.windows=null",
            "allow_test_selection=true",
            "report.split=report[:50%]",
            "search.slack=2e-1",
            "ray.workers=0",
        ],
    )
    assert config.search.mutations.hoist == 0.5
    assert config.search.seeds == ["wanda", "mul(W, G)"]
    assert config.fitness.windows is None
    assert config.allow_test_selection is True
    assert config.report.split == "report[:50%]"
    assert config.search.slack == 0.2
    assert config.ray.workers == 0


def test_the_last_of_two_overrides_counts():
    assert schema.load(None, ["search.seed=1", "search.seed=2"]).search.seed == 2


def test_overrides_may_hold_an_equals_sign():
    assert schema.load(None, ["model=a=b"]).model == "a=b"


def test_overrides_make_a_section_that_the_file_leaves_out():
    raw = {"model": "embedded"}
    assert schema.apply_overrides(raw, ["search.mutations.node=2"]) == {
        "model": "embedded",
        "search": {"mutations": {"node": 2}},
    }
    assert raw == {"model": "embedded"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.seed", "--set takes key.path=value, got 'search.seed'"),
        ("=5", "--set takes key.path=value, got '=5'"),
        ("", "--set takes key.path=value, got ''"),
        ("model.name=x", "--set model.name=x: model is a value and has no keys below it"),
        (
            "search.seed.low=1",
            "--set search.seed.low=1: seed is a value and has no keys below it",
        ),
        ("search.seeds=[wanda", "--set search.seeds: '[wanda' is not a YAML value"),
        ("model=!!python/name:os.system", "--set model: '!!python/name:os.system' is not a "),
    ],
)
def test_overrides_that_cannot_be_put_in_are_refused(override, message):
    assert refusal(override).startswith(message)


def test_overrides_reach_into_a_list_by_the_place():
    raw = {"a": [{"b": 1}, {"b": 2}]}
    assert schema.apply_overrides(raw, ["a.1.b=3", "a.0=4"]) == {"a": [4, {"b": 3}]}
    for place in ("2", "b"):
        with pytest.raises(ValueError, match=rf"a.{place}=x: a has indices 0 to 1, not {place}"):
            schema.apply_overrides(raw, [f"a.{place}=x"])


def test_an_override_nested_too_deeply_is_refused():
    message = refusal("model=" + "[" * 1000)
    assert message == f"--set model: {'[' * 60!r} is not a YAML value"


# Files


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:59", "16:32", "unstructured"])
def test_a_pattern_is_read_as_it_is_written_not_as_a_number_to_base_60(pattern, tmp_path):
    config = schema.load(None, [f"pruning.pattern={pattern}"])
    path = tmp_path / "c.yaml"
    path.write_text(schema.to_yaml(config))
    assert config.pruning.pattern == schema.load(path, []).pruning.pattern == pattern
    shipped = "sparsity: 0.6, pattern: unstructured"
    sparsity = config.pruning.sparsity
    text = schema.DEFAULT.read_text()
    assert shipped in text
    path.write_text(text.replace(shipped, f"sparsity: {sparsity}, pattern: {pattern}"))
    assert schema.load(path, []) == config


def test_load_refuses_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "missing.yaml"
    assert refusal(path=path) == f"config {path} cannot be read: No such file or directory"
    assert refusal(path=tmp_path) == f"config {tmp_path} cannot be read: Is a directory"


@pytest.mark.parametrize(
    "content", [b"model: [", b"a: b: c", b"\xff\xfe\xff", b"[" * 1000, b"model: !!python/name:os"]
)
def test_load_refuses_a_file_that_is_no_yaml(content, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert refusal(path=path).startswith(f"config {path} is not YAML: ")


@pytest.mark.parametrize(("content", "kind"), [("", "NoneType"), ("- a", "list"), ("a", "str")])
def test_load_refuses_yaml_that_is_no_mapping(content, kind, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert refusal(path=path) == f"config {path} must be a mapping of keys, got {kind}"


@pytest.mark.parametrize("content", ["1: 2", "model: {a: 1}", "model: null"])
def test_load_refuses_keys_and_values_of_another_kind(content, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert refusal(path=path).startswith(f"config {path}: ")


# The schema for editors


def test_shipped_files_are_what_the_schema_for_editors_allows():
    import jsonschema

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
def test_the_schema_for_editors_refuses_what_load_refuses(raw):
    import jsonschema

    assert not jsonschema.Draft202012Validator(schema.json_schema()).is_valid(raw)
