"""The files of `cluster/` and the commands of docs/CLUSTER.md, against what reads them."""

import re
import subprocess
from pathlib import Path

import pytest
from ray.scripts import scripts as ray_cli
from typer.main import get_command

from prunevolve.configs.schema import Config
from prunevolve.run_search import app

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SHELL = sorted(CLUSTER.glob("*.sh"))
TEXTS = [ROOT / "docs/CLUSTER.md", *SHELL]


def commands(path):
    """The lines of a text, those that a backslash continues as one, without comments."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if not line.lstrip().startswith("# ")]


def options_of(command):
    return {name for parameter in command.params for name in parameter.opts if name[:2] == "--"}


def test_shell_scripts_parse():
    for script in SHELL:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_named_ray_options_exist(path):
    known = {"start": options_of(ray_cli.start), "stop": options_of(ray_cli.stop)}
    for line in commands(path):
        for name, rest in re.findall(rf"\bray ({'|'.join(known)})\b(.*)", line):
            own = re.split(r" -- |`|$", rest)[0]
            for option in re.findall(r"(?<!\S)--[a-z-]+", own):
                assert option in known[name], (name, option)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_named_search_options_keys_and_files_exist(path):
    known = options_of(get_command(app))
    for line in commands(path):
        for rest in re.findall(r"(?:run_search\.py|prunevolve-search|search\.sh) (.*)", line):
            for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
                assert option in known, option
        for section, key in re.findall(r"\b(ray|search)\.([a-z_]+)=", line):
            keys = Config.model_fields[section].annotation.model_fields
            assert key in keys, key
    named = re.findall(r"\b(?:cluster|configs|docs)/[\w.]+\.\w+", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []
