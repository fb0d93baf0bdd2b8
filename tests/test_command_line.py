"""How both scripts start, each in a process of its own: without torch, which takes seconds."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import command_line

ROOT = Path(__file__).parents[1]
CONSOLE_SCRIPT = [
    "-c",
    "import sys; sys.argv[0] = 'prunevolve-prune'; from command_line import prune; prune()",
]
WHOLE = ["--model", "embedded", "--metric", "wanda", "--out", "out"]
IN_ONE_LINE = "interrupted before anything was written: run the same command again\n"


def started(*words, script=("run_prune.py",), **environment):
    """Run the script in a process of its own."""
    command = [sys.executable, *script, *words]
    settings = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)


@pytest.fixture
def stopped(tmp_path):
    """Run the script, which gets a signal while it imports a module."""

    def run(number, module, *words, script=("run_prune.py",)):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(
            "import os, time\n"
            f"os.kill(os.getpid(), {int(number)})\n"
            "try:\n    time.sleep(60)\n"
            "except BaseException as error:\n    raise ImportError('broken') from error\n"
        )
        return started(*words, script=script, PYTHONPATH=f"{tmp_path}:{ROOT}")

    return run


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("module", ["typer", "torch"])
def test_a_signal_during_an_import_ends_in_one_line(stopped, number, module):
    run = stopped(number, module, *WHOLE)
    assert (run.returncode, run.stdout, run.stderr) == (3, "", IN_ONE_LINE)


def test_a_signal_during_the_first_import_of_the_console_script_ends_in_one_line(stopped):
    run = stopped(signal.SIGINT, "typer", *WHOLE, script=CONSOLE_SCRIPT)
    assert (run.returncode, run.stdout, run.stderr) == (3, "", IN_ONE_LINE)


def test_a_signal_during_an_import_is_said_to_a_pipeline_too(stopped):
    run = stopped(signal.SIGTERM, "torch", *WHOLE, "--json")
    assert json.loads(run.stdout) == {
        "exit": 3,
        "reason": "interrupted",
        "error": IN_ONE_LINE.strip(),
    }


# Help and version


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--sparcity", "0.5"], 2),
        (["--model", "embedded", "--metric", "wnada", "--out", "out"], 2),
        (["--model", "embeded", "--metric", "wanda", "--out", "out"], 2),
        ([*WHOLE, "--sparsity", "50"], 2),
        ([*WHOLE, "--corpus", "wikitext"], 2),
    ],
)
def test_help_and_typos_import_nothing_that_takes_long(words, code):
    # Whatever imports torch fails here.
    broken = "import sys; sys.modules.update(torch=None, transformers=None, numpy=None, ray=None);"
    run = started(*words, script=["-c", broken + "import run_prune; run_prune.main()"])
    assert run.returncode == code
    assert len(run.stderr.splitlines()) == (0 if code == 0 else 1)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["--nonsense"], 2),
        (["--set", "serch.seed=1"], 2),
        (["--set", "search.seed=-1"], 2),
        (["--set", "model=embeded"], 2),
        (["--set", "fitness.corpus=wikitext"], 2),
        (["--set", "search.seeds=[wanda, 'row:wnada']"], 2),
        (["--config", "nowhere.yaml"], 2),
    ],
)
def test_help_and_typos_of_a_search_import_nothing_that_takes_long(words, code):
    heavy = "torch=None, transformers=None, numpy=None, ray=None, deap=None, datasets=None"
    broken = f"import sys; sys.modules.update({heavy});"
    run = started(*words, script=["-c", broken + "import run_search; run_search.main()"])
    assert run.returncode == code
    assert len(run.stderr.splitlines()) == (0 if code == 0 else 1)


def test_help_has_examples_and_no_type_for_a_flag():
    run = started("-h")
    assert run.returncode == 0
    assert "bool" not in run.stdout
    assert "prunevolve-prune --model embedded --metric wanda --out pruned" in run.stdout
    assert "--install-completion" in run.stdout


def test_help_of_a_search_has_examples_and_exit_codes(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert "prunevolve-search --resume runs/first --set search.candidates=5000" in out
    assert "3 interrupted, resumable" in out
    assert "bool" not in out


@pytest.mark.parametrize("script", ["run_prune.py", "run_search.py"])
def test_version_is_that_of_the_project(script):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run = started("--version", script=[script])
    assert (run.returncode, run.stdout) == (0, f"prunevolve {project['version']}\n")


def test_names_that_are_nearly_right_are_guessed(call):
    assert "did you mean embedded?" in call("--set", "model=Embeded")[2]
    assert "did you mean 'wikitext2'?" in call("--set", "fitness.corpus=wikitext")[2]


@pytest.mark.parametrize(
    ("option", "start", "expected"),
    [("--metric", "pruner", ["pruner-zero"]), ("--group", "", ["row", "layer", "model"])],
)
def test_a_shell_completes_names(option, start, expected):
    run = started(
        script=CONSOLE_SCRIPT,
        _PRUNEVOLVE_PRUNE_COMPLETE="complete_bash",
        COMP_WORDS=f"prunevolve-prune {option} {start}",
        COMP_CWORD="2",
    )
    assert run.stdout.split() == expected


# How the program was called


@pytest.mark.parametrize(
    ("program", "spec", "expected"),
    [
        ("run_search.py", None, "python run_prune.py"),
        ("/some where/run_search.py", None, "python '/some where/run_prune.py'"),
        ("/x/run_search.py", "run_search", "python -m run_prune"),
        ("/nowhere/bin/prunevolve-search", None, "/nowhere/bin/prunevolve-prune"),
        ("/usr/bin/pytest", "pytest.__main__", "prunevolve-prune"),
    ],
)
def test_a_script_is_spelled_as_the_program_was_called(monkeypatch, program, spec, expected):
    main = SimpleNamespace(__spec__=spec and SimpleNamespace(name=spec))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [program])
    assert command_line.called("run_prune") == expected


def test_a_console_entry_on_the_path_is_spelled_by_its_name(monkeypatch, tmp_path):
    entry = tmp_path / "prunevolve-search"
    entry.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(entry)])
    assert command_line.called("run_search") == "prunevolve-search"
    assert command_line.called("run_prune") == "prunevolve-prune"


# --json


def test_json_says_a_mistake_too():
    run = started("--metric", "wanda", "--json")
    assert run.returncode == 2
    told = json.loads(run.stdout)
    assert (told["exit"], told["reason"]) == (2, "usage")
    assert run.stderr == f"error: {told['error']}\n"
    unknown = json.loads(started("--sparcity", "0.5", "--json").stdout)
    assert unknown["error"].startswith("No such option: --sparcity")


def test_json_of_a_search_says_a_mistake_too(call):
    code, out, err = call("--json", "--set", "search.sed=1")
    told = json.loads(out)
    assert (code, told["exit"], told["reason"]) == (2, 2, "usage")
    assert err == f"error: {told['error']}\n"
    assert "did you mean seed?" in told["error"]


def test_json_of_a_plan_has_its_lines(call):
    code, out, err = call("--json", "--validate")
    told = json.loads(out)
    assert (code, told["exit"], told["reason"], told["ending"]) == (0, 0, "done", "valid")
    assert err.splitlines() == [*told["plan"], "valid"]
