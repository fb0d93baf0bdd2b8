"""How both scripts start: help, version, mistakes in the options, and `--json`."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSOLE_SCRIPT = [
    "-c",
    "import sys; sys.argv[0] = 'prunevolve-prune'; from run_prune import main; main()",
]
SCRIPTS = ["run_prune", "run_search"]


def started(*words, script=("run_prune.py",), **environment):
    """Run a script in a process of its own."""
    command = [sys.executable, *script, *words]
    settings = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--version", 0), ("--nonsense", 2)])
def test_help_version_and_a_wrong_option_import_nothing_that_takes_long(script, option, code):
    # Whatever imports one of these fails here.
    heavy = "torch=None, transformers=None, numpy=None, ray=None, deap=None, datasets=None"
    broken = f"import sys; sys.modules.update({heavy}); import {script}; {script}.main()"
    run = started(option, script=["-c", broken])
    assert run.returncode == code
    assert len(run.stderr.splitlines()) == (0 if code == 0 else 1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_examples_and_exit_codes_and_version_is_the_projects(script):
    run = started("-h", script=[f"{script}.py"])
    assert run.returncode == 0
    for text in (f"python {script}.py --", "3 interrupted, resumable", "--install-completion"):
        assert text in run.stdout
    assert "bool" not in run.stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run = started("--version", script=[f"{script}.py"])
    assert (run.returncode, run.stdout) == (0, f"prunevolve {project['version']}\n")


@pytest.mark.parametrize(
    ("option", "start", "expected"),
    [("--metric", "pruner", ["pruner-zero"]), ("--group", "", ["row", "layer", "model"])],
)
def test_shell_completes_names(option, start, expected):
    run = started(
        script=CONSOLE_SCRIPT,
        _PRUNEVOLVE_PRUNE_COMPLETE="complete_bash",
        COMP_WORDS=f"prunevolve-prune {option} {start}",
        COMP_CWORD="2",
    )
    assert run.stdout.split() == expected


def test_json_has_a_mistake_of_run_prune():
    for words, problem in ((("--metric", "wanda"), ""), (("--sparcity", "1"), "No such option: ")):
        run = started(*words, "--json")
        told = json.loads(run.stdout)
        assert (run.returncode, told["exit"], told["reason"]) == (2, 2, "usage")
        assert told["error"].startswith(problem)
        assert run.stderr == f"error: {told['error']}\n"


def test_json_has_a_mistake_of_run_search(call):
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
