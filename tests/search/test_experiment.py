"""A config resolved: models, tasks, texts, seeds; what is refused beforehand; the plan."""

import pytest
import torch
from refusals import refusal
from toy_setup import small

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


def test_tasks_that_only_choose_come_last_at_each_target_of_the_others():
    tasks = "tasks=[{sparsity: 0.5}, {sparsity: 0.7}, {pattern: '2:4'}, {sparsity: 0.5, weight: 2}]"
    experiment = tiny(tasks, "selection.model=[embedded, embedded]")
    searched, choosing = experiment.tasks[:4], experiment.tasks[4:]
    assert [task.weight for task in searched] == [1, 1, 1, 2]
    targets = [(0.5, "unstructured", 0), (0.7, "unstructured", 0), (0.5, "2:4", 0)]
    assert [(task.sparsity, task.pattern, task.weight) for task in choosing] == 2 * targets
    assert experiment.tasks_of("fitness") == [0, 1, 2, 3]
    assert experiment.tasks_of("selection") == list(range(4, 10))
    assert tiny(tasks).tasks_of("selection") == [0, 1, 2, 3]


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
    resolve(config("report.split=selection", "allow_test_selection=true"))


TWO = "{corpus: [embedded, embedded], split: [training, '%s'], windows: 8, length: 32}"
LONG = f"{{corpus: embedded, split: report, windows: 2, length: {LIMIT + 1}}}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"calibration={TWO % 'training[50%:]'}", "calibration: part 1 and part 2 overlap: "),
        ("fitness.corpus=missing.txt", "fitness: corpus must be embedded, "),
        (f"tasks=[{{}}, {{report: {OTHER % 'dev'}}}]", "report: split of corpus 'embedded' must "),
        ("search.terminals=[W, x]", "search.terminals must be of W, G, X, V, B, H, M, each "),
        ("search.stages=[64]", "search.stages must begin with at most the 32 windows of fitness, "),
        ("ray.gpus_per_worker=99", f"ray.gpus_per_worker must be at most the {GPUS} GPUs of this "),
        ("search.seeds=[wandaa]", "metric 'wandaa' is no known name or file: did you mean "),
        ("tasks=[{}, {pattern: '4:1025'}]", "pattern must be unstructured, neurons, or n:m with "),
        ("tasks=[{}, {pattern: '3:7'}]", "pattern must divide the inputs of every layer, "),
        ("tasks=[{}, {model: nowhere}]", "model 'nowhere' is no folder: give embedded, "),
        (f"tasks=[{{}}, {{report: {LONG}}}]", "report.length must be at most the model's "),
        ("ray.cpus_per_worker=1000", "ray.cpus_per_worker must be at most the "),
    ],
)
def test_what_a_run_cannot_use_is_refused(override, message):
    assert refused(override).startswith(message)
