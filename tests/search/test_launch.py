"""What `run_search.py` says before any work: exit codes and one-line errors, offline."""

import json
import shutil

import pytest
from toy_records import record_of

from prunevolve.configs import schema
from prunevolve.pruning import models
from prunevolve.search.experiment import resolve
from prunevolve.search.prepare import identity


@pytest.fixture
def refusal(call):
    """Run a command that must fail with a code; returns its one-line error."""

    def run(code, *words):
        out, err = call(*words, code=code)
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").removesuffix("\n")

    return run


@pytest.fixture(scope="module")
def environment():
    return json.dumps({"identity": identity(resolve(schema.load(None, [])).read_texts())})


@pytest.fixture
def run_folder(tmp_path, environment):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(schema.to_yaml(schema.load(None, [])))
    (path / "environment.json").write_text(environment)
    return path


def test_validate_shows_what_texts_hold_or_that_the_hub_has_them(call, tmp_path):
    texts = ("--set=report.corpus=wikitext2", "--set=report.split=test")
    out, err = call("--validate", *texts)
    assert err == ""
    told = out.partition("\n\n")[2].splitlines()
    assert [line for line in told if not line.startswith("plan: ")] == [
        "model embedded: 1,967,808 parameters in float32",
        "text calibration: 8,192 tokens",
        "text fitness: 8,192 tokens",
        "text selection: 8,192 tokens",
        "text report: corpus 'wikitext2', split 'test' comes from the Hugging Face hub: not "
        "checked",
        "valid",
    ]
    assert list(tmp_path.iterdir()) == []


SHORT = "fitness={corpus: short.txt, split: all, windows: 32, length: 256}"
FIT = "fitness: windows must be at least 1 and fit the text, got 32 of 256 tokens; corpus "
NOBODY = "model 'nobody/nothing'"
HUB = "report={corpus: ptb, split: test, windows: 2, length: 32}"


@pytest.mark.parametrize(
    ("option", "override", "problem"),
    [
        *(("--validate", SHORT, FIT), ("--out=run", SHORT, FIT)),
        ("--out=run", "model=nobody/nothing", f"{NOBODY} cannot be loaded: Cannot find an appr"),
        ("--out=run", HUB, "report: corpus 'ptb' cannot be read (Conn"),
        ("--out=run", "ray.address=127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 "),
    ],
)
def test_what_is_not_there_is_one_line_and_leaves_nothing(
    call, tmp_path, monkeypatch, option, override, problem
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "short.txt").write_text("a few words")
    _, err = call(option, "--set", override, code=2)
    assert err.startswith(f"error: {problem}") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_launch_can_be_resumed_where_the_worker_finds_no_weights(call, tmp_path):
    # A model of which all is there but its weights: that is found by the first worker.
    ours = models.find_model("embedded")
    model = shutil.copytree(ours, tmp_path / "model", ignore=lambda *_: {"model.safetensors"})
    words = ("--out", "runs/first", f"--set=model={model}", "--set=ray.workers=0")
    _, err = call(*words, code=3)
    assert err.startswith("error: no worker could be started: ") and err.count("\n") == 1
    way_on = "; continue with python run_search.py --resume runs/first"
    assert err.rstrip().endswith(way_on)
    _, again = call("--resume", "runs/first", code=3)
    assert again == err
    names = {path.name for path in (tmp_path / "runs/first").iterdir()}
    assert names == {"config.yaml", "environment.json"}


def test_first_worker_without_memory_ends_the_run_with_the_way_out(call, monkeypatch):
    def load(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr("prunevolve.search.evaluator.load_model", load)
    monkeypatch.setattr("prunevolve.search.pool.workers._LONGEST_BREAK", 0.1)
    _, err = call("--out", "run", "--set=ray.workers=0", code=3)
    assert err.rstrip() == (
        "error: no worker could be started, 3 times; the last fault: RuntimeError: out of memory: "
        "set low_memory=true or fewer ray.workers; continue with python run_search.py --resume run"
    )


def test_options_that_do_not_go_together_are_refused(refusal):
    problem = "--resume takes its config and folder from the run: only --set goes with it"
    assert refusal(2, "--resume", "run", "--out", "elsewhere") == problem
    problem = "--report and --status take no other option"
    assert refusal(2, "--status", "run", "--validate") == problem


def test_resume_refuses_to_make_the_run_another_search(refusal, run_folder):
    before = (run_folder / "config.yaml").read_text()
    assert refusal(4, "--resume", "run", "--set", "model=x").startswith("model is 'x' but was ")
    problem = "search.candidates = '0': Input should be greater than or equal"
    assert problem in refusal(2, "--resume", "run", "--set", "search.candidates=0")
    assert (run_folder / "config.yaml").read_text() == before


def test_resume_refuses_fewer_candidates_than_the_run_has(refusal, run_folder):
    records = [record_of(index, "W", None, "model", kind="duplicate") for index in range(3)]
    journal = "".join(f"{json.dumps(record.to_dict())}\n" for record in records)
    (run_folder / "journal.jsonl").write_text(journal)
    assert refusal(4, "--resume", "run", "--set", "search.candidates=2") == (
        "search.candidates = 2 is below the 3 that run has: give more"
    )


def test_status_and_report_refuse_a_run_in_which_nothing_was_evaluated_yet(refusal, run_folder):
    before = sorted(run_folder.iterdir())
    line = "run has no status before its first candidate: look later"
    assert refusal(4, "--status", "run") == line
    assert refusal(4, "--report", "run") == (
        "run has no evaluated candidate yet: there is nothing to report; see python run_search.py "
        "--status run"
    )
    assert sorted(run_folder.iterdir()) == before
