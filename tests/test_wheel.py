"""The wheel in an environment of its own, and the lowest transformers that may be installed."""

import os
import re
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
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "models", "runs", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored)
    done(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel):
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


def test_commands_run_where_folders_have_our_names(installed, tmp_path):
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    here = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}}
    changes = [word for change in SMALL for word in ("--set", change)]
    printed = done(installed / "prunevolve-search", "--out", "run", *changes, **here)
    assert "search on with prunevolve-search --resume run --set " in printed
    few = ("--samples", "2", "--seqlen", "32", "--eval-windows", "2")
    options = ("--model", "embedded", "--metric", "run", "--out", "pruned", *few)
    printed = done(installed / "prunevolve-prune", *options, **here)
    assert "\nverify: prunevolve-prune --verify pruned\n" in printed


def test_models_of_every_family_are_pruned_with_the_lowest_transformers(tmp_path):
    (version,) = re.findall(r'"transformers>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    command = (*PIP, "install", "--target", str(tmp_path), f"transformers=={version}")
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"transformers {version} cannot be installed here: {run.stderr[-200:]}")
    # Newer ones install `kernels`; this one works without it, and not with every version of it.
    (tmp_path / "kernels.py").write_text("raise ImportError")
    here = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}}
    show = "import transformers; print(transformers.__version__)"
    assert done(sys.executable, "-c", show, **here).startswith(version)
    # Some of the names that these use are private ones of transformers.
    files = ("test_attention.py", "test_models.py", "test_store.py", "run/test_result.py")
    tests = [f"tests/pruning/{name}" for name in files]
    done(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, **here)
