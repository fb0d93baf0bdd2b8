"""A signal in the first moments of a search: one line and exit code 3, from the first import on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY = "import sys\nfrom command_line import search\nsys.exit(search())\n"
IN_ONE_LINE = "interrupted before anything was written: run the same command again\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("module", ["typer", "pydantic", "torch"])
@pytest.mark.parametrize("program", ["run_search.py", "prunevolve-search"])
def test_a_signal_while_modules_are_imported_is_one_line_and_3(tmp_path, program, module, number):
    # In the module's place stands one that is hit by the signal.
    (tmp_path / f"{module}.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(30)\n"
    )
    script = ROOT / program
    if program == "prunevolve-search":  # what pip writes for a console entry
        script = tmp_path / program
        script.write_text(ENTRY)
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path / "run")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == IN_ONE_LINE
    assert not (tmp_path / "run").exists()
