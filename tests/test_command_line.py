"""How both scripts start and end early: help, mistakes in options, `--json`, signals, readers."""

import json
import os
import signal
import sys
import tomllib
from contextlib import closing
from pathlib import Path

import pytest
import search_process

from prunevolve import run_prune
from prunevolve.command_line import NOTHING_WRITTEN, check_interrupt, interruptible
from prunevolve.search import command as run_search
from prunevolve.search.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SCRIPTS = ["run_prune", "run_search"]
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PRUNE = ("run_prune.py", "--model", "embedded", "--metric", "wanda", "--out", "out")


def launched(script, *words, folder=ROOT, **environment):
    path = f"{folder}{os.pathsep}{ROOT}"
    settings = os.environ | {"COLUMNS": "100", "PYTHONPATH": path} | environment
    command = [sys.executable, script if script == "-c" else str(ROOT / script), *words]
    return search_process.run(command, cwd=folder, env=settings)


def run_without(libraries, script, *words, folder=ROOT):
    begin = f"import sys; sys.modules.update(dict.fromkeys({libraries.split()}))"
    start = f"from prunevolve import {script}; {script}.main()"
    return launched("-c", f"{begin}; {start}", *words, folder=folder)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--version", 0), ("--nonsense", 2)])
def test_help_version_and_a_wrong_option_import_nothing_that_takes_long(script, option, code):
    run = run_without(BEFORE_TORCH, script, option)
    assert run.returncode == code
    assert len(run.stderr.splitlines()) == (0 if code == 0 else 1)
    told = {"--help": "3 interrupted, resumable", "--version": f"prunevolve {VERSION}\n"}
    assert told.get(option, "") in run.stdout


BEFORE_TORCH = "torch transformers numpy ray deap datasets"
BEFORE_TRANSFORMERS = "transformers ray deap datasets"
WANDA = ["--model", "embedded", "--metric", "wanda", "--out", "new"]
TEXTS_AND_FOLDERS = [
    ("run_search", 2, ["--set", "fitness.corpus=wikitex"], "fitness: corpus must be "),
    ("run_search", 2, ["--set", "model=models/none"], "model 'models/none' is no folder: "),
    ("run_search", 2, ["--set", "selection.model=[none]"], "model 'none' is no folder: "),
    ("run_search", 2, ["--set", "search.seeds=[wandaa]"], "metric 'wandaa' is no known name "),
    ("run_search", 4, ["--out", "."], "--out . is not an empty folder: "),
    ("run_search", 4, ["--resume", "none"], "none is not a run folder: "),
    ("run_search", 4, ["--report", "none"], "none is not a run folder: "),
    ("run_search", 4, ["--status", "none"], "none is not a run folder: "),
    ("run_prune", 2, [*WANDA, "--model", "none"], "model 'none' is no folder: "),
    ("run_prune", 2, [*WANDA, "--corpus", "wikitex"], "corpus must be "),
    ("run_prune", 2, [*WANDA, "--recipe", "fst"], "recipe 'fst' cannot be read: "),
    ("run_prune", 2, [*WANDA, "--metric", "wandaa"], "metric 'wandaa' is no known name "),
    ("run_prune", 4, [*WANDA, "--out", "."], "out '.' is not empty: "),
    ("run_prune", 4, ["--resume", "none"], "'none' is no folder: "),
    ("run_prune", 2, ["--evaluate", "none"], "model 'none' is no folder: "),
    ("run_prune", 4, ["--verify", "none"], "'none' has no pruning_report.json: "),
]
FORMULAS_AND_METHODS = [
    ("run_search", 2, ["--set", "search.seeds=[W*Q]"], "metric 'W*Q', at column 3: 'Q' is unk"),
    ("run_prune", 2, [*WANDA, "--metric", "W*Q"], "metric 'W*Q', at column 3: 'Q' is unknown: "),
    ("run_prune", 2, [*WANDA, "--pattern", "4:2"], "pattern must be unstructured, neurons, or "),
    ("run_prune", 2, [*WANDA, "--group", "rows"], "group must be one of row, layer, model, got "),
    ("run_prune", 2, [*WANDA, "--pattern", "2:4", "--sparsity", "0.6"], "sparsity must be 0.5 "),
]


@pytest.mark.parametrize(
    ("libraries", "script", "code", "words", "problem"),
    [
        *[(BEFORE_TORCH, *mistake) for mistake in TEXTS_AND_FOLDERS],
        *[(BEFORE_TRANSFORMERS, *mistake) for mistake in FORMULAS_AND_METHODS],
    ],
)
def test_mistake_is_refused_before_what_takes_long_is_imported(
    tmp_path, libraries, script, code, words, problem
):
    (tmp_path / "notes.txt").write_text("mine")
    run = run_without(libraries, script, *words, folder=tmp_path)
    assert (run.returncode, run.stdout) == (code, "")
    assert run.stderr.startswith(f"error: {problem}")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("missing", ["deap", "sympy"])  # transformers imports the latter, lazily
def test_search_without_its_libraries_ends_at_once_with_the_way_out(tmp_path, missing):
    run = run_without(missing, "run_search", folder=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    way_out = "must be installed for this: pip install 'prunevolve[search]'"
    assert run.stderr == f"error: {missing} {way_out}\n"
    assert not any(tmp_path.iterdir())


STATUS = {
    **{"state": "running", "written": "now", "of": 9, "per_hour": 3600.0},
    "workers": {"ready": 2, "busy": 1, "starting": 0},
    **{"faults": {"lost": 3}, "trouble": "lost: it ended"},
    "best": {"metric": "mul(W, X)", "group": "row", "fitness": 0.9},
}


def test_status_is_shown_without_the_libraries_of_a_search(tmp_path):
    with closing(RunFolder.create(tmp_path / "run")) as folder:
        folder.write_text("config.yaml", "")
        folder.write_json("status.json", STATUS)
    run = run_without("deap ray", "run_search", "--status", "run", folder=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("run: stopped while running; resume with ")
    assert run.stdout.splitlines()[-2:] == [
        "3600 candidates an hour",
        "faults: 3 lost; the last: lost: it ended",
    ]


@pytest.mark.parametrize(
    ("script", "words", "problem"),
    [
        (run_prune, ("--metric", "wanda"), "--model is required"),
        (run_prune, ("--sparcity", 1), "No such option: "),
        (run_search, ("--set", "search.sed=1"), "did you mean seed?"),
    ],
)
def test_json_has_a_mistake(script, words, problem):
    out, err = search_process.started(script, *words, "--json", code=2)
    told = json.loads(out)
    assert (told["exit"], told["reason"]) == (2, "usage")
    assert problem in told["error"]
    assert err == f"error: {told['error']}\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_interruptible_raises_at_the_first_signal_and_leaves_the_second_to_python(number):
    own = signal.getsignal(number)
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert signal.getsignal(number) == own
    assert signal.getsignal(number) == own


def test_interrupt_that_a_callback_swallows_is_raised_at_the_next_check(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: printed.append(lost.exc_type))

    class Swallows:
        def __init__(self, act):
            self.act = act

        def __del__(self):
            self.act()

    check_interrupt()
    with interruptible():
        Swallows(lambda: signal.raise_signal(signal.SIGINT))  # which is gone at once
        with pytest.raises(KeyboardInterrupt):
            check_interrupt()
        Swallows(lambda: 1 / 0)
    check_interrupt()
    assert printed == [ZeroDivisionError]


def test_interruptible_lets_nohup_ignore_a_closed_terminal():
    own = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, own)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("words", [("run_search.py", "--out", "out", "--json"), PRUNE])
def test_signal_while_torch_is_imported_ends_in_one_line_and_3(tmp_path, words, number):
    # In the module's place stands one that is hit by the signal.
    (tmp_path / "torch.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(30)\n"
    )
    done = launched(*words, folder=tmp_path)
    assert done.returncode == 3
    assert "interrupted" in done.stderr and len(done.stderr.splitlines()) == 1
    told = f'"reason": "interrupted", "error": "{NOTHING_WRITTEN}"'
    assert told in done.stdout if "--json" in words else not done.stdout
    assert not (tmp_path / "out").exists()
