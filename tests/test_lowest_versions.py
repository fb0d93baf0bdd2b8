"""The lowest transformers that pyproject.toml allows: some of the names used are private ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("test_attention.py", "test_models.py", "test_store.py", "run/test_result.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lowest(tmp_path_factory):
    """Install it with what it needs into a folder; returns its version and the folder."""
    (version,) = re.findall(r'"transformers>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    folder = tmp_path_factory.mktemp("lowest")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    command = (*pip, "install", "--target", str(folder), f"transformers=={version}")
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"transformers {version} cannot be installed here: {run.stderr[-200:]}")
    return version, folder


def test_models_of_every_family_are_pruned_with_the_lowest_transformers(lowest):
    version, folder = lowest
    here = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}}
    show = (sys.executable, "-c", "import transformers; print(transformers.__version__)")
    assert subprocess.run(show, capture_output=True, text=True, **here).stdout.startswith(version)
    files = [f"tests/pruning/{name}" for name in FILES]
    tests = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    run = subprocess.run(tests, capture_output=True, text=True, **here)
    assert run.returncode == 0, run.stdout[-3000:]
