"""A config resolved: models, tasks, texts, seeds; what is refused beforehand; the plan."""

import pickle

import pytest
import torch
from refusals import refusal
from toy_setup import ROLES, small

from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.pruning.masks import Layer, NOfM
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.models import load_config
from prunevolve.search.experiment import Experiment, resolve

OTHER = "{corpus: embedded, split: '%s', windows: 3, length: 32}"
GPUS = torch.cuda.device_count()
LIMIT = load_config("embedded").max_position_embeddings


def config(*overrides: str) -> Config:
    return schema.load(None, list(overrides))


def tiny(*overrides: str) -> Experiment:
    """An experiment on two windows of 16 tokens of each text."""
    plain = ("search.stages=[1]", "search.primitives=release")
    return resolve(config(*small(2, 16), *plain, *overrides))


def refused(*overrides: str) -> str:
    return refusal(lambda: resolve(config(*overrides)))


def test_tasks_of_another_dtype_or_other_texts_hold_a_model_again():
    fitness = OTHER % "fitness[:50%]"
    kinds = ("", "sparsity: 0.3", "dtype: bfloat16", f"fitness: {fitness}", f"fitness: {fitness}")
    experiment = tiny(f"tasks=[{', '.join(f'{{{kind}}}' for kind in kinds)}]").read_texts()
    assert experiment.subject_of == (0, 0, 1, 2, 2)
    assert [subject.dtype for subject in experiment.subjects] == ["float32", "bfloat16", "float32"]
    assert [subject.tokens["fitness"].shape for subject in experiment.subjects] == [
        *[(2, 16), (2, 16), (3, 32)]
    ]


def test_a_target_has_the_tasks_pattern_or_the_candidates_group():
    experiment = tiny("tasks=[{sparsity: 0.3, weight: 3}, {pattern: '2:4'}]")
    targets = [experiment.target(task, "layer") for task in (0, 1)]
    assert [target.group for target in targets] == [Layer(), NOfM(2, 4)]
    assert [target.sparsity for target in targets] == [0.3, 0.5]
    assert experiment.weights == [0.75, 0.25]


@pytest.mark.parametrize(
    ("selection", "models"),
    [
        ("selection.model=[embedded, embedded]", ["embedded", "embedded"]),
        ("selection.windows=2", []),
    ],
)
def test_tasks_that_only_choose_come_last_at_each_target_of_the_others(selection, models):
    tasks = "tasks=[{sparsity: 0.5}, {sparsity: 0.7}, {pattern: '2:4'}, {sparsity: 0.5, weight: 2}]"
    experiment = tiny(tasks, selection)
    searched, choosing = experiment.tasks[:4], experiment.tasks[4:]
    assert [task.weight for task in searched] == [1, 1, 1, 2]
    targets = [(0.5, "unstructured"), (0.7, "unstructured"), (0.5, "2:4")]
    assert [(task.model, (task.sparsity, task.pattern), task.weight) for task in choosing] == [
        (model, target, 0) for model in models for target in targets
    ]
    places = list(range(4, len(experiment.tasks)))
    assert experiment.tasks_of("fitness") == [0, 1, 2, 3]
    assert experiment.tasks_of("selection") == (places or [0, 1, 2, 3])


def test_read_texts_cuts_each_models_windows_with_its_own_tokenizer(tiny_llama_dir):
    experiment = tiny(f"tasks=[{{}}, {{model: {tiny_llama_dir}}}]").read_texts()
    assert [subject.model for subject in experiment.subjects] == ["embedded", str(tiny_llama_dir)]
    of_embedded, of_bytes = (subject.windows["report"] for subject in experiment.subjects)
    assert of_embedded.tokens.tolist() != of_bytes.tokens.tolist()
    assert of_embedded.provenance["text_sha256"] == of_bytes.provenance["text_sha256"]


def test_experiment_builds_a_worker_elsewhere(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    experiment = tiny("ray.gpus_per_worker=0.5").read_texts()
    again = pickle.loads(pickle.dumps(experiment))
    assert (again.config, again.tasks, again.device) == (
        experiment.config,
        experiment.tasks,
        "cuda",
    )
    assert all(again.subjects[0].tokens[role].shape == (2, 16) for role in ROLES)


@pytest.mark.parametrize(
    ("overrides", "terminals"),
    [
        (["search.seeds=['mul(W, add(V, B))']"], "WXGVB"),
        (["search.primitives=extended"], "WXGVHM"),
        (["search.primitives=extended", "search.terminals=[W, D]"], "WXGD"),  # and of baselines
    ],
)
def test_leaves_are_those_of_candidates_and_seeds(overrides, terminals):
    assert tiny(*overrides).terminals == frozenset(terminals)


def test_seeds_have_the_group_that_is_searched_and_are_written_into_the_config():
    experiment = tiny("search.seeds=[snip, W, snip]", "pruning.group=layer")
    seeds = (Criterion.parse("mul(W, G)", "layer"), Criterion.parse("W", "layer"))
    assert experiment.breeder.seeds == seeds
    assert experiment.config.search.seeds == ["mul(W, G)", "W"]
    assert experiment.breeder.search == experiment.config.search
    assert resolve(experiment.config).breeder == experiment.breeder


@pytest.mark.parametrize(
    ("overrides", "group"),
    [
        (["pruning.group=layer"], "layer"),
        (["pruning.group=layer", "pruning.pattern=2:4"], "row"),
        (["tasks=[{pattern: '2:4'}, {sparsity: 0.5}]"], "model"),
    ],
)
def test_group_is_row_where_all_tasks_have_a_pattern(overrides, group):
    assert tiny(*overrides).breeder.group == group


@pytest.mark.parametrize(
    "overrides",
    [
        ["fitness.split=selection[:50%]", "selection.split=selection[50%:]"],
        ["report.split=selection", "allow_test_selection=true"],
    ],
    ids=["slices", "allowed"],
)
def test_texts_beside_each_other_are_taken(overrides):
    resolve(config(*overrides))  # raises no error


@pytest.mark.parametrize("place", [0, 1])
def test_texts_that_overlap_across_tasks_are_refused(place):
    # Each task is disjoint in itself: the one selects on a half of what the other reports.
    halved = f"{{selection: {OTHER % 'report[:50%]'}, report: {OTHER % 'report[50%:]'}}}"
    both = ["{}", "{}"]
    both[place] = halved
    assert refused(f"tasks=[{', '.join(both)}]") == (
        "selection and report overlap: embedded report[:50%] and embedded report: "
        "give disjoint texts, or set allow_test_selection: true"
    )
    resolve(config(f"tasks=[{halved}]"))  # disjoint in itself


TWO = "{corpus: [embedded, embedded], split: [training, '%s'], windows: 8, length: 32}"
LONG = f"{{corpus: embedded, split: report, windows: 2, length: {LIMIT + 1}}}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"calibration={TWO % 'training[50%:]'}", "calibration: part 1 and part 2 overlap: "),
        ("fitness.corpus=missing.txt", "fitness: corpus must be embedded, "),
        (f"tasks=[{{}}, {{report: {OTHER % 'dev'}}}]", "report: split of corpus 'embedded' must "),
        (
            "search.terminals=[W, x, G2]",
            "search.terminals must be of W, G, X, V, B, H, D, I, M, each once and W among "
            "them, got W, x",
        ),
        ("search.stages=[64]", "search.stages must begin with at most the 32 windows of fitness, "),
        ("ray.gpus_per_worker=99", f"ray.gpus_per_worker must be at most the {GPUS} GPUs of this "),
        ("search.seeds=[wandaa]", "metric 'wandaa' is no known name or file: did you mean "),
        (
            "tasks=[{}, {pattern: '4:1025'}]",
            "pattern must be unstructured or n:m with 0 < n < m <= ",
        ),
        ("tasks=[{}, {pattern: '3:7'}]", "pattern must divide the inputs of every layer, "),
        ("tasks=[{}, {model: nowhere}]", "model 'nowhere' is no folder: give embedded, "),
        (f"tasks=[{{}}, {{report: {LONG}}}]", "report.length must be at most the model's "),
        ("ray.cpus_per_worker=1000", "ray.cpus_per_worker must be at most the "),
    ],
)
def test_what_a_run_cannot_use_is_refused(override, message):
    assert refused(override).startswith(message)
