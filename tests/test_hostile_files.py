"""Files made to hang, to fill the memory or to run code: one line, within 5 s and 500 MB.

Every test runs under a guard that ends what hangs, and measures memory, and time of the processor:
that of the clock depends on what else runs.
"""

import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from toy_models import toy_model
from transformers import AutoTokenizer

import run_prune
import run_search
from configs import schema
from evaluation import corpus
from evaluation.corpus import token_windows
from pruning.models import load_model, load_tokenizer, source_of
from search.checkpoint import read_state
from search.journal import FolderError, RunFolder
from search.population import State

SECONDS, MEGABYTES = 5, 500
HANGING = 60
"""Seconds by the clock after which a test that waits for something is ended."""
LARGE = 100_000_000
KINDS = ("pipe", "device", "large")


class OverdueError(BaseException):
    """The guard's; no handler of ours catches it."""


def memory(line: str) -> float:
    """Return a line of this process's status, such as VmHWM, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{line}:")[2].split()[0]) / 1000


@pytest.fixture(autouse=True)
def guard():
    """End what takes too long or too much, and fail what took more than is promised."""

    def overdue(number, frame):
        raise OverdueError(f"not done after {HANGING} s")

    limit = resource.getrlimit(resource.RLIMIT_AS)
    room = int((memory("VmSize") + 4 * MEGABYTES) * 1e6)
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, begins anew
    # What else this machine does takes none of this process's own time.
    before, began = memory("VmRSS"), time.process_time()
    signal.signal(signal.SIGALRM, overdue)
    signal.alarm(HANGING)
    faulthandler.dump_traceback_later(2 * HANGING, exit=True)  # a loop in C hears no signal
    resource.setrlimit(resource.RLIMIT_AS, (room, limit[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert time.process_time() - began < SECONDS
    assert memory("VmHWM") - before < MEGABYTES


def make(path: Path, kind: str) -> Path:
    """Put something at a path that must not be read: a pipe, a device, 100 MB or a folder."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(LARGE)
    return path


def reason(kind: str) -> str:
    return {"large": "is longer than", "folder": "Is a directory"}.get(
        kind, "is a pipe or a device: give a regular file"
    )


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a script that must refuse; returns its one line."""

    def run(script, *words, code=2):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            script.main()
        out, err = capsys.readouterr()
        said = (
            "note: ",
            "warning: ",
            "pruning: ",
            "plan: ",
            "verify: ",
        )  # before the folder is looked at
        lines = [line for line in err.splitlines() if not line.startswith(said)]
        assert (end.value.code, out, len(lines)) == (code, "", 1), err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def search_refuses(refused):
    """Run `run_search.py --validate` with a model; returns its one line."""
    return lambda model: refused(run_search, "--validate", "--set", f"model={model}", *SMALL)


@pytest.fixture
def prune_refuses(refused, tmp_path):
    """Run `run_prune.py --validate` with a model and options; returns its one line."""

    def run(model, *words, metric="wanda", code=2):
        small = ("--samples", 2, "--seqlen", 16, "--eval-windows", 2, "--out", tmp_path / "out")
        words = ("--model", model, "--metric", metric, *small, "--validate", *words)
        return refused(run_prune, *words, code=code)

    return run


ROLES = ("calibration", "fitness", "selection", "report")
SMALL = [word for role in ROLES for word in ("--set", f"{role}.length=16")]


@pytest.fixture
def model(tiny_llama_dir, tmp_path):
    """A folder of a tiny model that may be altered."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def alter(folder: Path, settings: dict, section: str | None = None) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config).update(settings)
    path.write_text(json.dumps(config))


# The config of a search


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
def test_a_config_that_is_no_short_file_is_refused(refused, tmp_path, kind):
    path = make(tmp_path / "c.yaml", kind)
    assert reason(kind) in refused(run_search, "--validate", "--config", path)


def bomb(levels: int, unit: str) -> str:
    """Return YAML whose aliases stand for nine times as much at each level."""
    lines = [f"k0: &k0 {unit}"]
    for level in range(1, levels):
        inside = ", ".join([f"*k{level - 1}"] * 9)
        merge = unit.startswith("{")
        what = f"{{<<: [{inside}]}}" if merge else f"[{inside}]"
        lines.append(f"k{level}: &k{level} {what}")
    return "\n".join([*lines, f"model: *k{levels - 1}"])


@pytest.mark.parametrize(
    "content",
    [
        bomb(12, "[a, b]"),
        bomb(12, "{a: 1}"),
        "model: &a [*a]",
        "model: [" + "a, " * 60_000 + "]",
        "model: " + "[" * 100_000,
        "model: " + "- " * 100_000,
        "model: !!timestamp 2001-99-99",
        "model: !!int many",
    ],
    ids=["list", "merge", "cycle", "long", "deep", "block", "date", "number"],
)
def test_yaml_made_to_grow_is_refused(refused, tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    message = refused(run_search, "--validate", "--config", path)
    assert message.startswith(f"config {path} is not YAML: ")
    assert len(message) < 500


@pytest.mark.parametrize("seed", ["null", "0"])
@pytest.mark.parametrize("role", ROLES)
def test_more_windows_than_any_text_has_are_refused(refused, role, seed):
    sets = (f"{role}.windows=999999999", f"{role}.seed={seed}")
    message = refused(run_search, "--validate", *(w for one in sets for w in ("--set", one)))
    assert message.startswith(f"config {schema.DEFAULT}: {role}")
    assert f"must be at most {schema.MOST_TOKENS} tokens" in message


@pytest.mark.parametrize(
    "override",
    [
        *(f"{key}=1{'0' * 30}" for key in ("fitness.length", "fitness.seed", "search.seed")),
        *(f"search.{key}=99999999999" for key in ("candidates", "population", "lag", "parents")),
        *(f"search.{key}=99999999999" for key in ("patience", "finalists", "checkpoint_every")),
        *("ray.workers=99999999999", "ray.cpus_per_worker=99999999999"),
        *("search.stages=[1,99999999999999]", "fitness.windows=many"),
        f"model={'x' * 5000}",
        f"fitness.corpus={'x' * 300}.txt",
        "fitness.corpus=~nobody-of-this-name/x.txt",
        f"search.candidates={'9' * 5000}",
    ],
)
def test_a_knob_beyond_reason_is_refused(refused, override):
    assert len(refused(run_search, "--validate", "--set", override)) < 700


# The model's folder


READ = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "model.safetensors.index.json"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READ)
def test_a_file_of_a_model_that_cannot_be_meant_is_refused(
    search_refuses, prune_refuses, model, name, kind
):
    make(model / name, kind)
    for refuses in (search_refuses, prune_refuses):
        message = refuses(model)
        assert f"model {str(model)!r} cannot be loaded: " in message
        assert name in message
        assert reason(kind) in message


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_weights_that_are_no_regular_file_are_refused(search_refuses, prune_refuses, model, kind):
    make(model / "model.safetensors", kind)
    assert reason(kind) in search_refuses(model)
    assert reason(kind) in prune_refuses(model)


def test_a_template_that_is_no_regular_file_is_refused(prune_refuses, model):
    (model / "additional_chat_templates").mkdir()
    make(model / "additional_chat_templates" / "x.jinja", "pipe")
    assert reason("pipe") in prune_refuses(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_no_folder_is_refused(search_refuses, prune_refuses, tmp_path, kind):
    path = make(tmp_path / "file", kind)
    assert f"model {str(path)!r} is no folder" in search_refuses(path)
    assert f"model {str(path)!r} is no folder" in prune_refuses(path)


def test_a_model_whose_name_no_file_can_have_is_refused(prune_refuses):
    assert prune_refuses("x" * 300).startswith("model 'xxx")


SIZES = [
    {"num_hidden_layers": 1_000_000},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": "2"},
    {"num_hidden_layers": 2.0},
    {"num_hidden_layers": True},
    {"num_hidden_layers": [2]},
    {"hidden_size": 10**12},
    {"hidden_size": "16"},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 0},
    {"head_dim": 0},
    {"intermediate_size": 10**15},
    {"vocab_size": 10**10},
    {"vocab_size": {}},
    {"max_position_embeddings": 0},
    {"num_labels": 10**9},
    {"max_position_embeddings": 10**30},
]


@pytest.mark.parametrize("settings", SIZES, ids=str)
def test_a_size_that_no_model_has_is_refused(search_refuses, prune_refuses, model, settings):
    alter(model, settings)
    ((name, value),) = settings.items()
    for refuses in (search_refuses, prune_refuses):
        message = refuses(model)
        assert message.startswith(f"model {str(model)!r} cannot be loaded: config.json: {name} ")
        assert "must be a whole number from 1 to " in message
        assert f"got {value!r}" in message


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_hidden_layers": 400}, "num_hidden_layers is 400, but the weights have 2 blocks"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, but the weights have 2 blocks"),
        ({"hidden_size": 32}, "must have shape"),
        ({"intermediate_size": 25}, "must have shape"),
        ({"vocab_size": 300}, "must have shape (300, 16) by its config, got (256, 16)"),
        ({"num_attention_heads": 8}, "must have shape"),
        ({"num_key_value_heads": 4}, "must have shape"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"attention_bias": True}, "are missing"),
        ({"tie_word_embeddings": False}, "1 tensors are missing, lm_head.weight among them"),
    ],
    ids=str,
)
def test_a_size_that_the_weights_have_not_is_refused(
    search_refuses, prune_refuses, model, settings, problem
):
    alter(model, settings)
    assert problem in search_refuses(model)
    assert problem in prune_refuses(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": "x"},
        {"rope_parameters": {"rope_type": "none", "rope_theta": []}},
        {"rope_scaling": 5},
        {"hidden_act": "nope"},
        {"hidden_act": 3},
        {"rms_norm_eps": "x"},
        {"pad_token_id": 10**9},
        {"dtype": "load"},
        {"dtype": "nonsense"},
        {"dtype": 5},
        {"layer_types": 7},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"tie_word_embeddings": "x"},
        {"is_encoder_decoder": [1]},
        {"id2label": 4},
    ],
    ids=str,
)
def test_settings_of_another_kind_are_refused_or_of_no_matter(refused, model, settings, capsys):
    alter(model, settings)
    try:
        load_model(str(model), "float32")
    except ValueError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 700


ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")


@pytest.mark.parametrize("value", ["owner/repo", "flash_attention_2", {"": "owner/repo"}, 5])
@pytest.mark.parametrize("key", ATTENTION)
def test_attention_of_others_is_refused(search_refuses, prune_refuses, model, key, value):
    alter(model, {key: value})
    for refuses in (search_refuses, prune_refuses):
        message = refuses(model)
        assert f"config.json: {key} must be eager or sdpa, got {value!r}" in message


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_attention_of_others_is_refused_in_a_part_of_the_model(tmp_path, section):
    toy_model("gemma3").save_pretrained(tmp_path)
    load_model(str(tmp_path), "float32")
    alter(tmp_path, {"_attn_implementation": "owner/repo"}, section)
    with pytest.raises(ValueError, match=f"{section}._attn_implementation must be eager or sdpa"):
        load_model(str(tmp_path), "float32")


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_our_own_attention_is_taken(model, value):
    alter(model, {"_attn_implementation": value})
    load_model(str(model), "float32")


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize("settings", [{"num_hidden_layers": 10**6}, {"hidden_size": "16"}])
def test_sizes_are_looked_at_in_every_part_of_the_model(tmp_path, section, settings):
    toy_model("gemma3").save_pretrained(tmp_path)
    alter(tmp_path, settings, section)
    with pytest.raises(ValueError, match=f"config.json: {section}.* must be a whole number"):
        load_model(str(tmp_path), "float32")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized: give the one that it"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, got nan"),
        ({"output_hidden_states": "x"}, "output_hidden_states must be true or false, got 'x'"),
        ({"text_config": 7}, "config.json: text_config must be an object, got 7"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights names other files"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files names other files"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "'own' is not supported"),
        ({"model_type": "own", "auto_map": 5}, "model_type 'own' is not supported"),
    ],
    ids=["quantized", "nan", "flag", "part", "weights", "configs", "code", "map"],
)
def test_what_leads_to_other_code_or_files_is_refused(
    search_refuses, prune_refuses, model, settings, problem
):
    alter(model, settings)
    (model / "own.py").write_text("from pathlib import Path; Path('ran').touch()")
    assert problem in search_refuses(model)
    assert problem in prune_refuses(model)
    assert not Path("ran").exists()


def test_a_model_of_pickles_alone_is_refused(search_refuses, prune_refuses, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    for refuses in (search_refuses, prune_refuses):
        assert refuses(model) == (
            f"model {str(model)!r} has .bin weights alone, which are pickles and are not read: "
            "convert it with transformers, save_pretrained(FOLDER)"
        )


@pytest.mark.parametrize("content", ["[]", "1", "", "nonsense", "[" * 100_000, '{"a": ' * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_of_a_model_that_is_none_is_refused(
    search_refuses, prune_refuses, model, name, content
):
    (model / name).write_text(content)
    for refuses in (search_refuses, prune_refuses):
        message = refuses(model)
        assert name in message
        assert len(message) < 700


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": "pytorch_model.bin"}},
    ],
    ids=str,
)
def test_an_index_that_leads_elsewhere_is_refused(search_refuses, prune_refuses, model, content):
    (model / "model.safetensors").rename(model.parent / "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(content))
    for refuses in (search_refuses, prune_refuses):
        assert "index.json' must have a weight_map to safetensors files beside it" in refuses(model)


def header(content: object, length: int | None = None, rest: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + rest


def tensor(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header(b"{}", 2**60),
        header(b"{}", LARGE),
        header(b"[]"),
        header(b"[" * 100_000),
        header(tensor(shape="ab"), rest=bytes(8)),
        header(tensor(shape=[2**60]), rest=bytes(8)),
        header(tensor(shape=[-2]), rest=bytes(8)),
        header(tensor(shape=["2"]), rest=bytes(8)),
        header(tensor(shape=[3]), rest=bytes(8)),
        header(tensor(dtype=5), rest=bytes(8)),
        header(tensor(dtype="X9"), rest=bytes(8)),
        header(tensor(data_offsets=[8, 16]), rest=bytes(16)),
        header(tensor(data_offsets=[]), rest=bytes(8)),
        header(tensor(data_offsets=["0", "8"]), rest=bytes(8)),
        header(tensor() | {"b": tensor()["a"]}, rest=bytes(8)),
        header({"a": 5}),
    ],
)
def test_a_header_that_lies_is_refused(search_refuses, prune_refuses, model, content):
    (model / "model.safetensors").write_bytes(content)
    for refuses in (search_refuses, prune_refuses):
        assert str(model / "model.safetensors") in refuses(model)


def test_a_header_of_100_mb_is_refused(search_refuses, model):
    with (model / "model.safetensors").open("wb") as file:
        file.write(header(b"", LARGE - 8))
        file.truncate(LARGE)
    assert "its header must have at most" in search_refuses(model)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"added_tokens": [{"id": "x"}]}'),
        ("tokenizer.json", '{"added_tokens": 5, "model": {"type": "BPE"}}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", "[" + "[]," * 4_000_000 + "0]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"auto_map": 5}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", '{"fast_tokenizer_files": ["/x/tokenizer.4.0.0.json"]}'),
    ],
)
def test_a_tokenizer_that_is_none_is_refused_or_of_no_matter(model, name, content):
    (model / name).write_text(content)
    (model / "own.py").write_text("from pathlib import Path; Path('ran').touch()")
    try:
        load_tokenizer(str(model))
    except ValueError as error:
        assert str(error).startswith(f"model {str(model)!r} cannot be loaded: ")
        assert "\n" not in str(error)
        assert len(str(error)) < 700
    assert not Path("ran").exists()


def test_the_tokenizer_of_another_model_is_refused(prune_refuses, tmp_path, tiny_llama_dir):
    toy_model("llama", vocab_size=40).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path / "model")
    expected = "must stay below the model's vocab_size of 40, got token 255: it belongs to another"
    assert expected in prune_refuses(tmp_path / "model")
    with pytest.raises(ValueError, match="must stay below the model's vocab_size of 40"):
        load_tokenizer(str(tmp_path / "model"))


def test_a_token_beyond_the_vocabulary_is_refused_where_windows_are_cut(tiny_llama_dir):
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    windows = token_windows(tokenizer, "embedded", "report", 2, 8, None, 256)
    largest = int(windows.tokens.max())
    token_windows(tokenizer, "embedded", "report", 2, 8, None, largest + 1)
    with pytest.raises(ValueError, match=f"vocab_size of {largest}, got token {largest}: "):
        token_windows(tokenizer, "embedded", "report", 2, 8, None, largest)


# Texts and windows


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_text_that_is_no_short_file_is_refused(refused, prune_refuses, tmp_path, suffix, kind):
    path = make(tmp_path / f"text{suffix}", kind)
    assert reason(kind) in prune_refuses("embedded", "--corpus", path)
    words = ("--set", f"fitness.corpus={path}", "--set", "fitness.split=all")
    assert reason(kind) in refused(run_search, "--validate", *words)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"text": "a", "x": [' + "[]," * 5_000_000 + "0]}", "9" * 5000]
)
def test_a_record_made_to_grow_is_refused(prune_refuses, tmp_path, line):
    path = tmp_path / "text.jsonl"
    path.write_text(line + "\n")
    message = prune_refuses("embedded", "--corpus", path)
    assert "line 1" in message
    assert len(message) < 500


def test_a_parquet_file_whose_text_grows_is_refused(prune_refuses, tmp_path):
    path = tmp_path / "text.parquet"
    indices = pyarrow.array(np.zeros(5_000, np.int32))
    text = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["words " * 50_000]))
    parquet.write_table(pyarrow.table({"text": text}), path, store_schema=False)
    assert path.stat().st_size < 1_000_000
    message = prune_refuses("embedded", "--corpus", path, "--samples", 2)
    assert f"has more than {2**26} characters" in message


@pytest.mark.parametrize("option", ["--samples", "--eval-windows"])
def test_more_windows_than_can_be_held_are_refused(prune_refuses, option):
    message = prune_refuses("embedded", option, 999_999_999)
    assert f"must be at most {corpus.MOST_TOKENS} tokens" in message


@pytest.mark.parametrize("seed", [None, 0])
def test_windows_are_counted_before_they_are_cut(tiny_llama_dir, seed):
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    with pytest.raises(ValueError, match=f"at most {corpus.MOST_TOKENS} tokens"):
        token_windows(tokenizer, "embedded", "report", corpus.MOST_TOKENS, 2, seed)


def test_as_many_short_windows_as_may_be_cost_no_more_than_their_tokens(tiny_llama_dir):
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    count = corpus.MOST_TOKENS // 2
    assert len(token_windows(tokenizer, "embedded", "report", count, 2, 0).tokens) == count


def test_schema_and_corpus_have_one_limit():
    assert schema.MOST_TOKENS == corpus.MOST_TOKENS


# Metrics and statistics


@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_that_is_no_short_file_is_refused(refused, prune_refuses, tmp_path, kind):
    path = make(tmp_path / "metric.json", kind)
    assert reason(kind) in prune_refuses("embedded", metric=path)
    assert reason(kind) in refused(run_search, "--validate", "--set", f"search.seeds=[{path}]")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_statistics_that_are_no_regular_files_are_refused(refused, tmp_path, kind):
    small = ("--samples", 2, "--seqlen", 16, "--eval-windows", 2, "--out", tmp_path / "out")
    words = ("--model", "embedded", "--metric", "wanda", *small, "--statistics")
    path = make(tmp_path / "x.pth", kind)
    assert reason(kind) in refused(run_prune, *words, path)
    kept = tmp_path / "kept"
    (kept / "X").mkdir(parents=True)
    for name in ("statistics.json", "X/model.layers.0.self_attn.q_proj.safetensors"):
        path = make(kept / name, kind)
        assert reason(kind) in refused(run_prune, *words, kept)
        path.unlink()


# The folders of results and runs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pruning_recipe.json", "pruning_report.json"])
def test_papers_that_are_no_short_files_are_refused(refused, model, name, kind):
    for paper in ("pruning_recipe.json", "pruning_report.json"):
        (model / paper).write_text("{}")
    make(model / name, kind)
    message = refused(run_prune, "--verify", model, code=4)
    assert name in message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("request.json", kind) for kind in KINDS),
        *(("losses.json", kind) for kind in KINDS),
        ("result/model-00002-of-00005.safetensors", "pipe"),
        ("states/x.safetensors", "pipe"),
    ],
)
def test_unfinished_work_that_is_no_regular_files_is_refused(refused, tmp_path, name, kind):
    path = tmp_path / "out" / ".unfinished" / name
    path.parent.mkdir(parents=True)
    make(path, kind)
    small = ("--samples", 2, "--seqlen", 16, "--eval-windows", 2, "--out", tmp_path / "out")
    words = ("--model", "embedded", "--metric", "wanda", *small, "--resume")
    assert name.rpartition("/")[2] in refused(run_prune, *words, code=4)


@pytest.mark.parametrize("content", ['{"dense": "x"}', '{"dense": 5}', '{"dense": [null]}'])
def test_losses_that_were_altered_are_refused(refused, tmp_path, content):
    path = tmp_path / "out" / ".unfinished" / "losses.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    small = ("--samples", 2, "--seqlen", 16, "--eval-windows", 2, "--out", tmp_path / "out")
    words = ("--model", "embedded", "--metric", "wanda", *small, "--resume")
    assert "losses.json" in refused(run_prune, *words, code=4)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was killed before its first candidate."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(schema.to_yaml(schema.load(None, [])))
    return path


RUN_FILES = (
    *("journal.jsonl", "timings.jsonl", "environment.json", "checkpoint.json", "summary.json"),
    *("checkpoint.previous.json", "statistics.safetensors", "probe.safetensors"),
)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("option", ["--resume", "--report"])
def test_a_run_folder_with_something_else_than_files_is_refused(refused, run, option, name, kind):
    make(run / name, kind)
    message = refused(run_search, option, run, code=4)
    assert name in message
    assert reason(kind) in message


@pytest.mark.parametrize("name", [name for name in RUN_FILES if name.endswith(".json")])
def test_a_long_file_of_a_run_is_refused_before_any_work(refused, run, name):
    make(run / name, "large")
    message = refused(run_search, "--resume", run, code=4)
    assert name in message
    assert reason("large") in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_config_is_no_short_file_is_refused(refused, run, kind):
    make(run / "config.yaml", kind)
    assert "config.yaml" in refused(run_search, "--resume", run, code=2 if kind == "large" else 4)


def read_of(folder: RunFolder, name: str):
    """Return what reads a file of a run folder."""
    return {
        "journal.jsonl": folder.read_records,
        "timings.jsonl": folder.read_timings,
        "statistics.safetensors": lambda: folder.read_tensors("statistics.safetensors"),
    }.get(name, lambda: folder.read_json(name))


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
@pytest.mark.parametrize(
    "name", ["journal.jsonl", "timings.jsonl", "environment.json", "statistics.safetensors"]
)
def test_a_file_of_a_run_that_cannot_be_meant_is_refused(run, name, kind):
    folder = RunFolder.open_(run)
    make(run / name, kind)
    try:
        with pytest.raises(FolderError) as error:
            read_of(folder, name)()
    finally:
        folder.close()
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    if kind == "large":
        assert (run / name).stat().st_size == LARGE


def test_statistics_that_claim_what_they_have_not_are_refused(run):
    folder = RunFolder.open_(run)
    path = run / "statistics.safetensors"
    try:
        empty = tensor(shape=[0], data_offsets=[0, 0])["a"]
        many = {"a" * 2000 + str(i): empty for i in range(6_000)}
        for content in (header(b"{}", 2**60), header(b"[" * 1000), b"x", header(many)):
            path.write_bytes(content)
            with pytest.raises(FolderError, match=str(path)):
                folder.read_tensors(path.name)
        make(path, "large")
        with pytest.raises(FolderError, match=str(path)):
            folder.read_tensors(path.name)
        path.unlink()
        save_file({"a": torch.ones(2)}, path)
        assert list(folder.read_tensors(path.name)) == ["a"]
    finally:
        folder.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_no_short_file_is_refused(run, kind):
    path = make(run / "checkpoint.json", kind)
    with pytest.raises(ValueError, match="checkpoint"):
        read_state(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_no_short_file_gives_way_to_the_one_before(run, kind):
    folder = RunFolder.open_(run)
    try:
        state = State(committed=3)
        folder.write_checkpoint(state, state)
        folder.write_checkpoint(state, state)
        make(run / "checkpoint.json", kind)
        assert folder.read_checkpoint(3).committed == 3
    finally:
        folder.close()


# What must still be read


def test_the_embedded_model_is_as_before(refused):
    assert load_model("embedded", "float32").config.num_hidden_layers == 4
    assert len(load_tokenizer("embedded")) == 1024
    assert Path(source_of("embedded")[0]).is_dir()


def test_a_file_without_a_reader_may_be_anything(model):
    make(model / "optimizer.pt", "large")
    make(model / "notes.md", "pipe")
    load_model(str(model), "float32")
