"""Zero-shot tasks through lm-eval, on a task file of our own and the embedded model."""

import json
import math
import signal
import sys
from pathlib import Path

import pytest
import torch
from search_process import started

from prunevolve import run_prune
from prunevolve.evaluation import zero_shot
from prunevolve.pruning.models import load_model, load_tokenizer
from prunevolve.pruning.run import command
from prunevolve.pruning.run.verify import verify_result

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
dataset_path: json
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


def write_task(folder: Path, examples: int = 0) -> Path:
    """Write a task file and its data into a folder, and return the file, if there is lm-eval."""
    pytest.importorskip("lm_eval")
    rows = [{"question": text, "choices": answers, "answer": 0} for text, answers in QUESTIONS]
    data, task = folder / "facts.jsonl", folder / "facts.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.write_text(TASK.format(data=data, examples=examples))
    return task


FEW = ("--eval-windows", 2, "--seqlen", 64)


def prune(out: Path, *words, code: int = 0) -> tuple[str, str]:
    options = ("--model", "embedded", "--metric", "magnitude", *FEW)
    return started(run_prune, *options, "--out", out, *words, code=code)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero-shot")
    task = write_task(folder)
    out, _ = prune(folder / "out", "--zero-shot", task)
    return folder / "out", out, task


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


def test_zero_shot_reports_both_models_with_each_accuracy_in_its_row(pruned):
    folder, out, *_ = pruned
    found = report_of(folder)["zero_shot"]
    by_hand = {"dense": accuracies("embedded"), "pruned": accuracies(str(folder))}
    assert by_hand["dense"]["acc"] != by_hand["dense"]["acc_norm"]
    for model, expected in by_hand.items():
        errors = {name: math.sqrt(share * (1 - share) / 5) for name, share in expected.items()}
        assert found[model]["results"] == [
            {"task": "python_facts", "version": 2.5, "metric": metric}
            | {"value": pytest.approx(share), "stderr": pytest.approx(errors[metric])}
            for metric, share in expected.items()
        ]
        assert found[model]["harness"].startswith("lm-eval 0.4.")
        assert found[model]["table"] in out
        assert f"{expected['acc_norm']:.4f}".rstrip("0") in found[model]["table"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "\n".join(zero_shot.lines(report_of(folder))) in card


def test_zero_shot_evaluates_any_folder_without_examples_whatever_the_task_says(pruned, tmp_path):
    folder, *_ = pruned
    task = write_task(tmp_path, examples=2)
    out, err = started(run_prune, "--evaluate", folder, "--zero-shot", task, *FEW, "--json")
    told, before = json.loads(out), report_of(folder)
    assert told["perplexity"] == pytest.approx(before["pruned_perplexity"])
    assert told["zero_shot"]["measured"]["results"] == before["zero_shot"]["pruned"]["results"]
    assert before["zero_shot"]["pruned"]["table"] in err


def test_zero_shot_results_survive_an_interrupt(pruned, tmp_path, monkeypatch):
    folder, _, task = pruned
    with monkeypatch.context() as patched:
        patched.setattr(command, "prune", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        _, err = prune(tmp_path / "out", "--zero-shot", task, code=3)
    assert "dense zero-shot: " in err
    assert not (tmp_path / "out" / "pruning_report.json").exists()
    _, err = prune(tmp_path / "out", "--zero-shot", task, "--resume")
    assert [name for name in ("dense", "pruned") if f"{name} zero-shot: " in err] == ["pruned"]
    assert verify_result(tmp_path / "out") == report_of(folder)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("facts.yaml", "facts.yaml' is unknown or missing: give a file that ends in .yaml"),
        ("facts.jsonl", "facts.jsonl'): load them once where the Hugging Face hub can be reached"),
    ],
)
def test_zero_shot_says_a_mistake_in_one_line_before_any_work(tmp_path, lost, message):
    task = write_task(tmp_path)
    (tmp_path / lost).unlink()
    out, err = prune(tmp_path / "out", "--zero-shot", task, code=2)
    *_, line = err.splitlines()  # datasets shows its own progress before
    assert (out, line[:7]) == ("", "error: "), err
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # lm-eval reads its 14,000 task files
def test_zero_shot_knows_lm_evals_tasks_and_a_near_name(tmp_path):
    pytest.importorskip("lm_eval")
    out, _ = prune(tmp_path / "out", "--zero-shot", "boolq,arc_easy", "--validate")
    assert out.splitlines()[0] == "data sets of zero-shot tasks boolq, arc_easy: not checked"
    _, err = prune(tmp_path / "out", "--zero-shot", "boolq, helaswag", code=2)
    assert "task 'helaswag' is unknown or missing: give hellaswag or a file that ends in" in err


def test_zero_shot_without_lm_eval_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = "error: lm_eval must be installed for this: pip install 'prunevolve[zero-shot]'\n"
    assert prune(tmp_path / "out", "--zero-shot", "boolq", code=2) == ("", line)
    assert list(tmp_path.iterdir()) == []
