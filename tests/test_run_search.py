"""A whole search on the embedded model, in this process: its files, its table, its exit codes."""

import csv
import json
import re
import shutil
from contextlib import closing
from functools import partial

import pytest
import torch
from safetensors import safe_open
from search_process import assert_same, started
from toy_models import change_weights
from toy_setup import small

from prunevolve import evolve, resume
from prunevolve.configs import schema
from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.parse import resolve_metric
from prunevolve.search import command as run_search
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.finalists import ROLES
from prunevolve.search.run_folder import RunFolder

SMALL = [
    *("pruning.group=row", "search.primitives=release"),
    *("ray.workers=0", "search.candidates=16", "search.population=6", "search.stages=[1]"),
    *(*small(3), "calibration.windows=2"),
]


def search(out, *more, code=0):
    settings = [f"--set={one}" for one in (*SMALL, *more)]
    return started(run_search, "--out", out, *settings, code=code)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "run"
    search(out)
    return out


@pytest.fixture(scope="module")
def on_two_tasks(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("two-tasks") / "run"
    tasks = "tasks=[{pattern: 2:4, weight: 3}, {sparsity: 0.5}]"
    printed, _ = search(out, tasks, f"search.seeds=[{finished}, wanda]", "tensorboard=true")
    return out, printed


@pytest.fixture(scope="module")
def extended(tiny_llama_dir, tmp_path_factory):
    """A search in the extended set, whose winner is chosen on another model."""
    out = tmp_path_factory.mktemp("extended") / "run"
    seeds = "search.seeds=[ria, 'mul(W, add(V, mul(0.5, B)))', wifv, sparsegpt]"
    more = ("pruning.group=model", "search.units=required", "search.primitives=extended", seeds)
    printed, _ = search(out, *more, "search.candidates=8", f"selection.model={tiny_llama_dir}")
    return out, printed


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def read(path):
    return json.loads(path.read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_journal_and_timings_have_a_line_a_candidate(finished):
    lines, timings = (lines_of(finished / f"{name}.jsonl") for name in ("journal", "timings"))
    assert len(lines) == 16
    assert {line["outcome"] for line in lines} >= {"evaluated", "duplicate"}
    for index, (line, timing) in enumerate(zip(lines, timings, strict=True)):
        assert line["index"] == timing["index"] == index
        assert (line["fitness"] is None) == (line["outcome"] != "evaluated")
        measured = line["outcome"] in ("evaluated", "stopped")
        assert (timing.get("seconds", 0) > 0) == (timing.get("worker") == 1) == measured


def test_summary_measures_dense_baselines_and_best_on_each_task_and_the_end_shows_it(on_two_tasks):
    out, printed = on_two_tasks
    summary = read(out / "summary.json")
    tasks = summary["tasks"]
    assert sum(summary["outcomes"].values()) == summary["candidates"] == 16
    named = [(task["name"], task["pattern"], repr(task["weight"])) for task in tasks]
    # An integer weight would become a float when a resume reads the config back.
    assert named == [("embedded 2:4", "2:4", "3.0"), ("embedded 50%", "unstructured", "1.0")]
    page = (out / "report.html").read_text(encoding="utf-8")
    # The first is what the result is applied to.
    assert "<span>--pattern</span> 2:4 <span>--corpus</span>" in page
    for task in tasks:
        assert set(task["baselines"]) == set(task["behind_best"]) == set(BASELINES)
        assert task["dense"] < task["best"]["perplexity"]
        (cell,) = task["by_text"]
        assert (cell["text"], cell["dense"]) == ("embedded", task["dense"])
        assert cell["named_perplexity"] == min(task["baselines"].values())
        assert cell["perplexity"] == pytest.approx(task["best"]["perplexity"])
        rise = f"{cell['relative_rise']:.3f}"
        assert rise in printed and rise in page
    two_of_four, half = tasks
    assert half["dense"] == two_of_four["dense"]
    assert half["best"] != two_of_four["best"]
    assert half["baselines"]["wanda"] != two_of_four["baselines"]["wanda"]


def test_report_is_made_again_of_the_files_alone_and_has_their_figures(on_two_tasks, call):
    run, _ = on_two_tasks
    page, chart = (run / "report.html").read_text(), (run / "fitness.svg").read_text()
    call("--report", run)
    assert (run / "report.html").read_text() == page
    assert (run / "fitness.svg").read_text() == chart and "<dc:date>" not in chart
    summary = read(run / "summary.json")
    for task in summary["tasks"]:
        for perplexity in (task["dense"], task["best"]["perplexity"], *task["baselines"].values()):
            assert f"<td>{perplexity:.2f}</td>" in page
    metric = Metric.parse(summary["best"]["metric"])
    assert f'<p class="formula">{metric}</p>' in page and summary["verdict"] in page
    assert f"<span>--metric</span> {run / 'best_metric.json'}" in page
    assert page.count(">W · G<") == 1  # of snip; further tables have its name


def test_report_fetches_nothing(finished):
    page = (finished / "report.html").read_text()
    places = re.findall(r'\b(?:src|srcset|href)="([^"]*)"', page)
    assert len(places) >= 3 and all(place.startswith(("data:", "#")) for place in places)
    assert not re.search(r"url\(|@import|<link|<script", page)


BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run")


@pytest.mark.slow
@pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver here")
@pytest.mark.parametrize("width", [390, 1280])
def test_report_is_no_wider_than_the_screen(on_two_tasks, width, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"user-data-dir={tmp_path}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # The driver is named, for Selenium would look for one elsewhere.
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as browser:
        run = browser.execute_script
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == 390}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get((on_two_tasks[0] / "report.html").as_uri())
        assert browser.get_log("browser") == []
        run("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert run("return document.documentElement.scrollWidth") <= width
        # Commands break between their words, not inside an option.
        parts = "[...document.querySelectorAll('code span')].map(x => x.getClientRects().length)"
        assert {*run(f"return {parts}")} == {1}
        run("document.querySelectorAll('.wide').forEach(x => x.scrollLeft = 999)")
        rows = browser.find_elements("css selector", "tbody tr") if width == 390 else []
        for row in rows:  # names stay when a table scrolls, and formulas are below their rows
            name, *_, last = row.find_elements("css selector", "td")
            assert 0 <= name.rect["x"] < 30
            if last.get_attribute("class") == "long" and last.text:
                assert last.rect["x"] >= 0 and last.rect["x"] + last.rect["width"] <= width
                assert last.rect["y"] >= name.rect["y"] + name.rect["height"] - 1


def test_report_of_a_damaged_summary_is_refused(run, call):
    (run / "summary.json").write_text('{"tasks": [], "best": {}}')
    _, err = call("--report", run, code=4)
    assert "summary.json lacks candidates, path, selection, verdict_kind" in err


def test_every_finalist_is_in_the_hall_of_fame_and_can_be_applied_by_its_name(finished):
    for row in read(finished / "summary.json")["selection"]:
        criterion, _ = resolve_metric(f"{finished}:{row['name']}")
        assert (criterion.text, criterion.group) == (row["metric"], row["group"])


def test_winner_is_chosen_on_a_model_that_the_search_does_not_see(extended, tiny_llama_dir):
    run, _ = extended
    summary = read(run / "summary.json")
    assert [(task["weight"], task["model"]) for task in summary["tasks"]] == [
        (1.0, "embedded"),
        (0.0, str(tiny_llama_dir)),
    ]
    lines = lines_of(run / "journal.jsonl")[4:]  # behind the seeds
    assert all(Metric.parse(line["metric"]).is_comparable for line in lines)
    standings = summary["selection"]
    losses = [(one["fitness"] + one["selection"]) / 2 for one in standings]
    assert losses == sorted(losses)
    best, (winner,) = read(run / "best_metric.json"), (one for one in standings if one["chosen"])
    assert best["provenance"]["candidate"] == summary["best"]["name"] == winner["name"]
    assert summary["best"]["metric"] == best["metric"] == winner["metric"]
    assert summary["best"]["fitness"] == best["fitness"] == winner["fitness"]


def test_winner_that_cannot_prune_the_unseen_model_is_told_and_measured_where_it_can(
    model_copy, tmp_path, call
):
    def level(weights):  # which then cannot be ranked by size, and can by what comes in
        weights.update({name: t.sign() / 8 for name, t in weights.items() if "proj" in name})

    change_weights(model_copy, level)
    run, model = tmp_path / "run", model_copy.rename(tmp_path / "<b>model")
    few = ["search.candidates=1", "search.seeds=['W']", f"selection.model={model}"]
    printed, _ = search(run, *few)
    assert "no finalist can prune all models of the selection: the fittest is taken\n" in printed
    summary = read(run / "summary.json")
    seen, other = summary["tasks"]
    assert seen["best"]["perplexity"] > seen["dense"]
    assert (other["best"]["perplexity"], other["by_text"][0]["relative_rise"]) == (None, None)
    assert other["baselines"]["wanda"] > 0 and "magnitude" not in other["baselines"]
    assert (summary["selection"], summary["best"]["metric"]) == ([], "W")
    assert summary["verdict"].endswith(" It cannot prune <b>model 60%.")
    page = (run / "report.html").read_text()
    assert "Cannot prune the model, which " in page
    assert "&lt;b&gt;model" in page and "<b>" not in page
    (run / "summary.json").unlink()
    call("--resume", run)
    assert read(run / "summary.json") | {"seconds": summary["seconds"]} == summary


def test_status_tells_where_a_finished_run_stands(finished, call):
    out, _ = call("--status", finished)
    assert out.startswith(f"{finished}: finished, as of ")
    lines = lines_of(finished / "journal.jsonl")
    best = min((x for x in lines if x["fitness"] is not None), key=lambda x: x["fitness"])
    assert "candidates: 16/16\n" in out
    assert f"best: {Metric.parse(best['metric']).infix}, group {best['group']}\n" in out
    rows = list(csv.DictReader((finished / "hall_of_fame.csv").open()))
    front = [Metric.parse(row["metric"]).infix for row in rows if row["pareto"] == "true"]
    told = out.partition("front, no smaller one as fit:\n")[2].splitlines()
    assert [line.partition(": ")[2] for line in told] == front
    assert "ready" not in out  # nothing works any more
    assert sum(read(finished / "status.json")["outcomes"].values()) == 16


def test_status_of_a_killed_run_says_how_to_resume_and_counts_its_journal(run, call):
    old = read(run / "status.json") | {"state": "running", "candidates": 0}
    (run / "status.json").write_text(json.dumps(old))
    (run / "summary.json").unlink()
    (run / ".lock").touch()  # as a killed process leaves it
    out, _ = call("--status", run)
    way_on = f"resume with python run_search.py --resume {run}, as of"
    assert out.startswith(f"{run}: stopped while running; {way_on}")
    assert "\ncandidates: 16/16\nlast improvement: candidate " in out
    with closing(RunFolder.open_(run)):
        told = json.loads(call("--json", "--status", run)[0])
    assert (told["state"], told["candidates"]) == ("running", 16)


def test_finalists_that_were_measured_before_an_interrupt_are_not_measured_again(
    finished, tmp_path, monkeypatch, call
):
    true, measured = Evaluator.losses, []
    roles = [line[1] for line in lines_of(finished / "losses.jsonl")]
    at = roles.index("report") - 1  # the last of the finalists' losses

    def losses(self, *wanted):
        if len(measured) == at:
            raise KeyboardInterrupt
        measured.append(wanted)
        return true(self, *wanted)

    monkeypatch.setattr(Evaluator, "losses", losses)
    run = tmp_path / "run"
    search(run, code=3)
    assert {role for _, role, _ in measured} == {*ROLES}
    out, _ = call("--status", run)
    way_on = f"resume with python run_search.py --resume {run}, as of"
    assert out.startswith(f"{run}: stopped while measuring finalists; {way_on}")
    with (run / "losses.jsonl").open("ab") as file:
        file.write(b'[0, "selection", "mul(W')  # as a kill leaves it
    before, measured, at = measured, [], None
    call("--resume", run)
    assert not {*before} & {*measured}
    assert len(before) + len(measured) == len(lines_of(finished / "losses.jsonl"))
    for name in ("journal.jsonl", "best_metric.json", "hall_of_fame.csv"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_tensorboard_gets_every_value_of_a_status(on_two_tasks):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = on_two_tasks
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    best, status = events.Scalars("fitness/best")[-1], read(run / "status.json")
    assert (best.step, best.value) == (16, pytest.approx(status["best"]["fitness"]))
    assert {"candidates_per_hour", "workers/ready"} <= {*events.Tags()["scalars"]}


def test_report_of_a_run_that_goes_on_is_partial_and_leaves_it_its_lock(run, call):
    (run / "report.html").unlink()
    assert call("--report", run)[0] == f"wrote {run / 'report.html'} and fitness.svg\n"
    assert "has not ended" not in (run / "report.html").read_text()
    (run / "summary.json").unlink()
    lines = (run / "journal.jsonl").read_bytes()
    with closing(RunFolder.open_(run)):  # as a search that works in it
        (run / "journal.jsonl").write_bytes(lines[:-7])
        out, _ = call("--report", run)
        assert (run / ".lock").exists()
    assert out.endswith(" and fitness.svg: partial, because the run has not ended\n")
    assert "shows its first 15\ncandidates." in (run / "report.html").read_text()
    assert (run / "journal.jsonl").read_bytes() == lines[:-7]


def test_resume_of_a_finished_run_tells_its_result_measuring_nothing(run, monkeypatch, call):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr("prunevolve.search.run.backend_of", None)  # what would start a worker
    out, err = call("--json", "--resume", run)
    told, summary = json.loads(out), read(run / "summary.json")
    assert (told["exit"], told["reason"], told["ending"]) == (0, "done", "finished before")
    assert (told["folder"], told["files"]["report"]) == (str(run), str(run / "report.html"))
    assert told.items() >= summary.items()
    # Sixteen candidates do not win.
    way_on = f"python run_search.py --resume {run} --set search.candidates=64"
    assert err.endswith(f"it did not clearly win: search on with {way_on}\n")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    (run / "summary.json").write_text(json.dumps(summary | {"verdict_kind": "better"}))
    line = call("--resume", run)[0].splitlines()[-1]
    assert line.startswith("apply it: python run_prune.py --model embedded --metric ")
    assert f"--metric {run / 'best_metric.json'} --sparsity 0.6" in line


def test_callback_that_raises_ends_the_run_which_can_be_resumed_and_leaves_threads_and_screen(
    finished, tmp_path, capsys, request
):
    class Enough(Exception):
        pass

    def interrupt(record):
        raise KeyboardInterrupt

    def stop(record):
        if record.index == 9:
            raise Enough("ten are enough")

    out, threads = tmp_path / "run", torch.get_num_threads()
    request.addfinalizer(partial(torch.set_num_threads, threads))
    torch.set_num_threads(3)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after \d candidates; continue with"):
        evolve(schema.load(None, SMALL), out, interrupt)
    assert torch.get_num_threads() == 3
    with pytest.raises(Enough, match="ten are enough"):
        resume(out, on_record=stop)
    assert (out / "checkpoint.json").exists()
    begun = len(lines_of(out / "journal.jsonl"))
    assert 10 <= begun < 16
    fresh = []
    result = resume(str(out), on_record=fresh.append)
    assert [record.index for record in fresh] == list(range(begun, 16))
    assert_same(out, finished)
    assert result.summary == read(out / "summary.json")
    assert capsys.readouterr().out == ""
    best = result.summary["best"]
    assert (result.best.text, result.best.group) == (best["metric"], best["group"])
    lines = lines_of(out / "journal.jsonl")
    front = {found.name: found.fitness for found in result.front}
    assert front and front == {name: lines[int(name)]["fitness"] for name in front}


def test_search_breeds_no_more_once_its_hours_are_over_and_goes_on_with_more(
    tmp_path, monkeypatch, call
):
    bred = []
    seconds = property(lambda self: 3600.0 * len(bred))
    monkeypatch.setattr("prunevolve.search.progress.Recorder.seconds", seconds)
    config = schema.load(None, [*SMALL, "search.hours=5", "search.lag=3"])
    result = evolve(config, tmp_path / "run", on_record=bred.append)
    assert 5 <= len(bred) <= 5 + 1 + 3
    assert [record.index for record in bred] == list(range(result.summary["candidates"]))
    monkeypatch.setattr("prunevolve.search.run.backend_of", None)  # what would start a worker
    assert not resume(tmp_path / "run").is_new
    way_on = "--set search.candidates=64 --set search.hours=10\n"
    assert call("--resume", tmp_path / "run")[0].endswith(way_on)
    monkeypatch.undo()
    resume(tmp_path / "run", ["search.hours=null"])
    assert len(lines_of(tmp_path / "run/journal.jsonl")) == 16


def test_resume_replays_the_journal_where_the_checkpoint_is_of_no_use(
    finished, on_two_tasks, tmp_path, call
):
    another = (on_two_tasks[0] / "checkpoint.json").read_bytes()
    names = ("used", "deleted", "damaged", "another's")
    runs = {name: shutil.copytree(finished, tmp_path / name) for name in names}
    (runs["deleted"] / "checkpoint.json").unlink()
    (runs["damaged"] / "checkpoint.json").write_bytes(another[:-20])
    (runs["another's"] / "checkpoint.json").write_bytes(another)
    journals = set()
    for name, run in runs.items():
        out, _ = call("--resume", run, "--set", "search.candidates=20")
        assert ("all of the journal is replayed" in out) == (name != "used")
        journals.add((run / "journal.jsonl").read_bytes())
    (journal,) = journals
    assert journal.startswith((finished / "journal.jsonl").read_bytes())
    first, second = read(finished / "summary.json"), read(runs["used"] / "summary.json")
    look = f" Look 2 at this text: after 16 candidates it had {first['best']['perplexity']:.2f}."
    assert look not in first["verdict"] and second["verdict"].endswith(look)
    assert second["seconds"] > first["seconds"]
    # The first winner is measured again, and only one that is as good takes its place.
    was = [one for one in second["selection"] if one["metric"] == first["best"]["metric"]]
    assert was and sum(second["best"][k] - was[0][k] for k in ("fitness", "selection")) <= 0


def test_best_metric_of_a_run_that_is_extended_stays_until_another_winner_is_chosen(
    run, finished, monkeypatch, call
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("prunevolve.search.results.choose", interrupted)
    call("--resume", run, "--set", "search.candidates=20", code=3)
    assert len(lines_of(run / "journal.jsonl")) == 20
    best = "best_metric.json"
    assert (run / best).read_bytes() == (finished / best).read_bytes()


def test_damaged_journal_is_one_line_whose_way_out_gives_the_same_run(run, call):
    journal = run / "journal.jsonl"
    before = journal.read_bytes()
    lines = before.splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:7], b"{}\n", *lines[8:]]))
    for words in (["--status", run], ["--report", run], ["--resume", run]):
        out, err = call(*words, code=4)
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: {journal} line 8 is damaged: index: Field required, got ")
        assert err.endswith("; keep the 7 lines before it and resume: the rest is searched again\n")
    journal.write_bytes(b"".join(lines[:7]))
    call("--resume", run)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("damaged", [b"{}", b"selection, null"])
def test_damaged_losses_are_refused_with_their_line_and_leave_the_config(run, call, damaged):
    before = (run / "config.yaml").read_bytes()
    first, _, *others = (run / "losses.jsonl").read_bytes().splitlines()
    (run / "losses.jsonl").write_bytes(b"\n".join([first, damaged, *others, b""]))
    _, err = call("--resume", run, "--set", "search.candidates=20", code=4)
    assert err.startswith(f"error: {run / 'losses.jsonl'} line 2 is damaged: remove the line and")
    assert (run / "config.yaml").read_bytes() == before


def test_search_in_which_nothing_was_evaluated_exits_5(tmp_path, call):
    few = ("search.candidates=1", "search.seeds=['sub(exp(W), exp(W))']")
    _, err = search(tmp_path / "run", *few, code=5)
    assert err.startswith("error: no candidate was evaluated to the end; breed more: ")
    out, _ = call("--status", tmp_path / "run")
    assert out.startswith(f"{tmp_path / 'run'}: nothing evaluated; resume with ")


def test_validate_prints_the_config_and_counts_the_work_as_a_run_does_it(finished, call, tmp_path):
    settings = [f"--set={one}" for one in SMALL]
    out, err = call("--config", "embedded", *settings, "--validate", "--json")
    told, config = json.loads(out), schema.load("embedded", SMALL)
    assert (told["exit"], told["ending"]) == (0, "valid")
    assert told["config"] == json.loads(config.model_dump_json())
    assert err == "\n".join([schema.to_yaml(config), *told["plan"], "valid", ""])
    assert list(tmp_path.iterdir()) == []
    plan, rows = " ".join(told["plan"]), lines_of(finished / "losses.jsonl")
    assert f"then {len(BASELINES) + 1} measurements of" in plan
    (most,) = re.findall(r"after it: up to (\d+) measurements", plan)
    assert len(rows) - len(BASELINES) - 1 <= int(most)
    peaks = [line.get("peak_mib", 0) for line in lines_of(finished / "timings.jsonl")]
    (size,) = re.findall(r"holds at most about ([\d.]+) MiB", plan)
    assert max(peaks) <= 1.5 * float(size)  # this process holds tests, too


def test_extended_primitives_collect_their_statistics_and_breed_from_them(extended):
    run, printed = extended
    assert "warning: seed sparsegpt is its score alone" in printed
    with safe_open(run / "statistics.safetensors", "pt") as tensors:
        # B is of a seed alone.
        assert {key.partition("/")[0] for key in tensors.keys()} == set("BGHMVX")  # noqa: SIM118
    lines = lines_of(run / "journal.jsonl")
    assert [line["outcome"] for line in lines[:4]] == ["evaluated"] * 4
    assert not any("is None: pass it" in line["reason"] for line in lines)
