"""The files of `cluster/` and the commands of docs/CLUSTER.md, against what reads them."""

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job import cli as job_cli
from ray.scripts import scripts as ray_cli
from typer.main import get_command

from prunevolve.configs.schema import Config
from prunevolve.run_search import app

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SHELL = sorted(CLUSTER.glob("*.sh"))
RAY_UP = sorted(CLUSTER.glob("ray_up*.yaml"))
TEXTS = [ROOT / "docs/CLUSTER.md", *SHELL, *RAY_UP, CLUSTER / "rayjob.yaml"]


def commands(path):
    """The lines of a text, those that a backslash continues as one, without comments."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if not line.lstrip().startswith("# ")]


def options_of(command):
    return {name for parameter in command.params for name in parameter.opts if name[:2] == "--"}


def test_shell_scripts_parse():
    for script in SHELL:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_fits_the_schema_of_the_installed_ray_and_gives_every_node_the_token(path):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
    assert any(name.endswith("/.ray/auth_token") for name in config["file_mounts"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert starts and all("RAY_AUTH_MODE=token" in command for command in starts)


def test_rayjob_is_a_cluster_to_the_autoscaler_of_the_installed_ray():
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    metadata = {**job["metadata"], "namespace": "default"}
    derived = autoscaling_config._derive_autoscaling_config_from_ray_cr(
        {"metadata": metadata, "spec": cluster}
    )
    types = derived["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 8)
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_named_ray_options_exist(path):
    known = {
        "start": options_of(ray_cli.start),
        "stop": options_of(ray_cli.stop),
        "symmetric-run": options_of(ray_cli.start) | {"--min-nodes"},
        "up": options_of(ray_cli.up),
        "job submit": options_of(job_cli.submit),
    }
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
