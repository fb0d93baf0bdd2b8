"""What `run_search.py` says before any work: exit codes and one-line errors, offline."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import run_search
from configs import schema
from pruning.leaves import Statistics
from pruning.masks import GROUPS, Target, group_of
from pruning.models import load_config
from search import launch
from search.evolution import Settings
from search.fingerprint import Fingerprints, Probe
from search.population import Candidate, Record

CONFIGS = Path(schema.__file__).parent
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))

HUB_NOTE = "comes from the Hugging Face hub: not checked"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the console entry in an empty folder; returns exit code, output but memory, and error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["prunevolve-search", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_search.main()
        out, err = capsys.readouterr()
        # What workers hold has tests of its own, in test_memory_plan.py.
        lines = [line for line in out.splitlines(True) if not line.startswith("memory: ")]
        return end.value.code or 0, "".join(lines), err

    return run


@pytest.fixture
def refusal(call):
    """Run a command that must fail with a code; returns its one-line error."""

    def run(code, *words):
        found, out, err = call(*words)
        assert (found, out) == (code, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").removesuffix("\n")

    return run


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run that was killed before its first candidate."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(schema.to_yaml(schema.load(None, [])))
    return path


def setting(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


# --validate


def test_validate_says_which_configs_are_shipped():
    names = ("embedded", "llama2_7b", "paper", "smollm2_135m", "two_models")
    assert [f"{name}.yaml" for name in names] == SHIPPED


@pytest.mark.parametrize("words", [[], ["--config", CONFIGS / "paper.yaml"]])
def test_validate_checks_everything_of_an_embedded_experiment(call, words, tmp_path):
    assert call("--validate", *words) == (0, "valid\n", "")
    assert list(tmp_path.iterdir()) == []


def test_validate_says_what_of_llama2_it_could_not_check(call):
    code, out, err = call("--validate", "--config", CONFIGS / "llama2_7b.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"calibration: corpus 'c4', split 'train' {HUB_NOTE}",
        f"fitness: corpus 'wikitext2', split 'validation[:50%]' {HUB_NOTE}",
        f"selection: corpus 'wikitext2', split 'validation[50%:]' {HUB_NOTE}",
        f"report: corpus 'wikitext2', split 'test' {HUB_NOTE}",
        "model meta-llama/Llama-2-7b-hf: it comes from the Hugging Face hub: not checked",
        "valid",
    ]


def test_validate_names_the_command_that_builds_a_missing_smollm2(refusal):
    assert refusal(2, "--validate", "--config", CONFIGS / "smollm2_135m.yaml") == (
        "model 'models/smollm2-135m' is no folder: give embedded, a folder or a hub id "
        "(`make smollm2` builds it)"
    )


def test_validate_accepts_smollm2_once_its_folder_is_there(call, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(max_position_embeddings=2048, num_attention_heads=4, **shape)
    config.save_pretrained(tmp_path / "models/smollm2-135m")
    code, out, _ = call("--validate", "--config", CONFIGS / "smollm2_135m.yaml")
    assert code == 0
    assert [line.rpartition(" comes ")[2] for line in out.splitlines()[:4]] == [
        "from the Hugging Face hub: not checked"
    ] * 4
    assert out.splitlines()[4:] == ["valid"]


def test_validate_asks_nothing_of_the_hub_about_a_hub_id(call):
    code, out, _ = call("--validate", *setting("model=facebook/opt-125m"))
    assert code == 0
    assert out == (
        "model facebook/opt-125m: it comes from the Hugging Face hub: not checked\nvalid\n"
    )


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "/nowhere", "~/nowhere", "models/x"])
def test_validate_refuses_a_model_that_is_neither_a_folder_nor_a_hub_id(refusal, model):
    expected = f"model '{model}' is no folder: give embedded, a folder or a hub id"
    assert refusal(2, "--validate", *setting(f"model={model}")) == expected


def test_validate_refuses_a_folder_without_a_model(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(2, "--validate", *setting("model=empty"))
    assert message.startswith("model 'empty' cannot be loaded: give 'embedded'")


def test_validate_refuses_overlapping_texts_and_says_the_way_out(refusal):
    assert refusal(2, "--validate", *setting("report.split=selection")) == (
        "selection and report overlap: embedded selection and embedded selection: "
        "give disjoint texts, or set allow_test_selection: true"
    )
    assert refusal(2, "--validate", *setting("fitness.split=calibration[50%:]")).startswith(
        "calibration and fitness overlap: embedded calibration and embedded calibration[50%:]: "
    )


def test_validate_lets_texts_overlap_where_the_config_says_so(call):
    allowed = setting("report.split=selection", "allow_test_selection=true")
    assert call("--validate", *allowed) == (0, "valid\n", "")


def test_validate_takes_slices_of_one_text_as_disjoint(call):
    halves = setting("fitness.split=selection[:50%]", "selection.split=selection[50%:]")
    assert call("--validate", *halves) == (0, "valid\n", "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fitness.split=dev", "split of corpus 'embedded' must be one of "),
        ("fitness.split=fitness[60%:40%]", "split must be name, "),
        ("fitness.corpus=wikitext", "corpus must be one of "),
        ("fitness.corpus=missing.txt", "corpus file 'missing.txt' is not there; looked at "),
        ("search.seeds=[wandaa]", "metric 'wandaa' is no known name: did you mean wanda? or give "),
        ("search.seeds=[magnitude, 'mul(W']", "metric "),
        ("search.seeds=[X]", "metric 'X' gives every row the same scores: "),
        ("search.seeds=['div(X, W)']", "metric 'div(X, W)' gives every row the same scores: "),
        ("search.seeds=[best.json]", "metric 'best.json' looks like a file and there is no such "),
    ],
)
def test_validate_refuses_texts_and_seeds_that_cannot_be_used(refusal, override, message):
    assert refusal(2, "--validate", *setting(override)).startswith(message)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
def test_validate_reads_a_pattern_as_it_is_written(call, pattern):
    assert call("--validate", *setting(f"pruning.pattern={pattern}")) == (0, "valid\n", "")


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4"])
def test_validate_refuses_a_pattern_that_keeps_all_or_none(refusal, pattern):
    assert refusal(2, "--validate", *setting(f"pruning.pattern={pattern}")) == (
        f"pattern must be unstructured or n:m with 0 < n < m <= 1024, got '{pattern}'"
    )


@pytest.mark.parametrize("pattern", ["2-4", "n:m", "2:4:8", "half"])
def test_validate_refuses_a_malformed_pattern(refusal, pattern):
    message = refusal(2, "--validate", *setting(f"pruning.pattern={pattern}"))
    assert f"pruning.pattern = '{pattern}': String should match pattern" in message


def test_validate_refuses_a_pattern_that_does_not_divide_the_layers(refusal):
    assert refusal(2, "--validate", *setting("pruning.pattern=3:7")) == (
        "pattern must divide the inputs of every layer, got 7 of 192 in "
        "model.layers.0.self_attn.q_proj"
    )


def test_validate_refuses_a_stage_at_or_beyond_the_last_fitness_window(refusal, call):
    assert refusal(2, "--validate", *setting("search.stages=[2, 32]")) == (
        "search.stages must be below fitness.windows = 32, got [2, 32]"
    )
    assert call("--validate", *setting("search.stages=[2, 31]"))[0] == 0


def test_validate_refuses_windows_longer_than_the_context(refusal):
    limit = load_config("embedded").max_position_embeddings
    assert refusal(2, "--validate", *setting(f"report.length={limit + 1}")) == (
        f"report.length must be at most the model's {limit} positions, got {limit + 1}"
    )


def test_validate_checks_every_task(refusal, call):
    limit = load_config("embedded").max_position_embeddings
    long = f"{{corpus: embedded, split: report, windows: 2, length: {limit + 1}}}"
    few = "{corpus: embedded, split: fitness, windows: 4, length: 64}"
    for task, message in {
        "{pattern: '4:2'}": "pattern must be unstructured or n:m with 0 < n < m <= 1024, ",
        "{pattern: '3:7'}": "pattern must divide the inputs of every layer, got 7 of 192 in ",
        "{model: nowhere}": "model 'nowhere' is no folder: give embedded, a folder or a hub id",
        f"{{fitness: {few}}}": "search.stages must be below fitness.windows = 4, got [2, 4, 8, 16]",
        f"{{report: {long}}}": f"report.length must be at most the model's {limit} positions, got ",
    }.items():
        assert refusal(2, "--validate", *setting(f"tasks=[{{}}, {task}]")).startswith(message)
    assert call("--validate", *setting("tasks=[{}, {pattern: '2:4'}]")) == (0, "valid\n", "")


def test_validate_refuses_texts_that_overlap_across_tasks(refusal, call):
    half = "{corpus: embedded, split: 'report[%s]', windows: 4, length: 64}"
    tasks = f"tasks=[{{}}, {{selection: {half % ':50%'}, report: {half % '50%:'}}}]"
    # The second task selects on a half of what the first reports.
    message = refusal(2, "--validate", *setting(tasks))
    assert message.startswith("selection and report overlap: embedded report[:50%] and embedded ")
    allowed = setting(tasks, "allow_test_selection=true")
    assert call("--validate", *allowed) == (0, "valid\n", "")


def test_validate_says_once_what_several_tasks_share(call):
    _, out, _ = call("--validate", *setting("tasks=[{}, {sparsity: 0.3}]", "model=facebook/opt"))
    assert out.count("model facebook/opt: it comes from the Hugging Face hub") == 1


def test_validate_refuses_an_unknown_key_and_guesses(refusal):
    assert refusal(2, "--validate", *setting("search.candidate=5")) == (
        f"config {schema.DEFAULT}: search.candidate is an unknown key; did you mean candidates?"
    )


def test_validate_returns_its_notes_to_a_program():
    assert launch.validate(schema.load(None, [])) == []
    hub = schema.load(None, ["report.corpus=ptb", "report.split=test"])
    assert launch.validate(hub) == [f"report: corpus 'ptb', split 'test' {HUB_NOTE}"]


# From a config to the loop's knobs


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [
        (["pruning.group=free"], GROUPS),
        (["pruning.group=layer"], ("layer",)),
        (["pruning.group=free", "pruning.pattern=2:4"], ("row",)),
        (["pruning.group=layer", "pruning.pattern=2:4"], ("row",)),
        (["tasks=[{pattern: '2:4'}, {pattern: '4:8'}]"], ("row",)),
        (["tasks=[{pattern: '2:4'}, {sparsity: 0.5}]"], GROUPS),
        (["pruning.pattern=2:4", "tasks=[{pattern: unstructured}, {}]"], GROUPS),
    ],
)
def test_groups_of_a_config_are_row_alone_where_all_tasks_have_a_pattern(overrides, groups):
    assert launch.groups_of(schema.load(None, overrides)) == groups


def settings(*overrides: str) -> Settings:
    """Of a config, with a probe of two rows on which W and neg(W) have opposite masks."""
    weights = {"a": torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]])}
    probe = Probe(weights, Statistics())
    fingerprints = Fingerprints([(probe, lambda group: Target(0.5, group_of(group)))])
    return launch.settings_of(schema.load(None, list(overrides)), fingerprints)


def test_settings_of_a_config_share_the_kept_places_among_the_groups():
    shares = ["search.population=50", "search.speciation=0.25"]
    # A quarter of 50 is 12.5: four for each of three, twelve for one.
    assert settings(*shares).rules.kept == 4
    assert settings(*shares, "pruning.group=row").rules.kept == 12
    assert settings("search.speciation=0").rules.kept == 0
    assert settings("search.population=7", "search.speciation=1").rules.kept * 3 <= 7


def test_settings_of_a_config_take_every_knob_of_survival():
    knobs = ("parsimony=0.5", "patience=9", "lag=3", "population=20")
    rules = settings(*(f"search.{knob}" for knob in knobs)).rules
    assert (rules.resolution, rules.patience, rules.lag, rules.capacity) == (0.5, 9, 3, 20)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.crowding=0.1", [True, False, False]),
        ("search.crowding=0.6", [True, True, False]),
        ("search.crowding=0", [False, False, False]),
        ("search.fingerprint=false", [False, False, False]),
    ],
)
def test_settings_of_a_config_find_masks_near_below_the_crowding(override, expected):
    near = settings(override).rules.near
    record = Record(0, "W", "row", "evaluated", 2.0, "ab12", 64, (), "")
    # One mask, a half of the weights otherwise, all of them otherwise.
    others = [("sqr(W)", "row"), ("W", "layer"), ("neg(W)", "row")]
    assert [near(Candidate(1, *other), record) for other in others] == expected


def test_settings_of_a_config_read_its_seeds_with_their_groups():
    found = settings("search.seeds=[snip, 'layer:W']").seeds
    assert [(metric.text, group) for metric, group in found] == [
        *(("mul(W, G)", "model"), ("W", "layer")),
    ]


# Launch: what is refused before a folder is made


@pytest.mark.parametrize(
    "override", ["report.split=selection", "model=nowhere", "search.seeds=[X]", "searching.x=1"]
)
def test_launch_leaves_no_folder_behind_where_the_config_is_wrong(refusal, tmp_path, override):
    refusal(2, "--out", "run", *setting(override))
    assert list(tmp_path.iterdir()) == []


def test_launch_leaves_no_folder_behind_where_a_text_is_too_short(refusal, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    message = refusal(2, "--out", "run", *setting("fitness.corpus=short.txt", "fitness.split=all"))
    assert "'short.txt'" in message
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_launch_refuses_a_folder_that_is_not_empty(refusal, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert refusal(4, "--out", "run") == (
        "--out run is not an empty folder: name another, or --resume run"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_launch_refuses_a_config_that_is_not_there(refusal):
    expected = "config missing.yaml cannot be read: No such file or directory"
    assert refusal(2, "--config", "missing.yaml") == expected


# --resume and --report


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "c.yaml"],
        ["--out", "elsewhere"],
        ["--validate"],
        ["--report", "run"],
        ["--report", "run", "--set", "search.candidates=5"],
    ],
)
def test_resume_refuses_other_options(refusal, run_folder, words):
    assert refusal(2, "--resume", "run", *words) == (
        "--resume takes its config and folder from the run: only --set goes with it"
    )


@pytest.mark.parametrize(
    "words", [["--config", "c.yaml"], ["--out", "x"], ["--validate"], ["--set", "search.seed=1"]]
)
def test_report_refuses_other_options(refusal, run_folder, words):
    assert refusal(2, "--report", "run", *words) == "--report takes no other option"


@pytest.mark.parametrize("option", ["--resume", "--report"])
def test_resume_and_report_refuse_a_folder_that_is_no_run(refusal, tmp_path, option):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        expected = f"{name} is not a run folder: it has no config.yaml"
        assert refusal(4, option, name) == expected
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "override",
    [
        *("search.seed=1", "pruning.sparsity=0.7", "search.lag=0", "model=x", "ray=null"),
        "memory.statistics=bfloat16",
    ],
)
def test_resume_refuses_to_make_the_run_another_search(refusal, run_folder, override):
    before = (run_folder / "config.yaml").read_text()
    assert refusal(4, "--resume", "run", "--set", override) == (
        f"--set {override} would make run another search: a resumed run takes search.candidates, "
        "ray.*, memory.master and memory.scores alone"
    )
    assert (run_folder / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("search.candidates=0", "search.candidates = '0': Input should be greater than or equal"),
        ("search.candidatesx=9", "search.candidatesx is an unknown key; did you mean candidates?"),
        ("ray.worker=1", "ray.worker is an unknown key; did you mean workers?"),
        ("search.candidates", "--set takes key.path=value, got 'search.candidates'"),
    ],
)
def test_resume_refuses_an_override_that_is_wrong_in_itself(refusal, run_folder, override, problem):
    assert problem in refusal(2, "--resume", "run", "--set", override)


def test_resume_refuses_fewer_candidates_than_the_run_has(refusal, run_folder):
    line = (
        '{{"index": {0}, "metric": "W", "group": "model", "outcome": "duplicate", '
        '"fitness": null, "fingerprint": null, "tokens": 0, "parents": [], "reason": ""}}\n'
    )
    journal = "".join(line.format(index) for index in range(3))
    (run_folder / "journal.jsonl").write_text(journal)
    assert refusal(4, "--resume", "run", "--set", "search.candidates=2") == (
        "search.candidates = 2 is below the 3 that run has: give more"
    )


def test_resume_refuses_a_damaged_journal(refusal, run_folder):
    (run_folder / "journal.jsonl").write_text("{}\n")
    message = refusal(4, "--resume", "run")
    assert message == "run/journal.jsonl line 1 is damaged: not a journal record: {}"


def test_report_refuses_a_run_that_has_not_ended(refusal, run_folder):
    message = refusal(4, "--report", "run")
    assert message.startswith("run/summary.json cannot be read: ")
    assert [path.name for path in run_folder.iterdir()] == ["config.yaml"]


def test_usage_errors_of_the_command_line_exit_with_2(call):
    code, _, err = call("--configuration", "x")
    assert code == 2
    assert "No such option" in err
