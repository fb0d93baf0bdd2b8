"""The wheel, installed in an environment of its own, beside a user's files."""

import os
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEWEST_KEYS = 77
"""The setuptools that knows all keys of pyproject.toml; nothing is downloaded here."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        int(metadata.version("setuptools").partition(".")[0]) < NEWEST_KEYS,
        reason="setuptools is too old to build the wheel",
    ),
]

PROGRAM = """
import prunevolve

metric = prunevolve.Metric.parse("W")
model = prunevolve.load_model("embedded", "float32", "cpu")
report = prunevolve.prune(model, metric, sparsity=0.6)
zeros: int = report.zeros
wrong: int = metric.text
"""

SMALL = (
    *("ray.workers=1", "search.candidates=4", "search.population=4", "search.stages=[1]"),
    *("search.lag=2", "fitness.windows=2", "fitness.length=32", "calibration.windows=1"),
    *("calibration.length=32", "selection.windows=2", "selection.length=32"),
    *("report.windows=2", "report.length=32"),
)


def done(*command, **more):
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, **more)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the wheel from a copy and install it; returns the environment's programs."""
    folder = tmp_path_factory.mktemp("wheel")
    names = done("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard")
    for name in names.splitlines():
        if (ROOT / name).is_file():
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index")
    done(*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, folder / "source")
    venv.create(folder / "env", with_pip=False)
    programs = folder / "env" / "bin"
    (wheel,) = folder.glob("*.whl")
    done(*pip, "--python", programs / "python", "install", *offline, wheel)
    where = done(
        programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    )
    # What it depends on is that of these tests; their own copy of the project is not on this path.
    Path(where.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def test_users_folders_with_our_names_are_not_taken_for_ours(installed, tmp_path):
    for name in ("configs", "evaluation", "pruning", "search"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the wrong {name}')")
    environment = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    here = {"cwd": tmp_path, "env": environment}
    changes = [word for change in SMALL for word in ("--set", change)]
    done(installed / "prunevolve-search", "--out", "run", *changes, **here)
    few = ("--samples", "2", "--seqlen", "32", "--eval-windows", "2")
    options = ("--model", "embedded", "--metric", "run", "--out", "pruned", *few)
    done(installed / "prunevolve-prune", *options, **here)
    (tmp_path / "program.py").write_text("import prunevolve\nprint(prunevolve.__version__)\n")
    assert done(installed / "python", "program.py", **here).strip() == metadata.version(
        "prunevolve"
    )


def test_types_reach_the_users_program(installed, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    # torch and the like would take a minute to read, and are not what is asked about.
    ours = ("configs", "evaluation", "prunevolve", "pruning", "search")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = skip\nignore_missing_imports = True\n"
        + "".join(f"[mypy-{name}.*]\nfollow_imports = normal\n" for name in ours)
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable"]
    command += [installed / "python", "--cache-dir", tmp_path / "cache", "program.py"]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("program.py:8: error: Incompatible types")
