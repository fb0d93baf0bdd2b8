"""What both command lines share, and how fast and how late `run_search.py` imports."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import command_line
import run_search

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "ray", "deap", "datasets", "numpy")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the console entry in an empty folder; returns exit code, output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["prunevolve-search", *map(str, words)])
        try:
            run_search.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


# Help and version


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_examples_and_no_type_where_there_is_no_value(call, option):
    code, out, err = call(option)
    assert (code, err) == (0, "")
    assert "run_search.py --resume runs/first --set search.candidates=5000" in out
    assert "3 interrupted, resumable" in out
    assert "<bool>" not in out
    assert "--install-completion" in out


def test_version_is_the_installed_ones(call):
    code, out, _ = call("--version")
    assert (code, out.split()[0]) == (0, "prunevolve")
    assert out.split()[1][0].isdigit()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["--nonsense"],
        ["--set", "serch.seed=1"],
        ["--set", "search.seed=-1"],
        ["--set", "model=embeded"],
        ["--set", "fitness.corpus=wikitex"],
        ["--config", "nowhere.yaml"],
    ],
)
def test_help_and_typing_errors_are_answered_before_anything_heavy_is_imported(words):
    program = (
        "import sys; sys.argv[0] = 'run_search.py'\n"
        "import run_search\n"
        "try:\n    run_search.main()\n"
        "except SystemExit: pass\n"
        f"print('loaded', sorted(set(sys.modules) & set({HEAVY})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "loaded []", done


def test_names_that_are_nearly_right_are_guessed(call):
    assert "did you mean embedded?" in call("--set", "model=Embeded")[2]
    assert "did you mean 'wikitext2'?" in call("--set", "fitness.corpus=wikitext")[2]


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


def test_json_of_a_mistake_is_one_object_with_its_code_and_reason(call):
    code, out, err = call("--json", "--set", "search.sed=1")
    told = json.loads(out)
    assert (code, told["exit"]) == (2, 2)
    assert err == f"error: {told['reason']}\n"
    assert "did you mean seed?" in told["reason"]


def test_json_of_a_plan_has_its_lines(call):
    code, out, err = call("--json", "--validate")
    told = json.loads(out)
    assert (code, told["exit"], told["reason"]) == (0, 0, "valid")
    assert err.splitlines() == [*told["plan"], "valid"]
