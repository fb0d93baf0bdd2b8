"""A config resolved: models, tasks, texts, seeds, the loop's knobs; what is refused beforehand."""

import pytest
from refusals import refusal
from toy_setup import ROLES

from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.pruning.masks import NOfM
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.models import load_config
from prunevolve.search.experiment import Experiment, resolve

SMALL = tuple(f"{role}.{key}" for role in ROLES for key in ("windows=2", "length=16"))
OTHER = "{corpus: embedded, split: '%s', windows: 3, length: 32}"
LIMIT = load_config("embedded").max_position_embeddings


def config(*overrides: str) -> Config:
    return schema.load(None, list(overrides))


def small(*overrides: str) -> Experiment:
    """An experiment on two windows of 16 tokens of each text."""
    plain = ("search.stages=[1]", "search.primitives=release")
    return resolve(config(*SMALL, *plain, *overrides))


def refused(*overrides: str) -> str:
    return refusal(lambda: resolve(config(*overrides)))


def test_tasks_hold_a_model_once_with_its_dtype_and_texts():
    experiment = small("tasks=[{}, {sparsity: 0.3, weight: 2}, {pattern: '2:4'}]")
    tasks = experiment.tasks
    assert len(experiment.subjects) == len(experiment.texts) == 1
    assert [task.subject for task in tasks] == [0, 0, 0]
    assert [task.name for task in tasks] == ["embedded 60%", "embedded 30%", "embedded 2:4"]
    assert [task.pattern for task in tasks] == [None, None, NOfM(2, 4)]
    assert [task.weight for task in tasks] == [1, 2, 1]


def test_tasks_of_another_dtype_or_other_texts_hold_a_model_again():
    fitness = OTHER % "fitness[:50%]"
    tasks = f"tasks=[{{}}, {{dtype: float16}}, {{fitness: {fitness}}}, {{fitness: {fitness}}}]"
    experiment = small(tasks)
    assert [task.subject for task in experiment.tasks] == [0, 1, 2, 2]
    assert [subject.dtype for subject in experiment.subjects] == ["float32", "float16", "float32"]
    assert [texts["fitness"].windows for texts in experiment.texts] == [2, 2, 3]


def test_read_texts_cuts_each_models_windows_with_its_own_tokenizer(tiny_llama_dir):
    experiment = small(f"tasks=[{{}}, {{model: {tiny_llama_dir}}}]").read_texts()
    assert [subject.model for subject in experiment.subjects] == ["embedded", str(tiny_llama_dir)]
    of_embedded, of_bytes = (windows["report"] for windows in experiment.windows)
    assert of_embedded.tokens.tolist() != of_bytes.tokens.tolist()
    assert of_embedded.provenance["text_sha256"] == of_bytes.provenance["text_sha256"]


def test_setup_is_what_the_config_says_in_plain_values():
    setup = small("low_memory=true", "ray.cpus_per_worker=3").read_texts().setup
    assert (setup.device, setup.threads, setup.stages) == ("cpu", 3, (1,))
    assert setup.low_memory
    assert all(setup.windows[0][role].shape == (2, 16) for role in ROLES)
    assert small("ray.gpus_per_worker=0.5").read_texts().setup.device == "cuda"


@pytest.mark.parametrize(
    ("overrides", "leaves"),
    [
        (["search.seeds=['mul(W, add(V, B))']"], "WXGVB"),
        (["search.primitives=extended"], "WXGBVHDIM"),
    ],
)
def test_leaves_are_those_of_candidates_and_seeds(overrides, leaves):
    assert small(*overrides).leaves == frozenset(leaves)


def test_seeds_have_the_group_that_is_searched_and_are_written_into_the_config():
    experiment = small("search.seeds=[snip, W, snip]", "pruning.group=layer")
    seeds = (Criterion.parse("mul(W, G)", "layer"), Criterion.parse("W", "layer"))
    assert experiment.breeder.seeds == seeds
    assert experiment.config.search.seeds == ["mul(W, G)", "W"]
    assert experiment.breeder.search == experiment.config.search
    assert resolve(experiment.config).breeder == experiment.breeder


@pytest.mark.parametrize(
    "overrides",
    [
        ["tasks=[{}, {sparsity: 0.3}]"],
        [f"tasks=[{{}}, {{fitness: {OTHER % 'fitness[:50%]'}}}]", "search.stages=[1]"],
        ["fitness.split=selection[:50%]", "selection.split=selection[50%:]"],
    ],
    ids=["shared by tasks", "of one role", "slices"],
)
def test_texts_beside_each_other_are_taken(overrides):
    assert resolve(config(*overrides)).notes == ()


def test_texts_that_overlap_are_refused_with_the_way_out():
    assert refused("report.split=selection") == (
        "selection and report overlap: embedded selection and embedded selection: "
        "give disjoint texts, or set allow_test_selection: true"
    )
    assert refused("fitness.split=calibration[50%:]").startswith(
        "calibration and fitness overlap: embedded calibration and embedded calibration[50%:]: "
    )
    assert resolve(config("report.split=selection", "allow_test_selection=true")).notes == ()


@pytest.mark.parametrize("place", [0, 1])
def test_texts_that_overlap_across_tasks_are_refused(place):
    # Each task is disjoint in itself: the one selects on a half of what the other reports.
    halved = f"{{selection: {OTHER % 'report[:50%]'}, report: {OTHER % 'report[50%:]'}}}"
    both = ["{}", "{}"]
    both[place] = halved
    tasks = f"tasks=[{', '.join(both)}]"
    message = "selection and report overlap: embedded report[:50%] and embedded report"
    assert refused(tasks).startswith(message)
    assert resolve(config(f"tasks=[{halved}]")).notes == ()
    assert resolve(config(tasks, "allow_test_selection=true")).notes == ()


MIX = (
    "{mix: [{corpus: embedded, split: training}, {corpus: embedded, split: '%s'}], "
    "windows: 8, length: 32}"
)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"calibration={MIX % 'training[50%:]'}", "calibration: part 1 and part 2 overlap: "),
        (f"calibration={MIX % 'report'}", "calibration and report overlap: "),
        (f"calibration={MIX % 'dev'}", "calibration: split of corpus 'embedded' must be one of"),
        ("fitness.split=dev", "fitness: split of corpus 'embedded' must be one of "),
        ("fitness.corpus=missing.txt", "fitness: corpus must be embedded, "),
        (f"tasks=[{{}}, {{report: {OTHER % 'dev'}}}]", "report: split of corpus 'embedded' must "),
        (
            "search.seeds=[magnitude, wandaa]",
            "metric 'wandaa' is no known name or file: did you mean ",
        ),
    ],
)
def test_texts_and_seeds_that_cannot_be_used_are_refused(override, message):
    assert refused(override).startswith(message)


def test_model_that_make_builds_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(lambda: resolve(schema.load("smollm2_135m", []))) == (
        "model 'models/smollm2-135m' is no folder: give embedded, a folder or a hub id"
    )


LONG = f"{{corpus: embedded, split: report, windows: 2, length: {LIMIT + 1}}}"
FEW = "{corpus: embedded, split: fitness, windows: 4, length: 64}"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{pattern: '4:2'}", "pattern must be unstructured or n:m with 0 < n < m <= "),
        ("{pattern: '3:7'}", "pattern must divide the inputs of every layer, got 7 of 192 in "),
        ("{model: nowhere}", "model 'nowhere' is no folder: give embedded, a folder or a hub id"),
        (f"{{fitness: {FEW}}}", "search.stages must be at most fitness.windows = 4, got [2, 4, "),
        (f"{{report: {LONG}}}", f"report.length must be at most the model's {LIMIT} positions, "),
    ],
)
def test_tasks_are_all_checked(task, message):
    assert refused(f"tasks=[{{}}, {task}]").startswith(message)


@pytest.mark.parametrize(
    ("overrides", "group"),
    [
        (["pruning.group=layer"], "layer"),
        (["pruning.group=layer", "pruning.pattern=2:4"], "row"),
        (["tasks=[{pattern: '2:4'}, {sparsity: 0.5}]"], "model"),
    ],
)
def test_group_is_row_where_all_tasks_have_a_pattern(overrides, group):
    assert small(*overrides).breeder.group == group
