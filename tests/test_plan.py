"""From a config to models, tasks and windows; which texts may stand beside each other."""

import pytest

from configs import schema
from configs.schema import Config
from pruning.masks import NOfM
from search.plan import check_texts, load_plan

ROLES = ("calibration", "fitness", "selection", "report")
OTHER = "{corpus: embedded, split: '%s', windows: 3, length: 32}"


def config(*overrides: str) -> Config:
    small = [f"{role}.{key}" for role in ROLES for key in ("windows=2", "length=16")]
    return schema.load(None, [*small, *overrides])


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        check_texts(config(*overrides))
    return str(error.value)


# Models, tasks, windows


def test_load_plan_of_one_task_holds_one_model_and_its_four_texts():
    plan = load_plan(config("pruning.sparsity=0.7", "dtype=bfloat16"))
    (subject,), (windows,), (task,) = plan.subjects, plan.windows, plan.tasks
    assert (subject.model, subject.dtype) == ("embedded", "bfloat16")
    assert (task.name, task.subject, task.sparsity, task.pattern) == ("embedded 70%", 0, 0.7, None)
    assert list(windows) == list(ROLES)
    assert {role: text.tokens.shape for role, text in windows.items()} == dict.fromkeys(
        ROLES, (2, 16)
    )
    assert [text.provenance["split"] for text in windows.values()] == list(ROLES)


def test_load_plan_holds_a_model_once_for_all_tasks_with_its_dtype_and_texts():
    plan = load_plan(config("tasks=[{}, {sparsity: 0.3, weight: 2}, {pattern: '2:4'}]"))
    assert len(plan.subjects) == len(plan.windows) == 1
    assert [task.subject for task in plan.tasks] == [0, 0, 0]
    assert [task.name for task in plan.tasks] == ["embedded 60%", "embedded 30%", "embedded 2:4"]
    assert [task.pattern for task in plan.tasks] == [None, None, NOfM(2, 4)]
    assert [task.weight for task in plan.tasks] == [1, 2, 1]


def test_load_plan_holds_a_model_again_for_another_dtype_and_other_texts():
    fitness = OTHER % "fitness[:50%]"
    tasks = f"tasks=[{{}}, {{dtype: float16}}, {{fitness: {fitness}}}, {{fitness: {fitness}}}]"
    plan = load_plan(config(tasks))
    assert [task.subject for task in plan.tasks] == [0, 1, 2, 2]
    assert [subject.dtype for subject in plan.subjects] == ["float32", "float16", "float32"]
    assert [w["fitness"].tokens.shape for w in plan.windows] == [(2, 16), (2, 16), (3, 32)]


def test_load_plan_cuts_each_models_windows_with_its_own_tokenizer(tiny_llama_dir):
    plan = load_plan(config(f"tasks=[{{}}, {{model: {tiny_llama_dir}}}]"))
    assert [subject.model for subject in plan.subjects] == ["embedded", str(tiny_llama_dir)]
    own, of_bytes = (windows["report"] for windows in plan.windows)
    assert own.tokens.tolist() != of_bytes.tokens.tolist()
    assert own.provenance["text_sha256"] == of_bytes.provenance["text_sha256"]


def test_load_plan_refuses_a_text_that_is_too_short():
    with pytest.raises(ValueError, match="windows without overlap of 16 need"):
        load_plan(config("report.windows=1000000"))


# Texts beside each other


def test_check_texts_takes_tasks_that_share_their_texts():
    assert check_texts(config("tasks=[{}, {sparsity: 0.3}]")) == []


def test_check_texts_refuses_an_overlap_within_a_task():
    assert refusal("report.split=selection") == (
        "selection and report overlap: embedded selection and embedded selection: "
        "give disjoint texts, or set allow_test_selection: true"
    )


@pytest.mark.parametrize("place", [0, 1])
def test_check_texts_refuses_an_overlap_across_tasks(place):
    # Each task is disjoint in itself: the one selects on a half of what the other reports.
    own = f"{{selection: {OTHER % 'report[:50%]'}, report: {OTHER % 'report[50%:]'}}}"
    both = ["{}", "{}"]
    both[place] = own
    message = refusal(f"tasks=[{', '.join(both)}]")
    assert "selection and report overlap: embedded report[:50%] and embedded report" in message
    assert check_texts(config(f"tasks=[{own}]")) == []
    assert check_texts(config(f"tasks=[{', '.join(both)}]", "allow_test_selection=true")) == []


def test_check_texts_takes_one_role_on_overlapping_texts():
    assert check_texts(config(f"tasks=[{{}}, {{fitness: {OTHER % 'fitness[:50%]'}}}]")) == []


def test_check_texts_notes_once_what_comes_from_the_hub():
    hub = ["report.corpus=ptb", "report.split=test", "tasks=[{}, {sparsity: 0.3}]"]
    assert check_texts(config(*hub)) == [
        "report: corpus 'ptb', split 'test' comes from the Hugging Face hub: not checked"
    ]


def test_check_texts_refuses_an_unknown_text_of_any_task():
    unknown = "{corpus: wikitext, split: test, windows: 3, length: 32}"
    assert refusal(f"tasks=[{{}}, {{report: {unknown}}}]").startswith("corpus must be one of ")
