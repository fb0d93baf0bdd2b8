"""A whole search on the embedded model, in this process: its files, its table, its exit codes."""

import json
import math
import shutil
from contextlib import closing

import pytest
from safetensors import safe_open
from search_process import started

from prunevolve import run_search
from prunevolve.configs import schema
from prunevolve.evaluation.perplexity import window_losses
from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.masks import NOfM, Target, group_of
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.models import load_model
from prunevolve.pruning.parse import read_tree, resolve_metric
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.recipe import Recipe
from prunevolve.pruning.store import ResidentStore
from prunevolve.pruning.stream import Texts
from prunevolve.search import launch
from prunevolve.search.breeding.seeds import read_seeds
from prunevolve.search.experiment import resolve
from prunevolve.search.population import read_state
from prunevolve.search.results import next_step
from prunevolve.search.run_folder import RunFolder
from prunevolve.search.summary import Gap, Summary

SMALL = [
    *("pruning.group=row", "search.primitives=release", "search.brood=1"),
    *("ray.workers=0", "search.candidates=16", "search.population=6", "search.stages=[1]"),
    *("fitness.windows=3", "fitness.length=32", "calibration.windows=2", "calibration.length=32"),
    *("selection.windows=3", "selection.length=32", "report.windows=3", "report.length=32"),
]


def search(out, *more):
    return started(run_search, "--out", out, *(f"--set={one}" for one in [*SMALL, *more]))[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "run"
    out.with_suffix(".printed").write_text(search(out))
    return out


@pytest.fixture(scope="module")
def on_two_tasks(finished, tmp_path_factory):
    """A run on two tasks that began with another run's metrics, and what it printed."""
    folder = tmp_path_factory.mktemp("two-tasks")
    shutil.copytree(finished, folder / "another")
    tasks = "tasks=[{pattern: 2:4, weight: 3}, {sparsity: 0.5}]"
    with pytest.MonkeyPatch.context() as patch:
        # On so few windows many would be hopeless in one of the two.
        patch.setattr("prunevolve.search.evaluator.HOPELESS", 100.0)
        printed = search(folder / "run", tasks, f"search.seeds=[{folder / 'another'}, wanda]")
    shutil.rmtree(folder / "another")
    return folder / "run", printed


@pytest.fixture(scope="module")
def chosen_elsewhere(tiny_llama_dir, tmp_path_factory):
    """A run without units whose winner was chosen on a model that the search did not see."""
    folder = tmp_path_factory.mktemp("elsewhere")
    more = [
        *("pruning.group=model", "search.units=required", "search.primitives=extended"),
        f"selection.model={tiny_llama_dir}",
    ]
    search(folder / "run", *more)
    return folder / "run"


def read(path):
    return json.loads(path.read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_journal_and_timings_have_a_line_a_candidate_with_the_agreed_keys(finished):
    lines, timings = (lines_of(finished / name) for name in ("journal.jsonl", "timings.jsonl"))
    assert len(lines) == 16
    assert {line["outcome"] for line in lines} >= {"evaluated", "duplicate"}
    for index, (line, timing) in enumerate(zip(lines, timings, strict=True)):
        assert line["index"] == timing["index"] == index
        assert list(line) == [
            *("index", "metric", "group", "outcome", "fitness", "fingerprint", "tokens"),
            *("parents", "reason", "estimate", "rises"),
        ]
        assert (line["fitness"] is None) == (line["outcome"] != "evaluated")
        if line["outcome"] in ("evaluated", "stopped"):
            assert list(timing) == ["index", "seconds", "peak_mib", "worker"]
            assert timing["seconds"] > 0
            assert timing["peak_mib"] > 50  # torch alone is more
            assert timing["worker"] == 1
        elif line["outcome"] == "duplicate":
            assert list(timing) == ["index"]


def test_best_metric_is_one_of_the_evaluated_and_can_be_applied(finished):
    best = read(finished / "best_metric.json")
    assert set(best) == {
        *("schema", "metric", "tree", "group", "leaves", "fitness", "size", "provenance")
    }
    assert read_tree(best["tree"]).text == best["metric"]
    resolved = resolve_metric(str(finished / "best_metric.json"))
    assert resolved.criterion == Criterion.parse(best["metric"], best["group"])
    assert (best["metric"], best["group"], best["fitness"]) in [
        (line["metric"], line["group"], line["fitness"])
        for line in lines_of(finished / "journal.jsonl")
        if line["outcome"] == "evaluated"
    ]


def test_summary_measures_dense_baselines_best_and_diversity(finished):
    summary = read(finished / "summary.json")
    assert set(summary["baselines"]) == set(BASELINES)
    assert set(summary["best"]) >= {"metric", "perplexity", "fitness"}
    assert summary["dense"] < summary["best"]["perplexity"]
    assert sum(summary["outcomes"].values()) == summary["candidates"] == 16
    assert summary["seconds"] > 0
    diversity = summary["diversity"]
    assert 1 <= diversity["masks"] <= diversity["members"] <= 6
    assert 0 < diversity["mean_distance"] < 1
    (task,) = summary["tasks"]
    assert [task[key] for key in ("name", "pattern", "weight")] == [
        *("embedded 60%", "unstructured", 1.0)
    ]
    assert "tasks" not in read(finished / "best_metric.json")["provenance"]


def test_summary_of_two_tasks_measures_each(on_two_tasks):
    tasks = read(on_two_tasks[0] / "summary.json")["tasks"]
    named = [(task["name"], task["pattern"], repr(task["weight"])) for task in tasks]
    # An integer weight would become a float when a resume reads the config back.
    assert named == [("embedded 2:4", "2:4", "3.0"), ("embedded 50%", "unstructured", "1.0")]
    provenance = read(on_two_tasks[0] / "best_metric.json")["provenance"]["tasks"]
    assert [(one["name"], one["pattern"], repr(one["weight"])) for one in provenance] == named
    for task in tasks:
        assert set(task["baselines"]) == set(task["behind_best"]) == set(BASELINES)
        assert task["dense"] < task["best"]["perplexity"]
    two_of_four, half = tasks
    assert half["dense"] == two_of_four["dense"]
    assert half["best"] != two_of_four["best"]
    assert half["baselines"]["wanda"] != two_of_four["baselines"]["wanda"]


def test_winner_is_the_best_on_the_selection_texts(finished, on_two_tasks):
    for run in (finished, on_two_tasks[0]):
        summary = read(run / "summary.json")
        standings = summary["selection"]
        losses = [one["selection_loss"] for one in standings]
        assert len(losses) > 1
        assert losses == sorted(losses)
        assert standings[0]["metric"] == summary["best"]["metric"]
        for one in standings:
            assert one["difference"] == pytest.approx(one["selection_loss"] - losses[0], abs=1e-9)


def test_selection_loss_of_two_tasks_is_their_mean_relative_rise_by_weight(on_two_tasks):
    winner = read(on_two_tasks[0] / "summary.json")["selection"][0]
    experiment = resolve(schema.load(on_two_tasks[0] / "config.yaml", []))
    (windows,) = experiment.read_texts().windows
    text = windows["selection"].tokens
    dense = window_losses(ResidentStore(load_model("embedded", "float32")), text)

    def rise(criterion, pattern):
        store = ResidentStore(load_model("embedded", "float32"))
        recipe = Recipe(criterion.metric, Target(0.5, pattern or group_of(criterion.group)))
        prune(store, recipe, Texts(windows["calibration"].tokens))
        rises = window_losses(store, text) - dense
        return rises.mean().item(), rises.std().item() / math.sqrt(len(rises))

    best = Criterion.parse(winner["metric"], winner["group"])
    relative = []
    for pattern in (None, NOfM(2, 4)):
        unit = max(min(rise(baseline.criterion, pattern) for baseline in BASELINES.values()))
        relative.append(rise(best, pattern)[0] / unit)
    expected = (1 * relative[0] + 3 * relative[1]) / 4
    assert winner["selection_loss"] == pytest.approx(expected, rel=1e-4)


def test_report_of_two_tasks_says_what_the_best_is_beside_the_best_baseline(on_two_tasks):
    out, printed = on_two_tasks
    assert printed.count("│ best found ") == 2
    # The first is what the result is applied to.
    assert "--pattern 2:4 --corpus" in (out / "report.html").read_text(encoding="utf-8")
    for task, pruned in zip(
        read(out / "summary.json")["tasks"], ("2:4", "50% unstructured"), strict=True
    ):
        assert f"perplexity at {pruned} on embedded report: 3 windows of 32" in printed
        (cell,) = task["by_text"]
        assert (cell["text"], cell["dense"]) == ("embedded", task["dense"])
        assert cell["named_perplexity"] == min(task["baselines"].values())
        assert cell["perplexity"] == pytest.approx(task["best"]["perplexity"])
        assert f"{cell['relative_rise']:.3f}" in printed
        assert f"{cell['relative_rise']:.3f}" in (out / "report.html").read_text()


def test_winner_is_chosen_on_a_model_that_the_search_does_not_see(chosen_elsewhere, tiny_llama_dir):
    run = chosen_elsewhere
    summary = read(run / "summary.json")
    assert [(task["weight"], task["model"]) for task in summary["tasks"]] == [
        (1.0, "embedded"),
        (0.0, str(tiny_llama_dir)),
    ]
    lines = lines_of(run / "journal.jsonl")
    assert {len(line["rises"]) for line in lines if line["rises"]} == {1}
    assert all(Metric.parse(line["metric"]).is_comparable for line in lines)
    standings = summary["selection"]
    assert summary["best"]["metric"] == standings[0]["metric"]
    (text,) = resolve(schema.load(run / "config.yaml", [])).read_texts().windows[1:]

    def losses(criterion):
        store = ResidentStore(load_model(str(tiny_llama_dir), "float32"))
        target = Target(0.6, group_of(criterion.group))
        prune(store, Recipe(criterion.metric, target), Texts(text["calibration"].tokens))
        return window_losses(store, text["selection"].tokens).mean().item()

    # One task and one kind of text: the loss itself, as for any single cell.
    for one in standings[:3]:
        criterion = Criterion.parse(one["metric"], one["group"])
        assert one["selection_loss"] == pytest.approx(losses(criterion), rel=1e-5)


def test_run_seeded_from_another_begins_with_its_metrics_and_outlives_it(finished, on_two_tasks):
    out, _ = on_two_tasks
    best = read(finished / "best_metric.json")
    others = read_state(finished / "checkpoint.json").finalists(100)
    expected = [
        (best["metric"], best["group"]),
        *((one.criterion.text, one.criterion.group) for one in others),
    ]
    expected = [*dict.fromkeys(expected), ("mul(W, sqrt(X))", "row")]
    bred = [(line["metric"], line["group"]) for line in lines_of(out / "journal.jsonl")]
    assert len(expected) > 2
    assert bred[: len(expected)] == expected
    assert "another" not in (out / "config.yaml").read_text()
    seeds = read_seeds(schema.load(out / "config.yaml", []).search.seeds, "row")
    assert [(seed.text, seed.group) for seed in seeds] == expected


def test_best_of_another_run_is_a_seed_though_it_is_younger_than_the_checkpoint(finished, tmp_path):
    for name in ("checkpoint.json", "best_metric.json"):
        shutil.copy(finished / name, tmp_path)
    newest = Metric.parse("mul(W, sqrt(sqrt(mul(X, G))))")
    best = tmp_path / "best_metric.json"
    changed = {"metric": newest.text, "tree": newest.to_release_json(), "group": "layer"}
    best.write_text(json.dumps(read(best) | changed))
    older = read_seeds([str(tmp_path / "checkpoint.json")], "row")
    assert read_seeds([str(tmp_path)], "row") == [Criterion(newest, "row"), *older]


def test_status_tells_where_a_finished_run_stands(finished, call):
    out, _ = call("--status", finished)
    assert out.startswith(f"{finished}: finished, as of ")
    best = read_state(finished / "checkpoint.json").best
    assert "candidates: 16/16\n" in out
    assert f"best {best.fitness:.4f} nats/token\n" in out
    assert f"best: {best.criterion.text}, group {best.criterion.group}\n" in out
    status = read(finished / "status.json")
    assert (status["candidates"], status["of"]) == (16, 16)
    assert sum(status["outcomes"].values()) == 16
    known = status["known"]
    assert list(known) == ["dense", read(finished / "scale.json")["cells"][0]["named"]]
    assert known["dense"] == min(known.values())


def test_report_can_be_rebuilt_and_is_partial_while_a_run_is_extended(finished, tmp_path, call):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "report.html").unlink()
    out, _ = call("--report", run)
    assert out == f"wrote {run / 'report.html'} and fitness.svg\n"
    assert (run / "report.html").exists() and (run / "fitness.svg").exists()
    one_more = {**lines_of(run / "journal.jsonl")[-1], "index": 16}
    with (run / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps(one_more) + "\n")
    assert "partial" in call("--report", run)[0]


def test_report_of_a_run_that_goes_on_is_partial_and_leaves_it_its_lock(finished, tmp_path, call):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("summary.json", "report.html"):
        (run / name).unlink()
    lines = (run / "journal.jsonl").read_bytes()
    (run / "journal.jsonl").write_bytes(lines[:-7])
    with closing(RunFolder.open_(run)):  # as a search that works in it
        out, _ = call("--report", run)
        assert (run / ".lock").exists()
    assert out.endswith(" and fitness.svg: partial, because the run has not ended\n")
    page = (run / "report.html").read_text()
    assert "This run has not ended: the report shows its first 15 candidates." in page
    assert "has not ended" not in (finished / "report.html").read_text()
    assert (run / "journal.jsonl").read_bytes() == lines[:-7]


def test_resume_of_a_finished_run_says_so_measuring_nothing(finished, tmp_path, monkeypatch, call):
    run = shutil.copytree(finished, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(launch, "_ready", None)  # what would read the texts
    out, _ = call("--resume", run)
    assert out.splitlines()[:3] == [
        f"{run} is finished: all 16 candidates are evaluated and the result is measured; breed "
        f"more: python run_search.py --resume {run} --set search.candidates=N",
        f"report: {run / 'report.html'}",
        f"metric: {run / 'best_metric.json'}",
    ]
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_json_of_a_finished_run_is_one_object_with_its_result(finished, call):
    out, err = call("--json", "--resume", finished)
    told, summary = json.loads(out), read(finished / "summary.json")
    assert (told["exit"], told["ending"]) == (0, "finished before")
    assert told["folder"] == str(finished)
    assert told["files"]["report"] == str(finished / "report.html")
    for key in ("verdict", "dense", "baselines", "best", "candidates", "outcomes"):
        assert told[key] == summary[key]
    assert "is finished" in err


def test_end_is_a_table_a_verdict_and_where_everything_is(finished):
    printed = finished.with_suffix(".printed").read_text()
    summary = read(finished / "summary.json")
    assert "perplexity at 60% unstructured on embedded report: 3 windows of 32" in printed
    for name in ("dense", "best found", *BASELINES):
        assert f"│ {name} " in printed
    *_, verdict, report, metric, last = printed.splitlines()
    assert verdict == f"verdict: {summary['verdict']}"
    assert report == f"report: {finished / 'report.html'}"
    assert metric == f"metric: {finished / 'best_metric.json'}"
    # Sixteen candidates do not win.
    way_on = f"python run_search.py --resume {finished} --set search.candidates=32"
    assert last == f"it did not clearly win: search on with {way_on}"
    found = {"models": ["embedded"], "removed": ["60%"]}
    assert read(finished / "best_metric.json")["provenance"]["found"] == found


def test_winner_is_to_be_applied_where_it_was_found(finished):
    folder = RunFolder.look(finished)
    summary = folder.read_model("summary.json", Summary)
    (task,) = summary.tasks
    gaps = {name: Gap(nats=1.0, standard_error=0.1) for name in task.behind_best}
    won = summary.model_copy(update={"tasks": (task.model_copy(update={"behind_best": gaps}),)})
    line = next_step(finished, schema.load(finished / "config.yaml", []), won)
    assert line.startswith("apply it: python run_prune.py --model embedded --metric ")
    assert f"--metric {finished / 'best_metric.json'} --sparsity 0.6" in line


def test_every_step_says_how_far_it_came(finished):
    printed = finished.with_suffix(".printed").read_text()
    for line in (
        "starting the first worker\n",
        "collecting statistics of embedded on 64 tokens\n",
        "dense and named metrics: 7/7 (",
        "candidates: 16/16 (",
        "finalists: ",
        "report: 8/8 (",
        "drawing the report\n",
    ):
        assert line in printed


def test_finished_run_can_be_extended(finished, tmp_path, call):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (finished / "journal.jsonl").read_bytes()
    call("--resume", run, "--set", "search.candidates=18")
    after = (run / "journal.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(after.splitlines()) == 18


def extended(run, call):
    """Extend a run by four candidates; return its journal and what was printed."""
    out, _ = call("--resume", run, "--set", "search.candidates=20")
    return (run / "journal.jsonl").read_bytes(), out


def test_resume_replays_the_journal_where_the_checkpoint_is_of_no_use(
    finished, on_two_tasks, tmp_path, call
):
    another = (on_two_tasks[0] / "checkpoint.json").read_bytes()
    runs = {
        name: shutil.copytree(finished, tmp_path / name)
        for name in ("used", "deleted", "damaged", "another's")
    }
    (runs["deleted"] / "checkpoint.json").unlink()
    (runs["damaged"] / "checkpoint.json").write_bytes(another[:-20])
    (runs["another's"] / "checkpoint.json").write_bytes(another)
    results = {name: extended(run, call) for name, run in runs.items()}
    assert results["used"][0].startswith((finished / "journal.jsonl").read_bytes())
    assert {journal for journal, _ in results.values()} == {results["used"][0]}
    replayed = ": all of the journal is replayed\n"
    path = runs["damaged"] / "checkpoint.json"
    damaged = f"warning: checkpoint {path} is damaged, or from another version{replayed}"
    assert damaged in results["damaged"][1]
    unfit = f"warning: checkpoint.json does not fit the journal{replayed}"
    assert unfit in results["another's"][1]
    assert "replayed" not in results["used"][1] + results["deleted"][1]


def test_search_in_which_nothing_was_evaluated_exits_5(tmp_path, monkeypatch, call):
    monkeypatch.setattr("prunevolve.search.evaluator.HOPELESS", 1e-9)
    few = [*SMALL, "search.candidates=4", "tasks=[{}, {sparsity: 0.3}]"]
    out, _ = call("--out", tmp_path / "run", *(f"--set={setting}" for setting in few), code=5)
    assert "error: no candidate was evaluated to the end; breed more: " in out


def test_special_tokens_in_the_calibration_text_are_warned_about(marked, tmp_path):
    model, text = marked
    settings = (f"model={model}", f"calibration.corpus={text}", "calibration.split=all")
    printed = search(tmp_path / "run", *settings, "search.candidates=2")
    assert f"warning: {model}: " in printed
    assert "of the calibration tokens are special ones such as ~, which" in printed


def test_extended_primitives_collect_their_statistics_and_breed_from_them(tmp_path):
    seeds = "search.seeds=[ria, 'mul(W, add(V, mul(0.5, B)))', wifv]"
    search(tmp_path / "run", "search.primitives=extended", seeds)
    with safe_open(tmp_path / "run/statistics.safetensors", "pt") as tensors:
        assert {key.partition("/")[0] for key in tensors.keys()} == set("BDGHIMVX")  # noqa: SIM118
    lines = lines_of(tmp_path / "run/journal.jsonl")
    assert [line["outcome"] for line in lines[:3]] == ["evaluated"] * 3
    named = set().union(*(Metric.parse(line["metric"]).leaves for line in lines))
    assert named & {"V", "B"}
    assert not any("is None: pass it" in line["reason"] for line in lines)


def test_print_config_shows_the_resolved_config_and_does_nothing_else(tmp_path, call):
    words = ("--config", "two_models", "--set", "search.seed=4", "--print-config")
    expected = schema.to_yaml(schema.load("two_models", ["search.seed=4"]))
    assert call(*words) == (expected, "")
    assert list(tmp_path.iterdir()) == []
