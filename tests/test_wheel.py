"""The wheel, installed in an environment of its own, beside a user's files."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from toy_setup import small

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "evaluation", "pruning", "search")
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
import prunevolve.search.evolution
import search

metric = prunevolve.Metric.parse("W")
model = prunevolve.load_model("embedded", "float32", "cpu")
report = prunevolve.prune(model, metric, sparsity=0.6)
evolution = prunevolve.search.evolution.Evolution
print(search.NAME, report.sparsity > 0, evolution.__name__)
"""

SMALL = ["ray.workers=1", "search.candidates=4", "search.population=4", "search.stages=[1]"]
SMALL += ["search.lag=2", *small(2)]


def done(*command, **more):
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, **more)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-index")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "models", "runs", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored)
    done(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel):
    """Install the wheel; returns the environment's programs."""
    venv.create(wheel.parent / "env", with_pip=False)
    programs = wheel.parent / "env" / "bin"
    done(*PIP, "--python", programs / "python", "install", *OFFLINE, wheel)
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    where = done(programs / "python", "-c", command).strip()
    # What it depends on is that of these tests; their own copy of the project is not on this path.
    Path(where, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def test_wheel_holds_all_files_of_the_packages(wheel):
    held = zipfile.ZipFile(wheel).namelist()
    assert "prunevolve/py.typed" in held
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("*.*")):
        if path.is_file() and path.parent.name != "__pycache__":
            assert f"prunevolve/{path.relative_to(ROOT)}" in held


@pytest.fixture
def project(tmp_path):
    """A user's project, whose folders have the names of ours."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f'NAME = "the user\'s {name}"\n')
    return tmp_path


def test_commands_run_where_folders_have_our_names(installed, project):
    here = {"cwd": project, "env": os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}}
    changes = [word for change in SMALL for word in ("--set", change)]
    printed = done(installed / "prunevolve-search", "--out", "run", *changes, **here)
    assert "search on with prunevolve-search --resume run --set " in printed
    few = ("--samples", "2", "--seqlen", "32", "--eval-windows", "2")
    options = ("--model", "embedded", "--metric", "run", "--out", "pruned", *few)
    printed = done(installed / "prunevolve-prune", *options, **here)
    assert "\nverify: prunevolve-prune --verify pruned\n" in printed


def test_a_users_package_named_search_and_ours_are_both_had(installed, project):
    (project / "program.py").write_text(PROGRAM)
    printed = done(installed / "python", "program.py", cwd=project)
    assert printed.splitlines()[-1] == "the user's search True Evolution"
