"""The wheel, installed in an environment of its own, beside a user's files."""

import os
import shutil
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

OURS_SECOND = """
import search
import prunevolve
import prunevolve.search.evolution

theirs: str = search.NAME
metric = prunevolve.Metric.parse("W")
model = prunevolve.load_model("embedded", "float32", "cpu")
report = prunevolve.prune(model, metric, sparsity=0.6)
removed: float = report.sparsity
evolution = prunevolve.search.evolution.Evolution
print(theirs, removed > 0, evolution.__name__)
"""
OURS_FIRST = OURS_SECOND.replace("import search\n", "", 1).replace("\n\n", "\nimport search\n\n", 1)

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
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "models", "runs", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored)
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


@pytest.fixture
def project(tmp_path):
    """A user's project, whose folders have the names of ours."""
    for name in ("configs", "evaluation", "pruning", "search"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f'NAME = "the user\'s {name}"\n')
    return tmp_path


def test_the_wheel_installs_one_package_and_two_commands(installed):
    program = "from importlib import metadata; print(*metadata.files('prunevolve'), sep='\\n')"
    files = [Path(line) for line in done(installed / "python", "-P", "-c", program).splitlines()]
    places = {file.parts[0] for file in files if file.suffix != ".pyc"}
    assert {place for place in places if not place.endswith(".dist-info")} == {"..", "prunevolve"}
    outside = {file.name for file in files if file.parts[0] == ".."}
    assert outside == {"prunevolve-prune", "prunevolve-search"}


def test_commands_run_where_folders_have_our_names(installed, project):
    here = {"cwd": project, "env": os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}}
    changes = [word for change in SMALL for word in ("--set", change)]
    done(installed / "prunevolve-search", "--out", "run", *changes, **here)
    few = ("--samples", "2", "--seqlen", "32", "--eval-windows", "2")
    options = ("--model", "embedded", "--metric", "run", "--out", "pruned", *few)
    done(installed / "prunevolve-prune", *options, **here)


@pytest.mark.parametrize("program", [OURS_FIRST, OURS_SECOND])
def test_a_users_package_named_search_and_ours_are_both_had_typed(installed, project, program):
    (project / "program.py").write_text(program + "wrong: int = metric.text\n")
    printed = done(installed / "python", "program.py", cwd=project)
    assert printed.splitlines()[-1] == "the user's search True Evolution"
    # torch and the like would take a minute to read, and are not what is asked about.
    (project / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = skip\nignore_missing_imports = True\n"
        + "".join(
            f"[mypy-{name}]\nfollow_imports = normal\n" for name in ("prunevolve.*", "search")
        )
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable"]
    command += [installed / "python", "--cache-dir", project / "cache", "program.py"]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=project)
    lines = run.stdout.splitlines()
    last = len((project / "program.py").read_text().splitlines())
    assert len(lines) == 2 and lines[0].startswith(f"program.py:{last}: error: Incompatible types")
