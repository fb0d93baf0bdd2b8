"""Zero-shot tasks through lm-eval, on a task file of our own and the embedded model."""

import json
import math
import signal
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants
from search_process import started

from prunevolve import run_prune
from prunevolve.evaluation import zero_shot
from prunevolve.pruning.models import load_model, load_tokenizer
from prunevolve.pruning.output import command, save
from prunevolve.pruning.output.folder import WorkFolder
from prunevolve.pruning.output.verify import verify_result

needs_lm_eval = pytest.mark.skipif(not zero_shot.find_spec("lm_eval"), reason="no lm-eval")

QUESTIONS = [
    ("The while statement is used for repeated", [" execution", " import statement", " a"]),
    ("The import statement binds a", [" name", " while loops everywhere", " !"]),
    ("A string is a sequence of", [" values that represent Unicode code points", " loops"]),
    ("The for statement is used to iterate over the", [" elements of a sequence", " try"]),
    ("Floating point numbers are", [" usually implemented using double in C", " a tuple"]),
    ("An assertion is written as", [" assert expression", " pass"]),
]
"""Questions with their answers, of which the first is right."""

TASK = """
task: python_facts
dataset_path: {kind}
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: {examples}
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 2.5
"""


def write_task(folder: Path, kind: str = "json", examples: int = 0) -> Path:
    """Write a task file and its data into a folder, and return the file."""
    rows = [{"question": text, "choices": answers, "answer": 0} for text, answers in QUESTIONS]
    data, task = folder / "facts.jsonl", folder / "facts.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.write_text(TASK.format(data=data, kind=kind, examples=examples))
    return task


FEW = ("--eval-windows", 2, "--seqlen", 64)


def prune(out: Path, *words, code: int = 0) -> tuple[str, str]:
    """Prune the embedded model by magnitude into a folder, measuring little but the tasks."""
    options = ("--model", "embedded", "--metric", "magnitude", *FEW)
    return started(run_prune, *options, "--out", out, *words, code=code)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A pruned model's folder with what the run printed, and the task file."""
    folder = tmp_path_factory.mktemp("zero-shot")
    task = write_task(folder)
    out, err = prune(folder / "out", "--zero-shot", task)
    return folder / "out", out, err, task


def report_of(folder: Path) -> dict:
    return json.loads((folder / "pruning_report.json").read_text())


def accuracies(place: str) -> dict[str, float]:
    """Return both accuracies of a model, from its log-likelihoods by hand."""
    model, tokenizer = load_model(place, "float32"), load_tokenizer(place)
    right = {"acc": 0, "acc_norm": 0}
    for question, answers in QUESTIONS:
        totals = []
        for answer in answers:
            ids = tokenizer(question + answer, return_tensors="pt")["input_ids"]
            start = len(tokenizer(question)["input_ids"])
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            totals.append(sum(logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
        per_character = [total / len(text) for total, text in zip(totals, answers, strict=True)]
        right["acc"] += max(totals) == totals[0]
        right["acc_norm"] += max(per_character) == per_character[0]
    return {metric: count / len(QUESTIONS) for metric, count in right.items()}


@needs_lm_eval
def test_zero_shot_reports_dense_beside_pruned_with_each_accuracy_in_its_row(pruned):
    folder, *_ = pruned
    found = report_of(folder)["zero_shot"]
    dense, after = accuracies("embedded"), accuracies(str(folder))
    assert dense["acc"] != dense["acc_norm"]
    about = {"task": "python_facts", "version": 2.5, "examples": 6}
    data = {"dataset": "json", "config": None, "split": "test"}

    def error(share: float) -> float:
        return pytest.approx(math.sqrt(share * (1 - share) / 5))

    assert found["results"] == [
        about
        | data
        | {"metric": metric, "dense": pytest.approx(dense[metric])}
        | {"dense_stderr": error(dense[metric]), "pruned": pytest.approx(after[metric])}
        | {"pruned_stderr": error(after[metric])}
        for metric in ("acc", "acc_norm")
    ]
    assert found["harness"].startswith("lm-eval 0.4.")
    assert found["dtype"] == "float32"


@needs_lm_eval
def test_zero_shot_prints_a_table_and_nothing_of_lm_evals_own(pruned):
    folder, out, err, task = pruned
    found = report_of(folder)["zero_shot"]
    heading = f"Zero-shot by {found['harness']}, float32; ± is one standard error:"
    _, table = out.split(f"{heading}\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[:4]]
    assert rows[0] == ["task", "version", "metric", "examples", "dense", "pruned"]
    for cells, row in zip(rows[2:], found["results"], strict=True):
        values = [f"{row[m]:.4f} ± {row[f'{m}_stderr']:.4f}" for m in ("dense", "pruned")]
        assert cells == ["python_facts", "2.5", row["metric"], "6", *values]
    stages = [line.partition(": ")[0] for line in err.splitlines()]
    tasks = (f"dense {task}", f"pruned {task}")
    known = ("pruning", "plan", "prune", "dense perplexity", "pruned perplexity", "save")
    assert set(tasks) <= set(stages) <= {*known, *tasks}


@needs_lm_eval
def test_zero_shot_results_are_in_the_model_card(pruned):
    folder, *_ = pruned
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "\n".join(zero_shot.lines(report_of(folder))) in card
    assert str(folder.parent) not in card


@needs_lm_eval
def test_zero_shot_evaluates_any_model_folder_as_its_pruning_did(pruned):
    folder, _, _, task = pruned
    before = report_of(folder)
    out, err = started(run_prune, "--evaluate", folder, "--zero-shot", task, *FEW, "--json")
    told = json.loads(out)
    assert told["exit"] == 0
    assert told["perplexity"] == pytest.approx(before["pruned_perplexity"])
    assert told["zero_shot"]["results"] == [
        {key: row[key] for key in ("task", "version", "examples", "dataset", "config", "split")}
        | {"metric": row["metric"], "value": row["pruned"], "value_stderr": row["pruned_stderr"]}
        for row in before["zero_shot"]["results"]
    ]
    place = "embedded, split report, 2 windows of 64 = 128 tokens, float32"
    assert f"perplexity {told['perplexity']:.4f} ({place})" in err.splitlines()
    assert "| python_facts | 2.5     | acc_norm | 6        | " in err


@needs_lm_eval
def test_zero_shot_gives_no_examples_whatever_the_task_says(tmp_path):
    name = str(write_task(tmp_path, examples=2))
    (task,) = zero_shot.load_tasks([name])[name]["tasks"].values()
    task.build_all_requests()
    assert {request.args[0] for request in task.instances} == {text for text, _ in QUESTIONS}


@needs_lm_eval
def test_zero_shot_leaves_the_pruned_files_as_they_are_without_it(pruned, tmp_path):
    prune(tmp_path / "plain")
    names = {path.name for path in pruned[0].iterdir()}
    assert names == {path.name for path in (tmp_path / "plain").iterdir()}
    for name in names - {"pruning_recipe.json", "pruning_report.json", "README.md"}:
        assert (pruned[0] / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


@needs_lm_eval
def test_zero_shot_is_repeated_by_a_recipe(pruned, tmp_path):
    folder, _, _, task = pruned
    recipe = folder / "pruning_recipe.json"
    assert json.loads(recipe.read_text())["zero_shot"] == [str(task)]
    started(run_prune, "--recipe", recipe, "--out", tmp_path / "again")
    assert report_of(tmp_path / "again")["zero_shot"] == report_of(folder)["zero_shot"]


@needs_lm_eval
def test_zero_shot_never_has_two_models_in_memory(tmp_path, monkeypatch):
    loaded = []

    def load(*place):
        assert [model for model in loaded if model()] == []
        model = load_model(*place)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(command, "load_model", load)
    prune(tmp_path / "out", "--zero-shot", write_task(tmp_path))
    assert len(loaded) == 2


def interrupt(*arguments) -> None:
    signal.raise_signal(signal.SIGINT)


@needs_lm_eval
@pytest.mark.parametrize(
    ("place", "name", "again"),
    [(command, "prune", ["pruned"]), (save, "model_card", []), (WorkFolder, "publish", [])],
)
def test_zero_shot_results_survive_an_interrupt(pruned, tmp_path, monkeypatch, place, name, again):
    folder, _, _, task = pruned
    with monkeypatch.context() as patched:
        patched.setattr(place, name, interrupt)
        _, err = prune(tmp_path / "out", "--zero-shot", task, code=3)
    assert f"dense {task}: " in err
    assert not (tmp_path / "out" / "pruning_report.json").exists()
    _, err = prune(tmp_path / "out", "--zero-shot", task, "--resume")
    assert [name for name in ("dense", "pruned") if f"{name} {task}: " in err] == again
    assert verify_result(tmp_path / "out") == report_of(folder)


@needs_lm_eval
def test_zero_shot_tasks_stay_the_same_when_a_run_is_resumed(pruned, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(command, "prune", interrupt)
        prune(tmp_path / "out", "--zero-shot", pruned[3], code=3)
    _, err = prune(tmp_path / "out", "--resume", code=4)
    assert f"was begun with zero_shot ['{pruned[3]}'], and it is None now" in err


@needs_lm_eval
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "zero-shot task file '{task}' is not there"),
        ("wrong", "zero-shot task '{task}' or its data set cannot be loaded ("),
        ("no data", "Unable to find '{data}'): load it once where the Hugging Face hub can be"),
        ("hub", "(ConnectionError: Couldn't reach 'owner/none' on the Hub (OfflineModeIsEnabled))"),
    ],
)
def test_zero_shot_says_a_mistake_in_one_line_before_any_work(
    tmp_path, monkeypatch, change, message
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # of a hub that cannot be reached
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    task = write_task(tmp_path, kind="owner/none" if change == "hub" else "json")
    data = tmp_path / "facts.jsonl"
    if change == "no data":
        data.unlink()
    elif change == "missing":
        task.unlink()
    elif change == "wrong":
        task.write_text("no: task\n")
    out, err = prune(tmp_path / "out", "--zero-shot", task, code=2)
    assert (out, len(err.splitlines())) == ("", 1), err
    assert message.format(task=task, data=data) in err
    assert not (tmp_path / "out").exists()


@needs_lm_eval
@pytest.mark.slow  # lm-eval reads its 14,000 task files
def test_zero_shot_knows_lm_evals_tasks_and_a_near_name(tmp_path):
    names = "boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa"
    out, _ = prune(tmp_path / "out", "--zero-shot", names, "--validate")
    spelled = names.replace(",", ", ")
    assert out.splitlines()[0] == f"data sets of zero-shot tasks {spelled}: not checked"
    out, err = prune(tmp_path / "out", "--zero-shot", "boolq, helaswag", code=2)
    assert out == ""
    assert err == (
        "error: zero-shot task 'helaswag' is none of lm-eval's: did you mean hellaswag? or give "
        "one of its tasks, or a task file that ends in .yaml\n"
    )


def test_zero_shot_without_lm_eval_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: None)
    remedy = "pip install 'prunevolve[zero-shot]'"
    line = f"error: zero-shot tasks need lm-eval, which is not installed: {remedy}\n"
    assert prune(tmp_path / "out", "--zero-shot", "boolq", code=2) == ("", line)
    words = ("--evaluate", "embedded", "--zero-shot", "boolq")
    assert started(run_prune, *words, code=2) == ("", line)
    assert list(tmp_path.iterdir()) == []


def test_evaluate_without_tasks_measures_perplexity_on_each_text(tmp_path):
    texts = ("--eval-corpus", "embedded", "--eval-corpus", "embedded", "--eval-windows", 2)
    words = (*texts, "--eval-split", "report", "--eval-split", "selection", "--seqlen", 64)
    out, _ = started(run_prune, "--evaluate", "embedded", *words)
    first, *others = out.splitlines()
    perplexity = float(first.split()[1])
    of_texts = [float(line.rpartition(" ")[2]) for line in others]
    assert [line.rpartition(":")[0] for line in others] == [
        "  of embedded, split report",
        "  of embedded, split selection",
    ]
    assert perplexity == pytest.approx(math.sqrt(math.prod(of_texts)), rel=1e-4)
    prune(tmp_path / "out", *words[:-2])
    assert f"{perplexity:.4f}" == f"{report_of(tmp_path / 'out')['dense_perplexity']:.4f}"


@pytest.mark.parametrize("words", [("--metric", "wanda"), ("--out", "x"), ("--model", "embedded")])
def test_evaluate_takes_no_option_of_a_pruning(words):
    out, err = started(run_prune, "--evaluate", "embedded", *words, code=2)
    assert out == ""
    assert err == "error: --evaluate prunes nothing: leave out --model, --metric and --out\n"


def test_lines_say_what_is_not_finite_and_leave_out_an_unknown_error():
    row = {"task": "t", "version": None, "metric": "word_perplexity", "examples": 3}
    values = {"dense": 4.0, "dense_stderr": None, "pruned": None, "pruned_stderr": None}
    found = {"harness": "lm-eval 1", "dtype": "float32", "results": [row | values]}
    assert zero_shot.lines({"zero_shot": found})[-1] == (
        "| t    |         | word_perplexity | 3        | 4.0000 | not finite |"
    )
    assert zero_shot.lines({}) == []
