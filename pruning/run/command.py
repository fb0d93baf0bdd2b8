"""What `run_prune.py` does: plan a job, carry it out, verify a result, or measure a model."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from prunevolve.command_line import PRUNE
from prunevolve.evaluation import zero_shot
from prunevolve.evaluation.perplexity import measured, not_finite, window_losses
from prunevolve.evaluation.windows import Windows, cut_all, special_note
from prunevolve.pruning.checkpoint import Checkpoint, DiskOffload, Offload
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.model_name import hub_id
from prunevolve.pruning.models import linear_layers, load_model
from prunevolve.pruning.parse import SCHEMA
from prunevolve.pruning.progress import Progress, on_stderr, shown_progress
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.pruning.run import card, result
from prunevolve.pruning.run.job import Job, evaluation_texts, resolve
from prunevolve.pruning.run.options import Measurement
from prunevolve.pruning.run.verify import RECIPE, REPORT, Inspector, verify_result
from prunevolve.pruning.store import FolderStore, ResidentStore


def validate(job: Job) -> JsonObject:
    """Cut the windows of local texts, and print the plan and what was not checked."""
    unchecked: list[str] = []
    for text in chain(*job.texts.values()):
        if note := text.check():
            unchecked.append(note)
        else:
            text.cut(job.model.tokenizer)
    if tasks := job.request.tasks:
        unchecked.append(f"data sets of zero-shot tasks {', '.join(tasks)}: not checked")
    if hub_id(job.model.name):
        unchecked.append(f"weights of model {job.model.name}: on the hub: not checked")
    _warn(job.warnings)
    print(*unchecked, *job.plan_lines, f"valid: {job}; nothing was loaded or written", sep="\n")
    return {
        "options": job.request.deciding(),
        "plan": job.plan_lines,
        "not_checked": unchecked,
        "warnings": job.warnings,
    }


def apply(job: Job) -> JsonObject:
    """Measure, prune, measure again and save; return what `--json` prints."""
    model, request = job.model, job.request
    with on_stderr().status("reading the texts and the zero-shot tasks"):
        windows = {role: cut_all(texts, model.tokenizer) for role, texts in job.texts.items()}
        tasks = zero_shot.load_tasks(request.tasks)
    checkpoint = model.open()
    calibration, evaluation = windows.get("calibration"), windows["evaluation"]
    warnings = job.warnings
    if calibration and (special := special_note(calibration.tokens, model.tokenizer)):
        warnings = [*warnings, special]
    _warn(warnings)  # not at the end, which may be hours away
    recipe = {
        "schema": SCHEMA,
        **request.deciding(),
        "group": job.procedure.target.group_name,
        "calibration": calibration.provenance if calibration else None,
        "device": model.device,
    }
    if held_back := windows.get("held_back"):
        recipe["held_back"] = held_back.provenance
    if not job.procedure.own_masks:  # SparseGPT is no formula alone
        recipe["tree"] = job.procedure.metric.to_release_json()
    fingerprints = {"model": checkpoint.fingerprint(), "evaluation": evaluation.provenance}
    work = result.WorkFolder(job.out, request.model_dump(), recipe | fingerprints)
    of_model = (model.config, model.dtype, model.device)
    store = FolderStore(checkpoint, *of_model, work.result, job.plan.resident, request.skip)
    statistics = None
    if request.statistics and job.procedure.dense_terminals:
        statistics = result.kept_statistics(Path(request.statistics), work.run.identity, store)
    print(f"pruning: {job}", *job.plan_lines, sep="\n", file=sys.stderr)
    if store.written:
        done = f"{len(store.written)} of {len(store.blocks)} blocks done"
        print(f"resumed: {done}; the passes over the others begin anew", file=sys.stderr)
    with shown_progress(on_stderr()) as progress, work.open():
        if not (work.result / REPORT).exists():  # else it has only to be moved to its place
            inspector = _carry_out(job, windows, tasks, store, statistics, work, progress)
            recipe |= {"update_part": work.run.guard["part"]} if work.run.guard else {}
            report = _report(work.run, evaluation, model.dtype, warnings)
            report |= card.sizes(checkpoint, Checkpoint(work.result))
            result.save_report(work.result, recipe, report, inspector)
        report = result.publish(job.out)
    _warn([line for line in report["warnings"] if line not in warnings])
    answer = _answer(job.out, report) | {"group": job.procedure.target.group_name}
    print(*card.measured_lines(report), sep="\n")
    print(f"saved: {job.out} ({_counts(answer)})")
    print(f"verify: {PRUNE} --verify {shlex.quote(str(job.out))}")
    return answer


def finished(folder: Path) -> JsonObject | None:
    """Say that a result is finished; return what `--json` prints, or None if it is not."""
    if not (folder / REPORT).is_file():
        return None
    report = result.publish(folder)  # a kill may have come before its end
    print(f"{folder}: finished; nothing to do")
    return _answer(folder, report)


def verify(folder: Path) -> JsonObject:
    """Check a pruned model's folder against its report; return what `--json` prints."""
    with shown_progress(on_stderr()) as progress:
        answer = _answer(folder, verify_result(folder, progress))
    print(f"{folder}: {_counts(answer)}; counts and checksums are as reported")
    return answer


def evaluate(request: Measurement) -> JsonObject:
    """Measure the request's model, pruned or not; return what `--json` prints."""
    transformers_logging.disable_progress_bar()  # this program shows its own progress
    model = resolve(request)
    with on_stderr().status("reading the texts and the zero-shot tasks"):
        windows = cut_all(evaluation_texts(request, model.seqlen), model.tokenizer)
        zero_shot.check_tasks(request.tasks)
        tasks = zero_shot.load_tasks(request.tasks)
    with shown_progress(on_stderr()) as progress:
        live, tokens = load_model(model.name, model.dtype, model.device), windows.tokens
        store = ResidentStore(live)
        # One window at a time, as a pruning does: a batch of them is rounded differently.
        states = chain.from_iterable(map(store.states, tokens.split(1)))
        losses = window_losses(
            states, store.logits, tokens, lambda done: progress("perplexity", done, len(tokens))
        )
        scores = zero_shot.evaluate_tasks(live, model.tokenizer, tasks) if tasks else None
    _warn(not_finite({"perplexity": losses}, windows, model.dtype))
    report = measured({"perplexity": losses}, windows, model.dtype)
    report |= {"zero_shot": {"measured": scores}} if scores else {}
    print(*card.measured_lines(report), sep="\n")
    return {"model": model.name, **report}


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def _carry_out(
    job: Job,
    windows: Mapping[str, Windows],
    tasks: zero_shot.Tasks,
    store: FolderStore,
    statistics: Offload | None,
    work: result.WorkFolder,
    progress: Progress,
) -> Inspector:
    """Measure the model, prune it, measure it again; return what looked into its files."""
    model, run, evaluation = job.model, work.run, windows["evaluation"].tokens
    inspector = Inspector(model.config, [*linear_layers(store.model)], job.procedure.target)
    for path in map(store.shard, sorted(store.written)):  # by the run before
        inspector.look(path, run.sha256.get(path.name))

    def look(path: Path) -> None:  # while the shard is in the system's cache
        inspector.look(path)
        work.keep("sha256", {path.name: inspector.sums[path.name]})

    def score(name: str, source: str) -> None:
        if tasks and name not in run.zero_shot:
            live = load_model(source, model.dtype, model.device)
            scores = zero_shot.evaluate_tasks(live, model.tokenizer, tasks)
            work.keep("zero_shot", {name: scores})
            progress(f"{name} zero-shot", 1, 1)

    store.on_shard = look
    texts = {name: evaluation for name in ("dense", "pruned") if name not in run.losses}
    texts |= {x: windows[x].tokens for x in ("calibration", "held_back") if x in windows}
    if statistics is None and "statistics" in job.plan.on_disk:
        statistics = DiskOffload(work.statistics)
    states = DiskOffload(work.states, fresh=True) if "hidden states" in job.plan.on_disk else {}
    score("dense", model.name)
    procedure = work.procedure(job.procedure)
    try:
        prune(
            store,
            procedure,
            texts,
            states,
            statistics,
            progress,
            record=work.keep,
            losses=window_losses,
        )
    except DegenerateScores:
        store.checkpoint.check_finite()  # else it is the metric's fault
        raise
    if any(None in losses for losses in run.losses.values()):
        store.checkpoint.check_finite()  # else a value overflows in this dtype
    work.forget_work()
    result.save_model(store, inspector, progress)
    score("pruned", str(work.result))
    return inspector


def _report(run: result.Run, evaluation: Windows, dtype: str, warnings: list[str]) -> JsonObject:
    """Return what the report says of a finished run."""
    losses = {
        f"{name}_perplexity": torch.from_numpy(np.array(run.losses[name], float))
        for name in ("dense", "pruned")
    }
    warnings = [*warnings, *not_finite(losses, evaluation, dtype)]
    if left_out := run.guard.get("part") == 0:
        losses_of = "without it {without:.4f} nats, with it {with:.4f}".format_map(run.guard)
        warnings.append(f"the update was left out: on windows held back {losses_of}")
    if (grown := run.damping) and not left_out:
        worst = max(grown, key=lambda layer: grown[layer])
        line = f"the damping of {len(grown)} Gram matrices grew tenfold, for layer {worst} "
        warnings.append(f"{line}{grown[worst]} times: the update makes up for less there")
    made = set[str]() if left_out else {"training", "damping"}
    parts = run.model_dump(include={"guard", "zero_shot", *made})
    report = measured(losses, evaluation, dtype) | {"warnings": warnings}
    return report | {name: part for name, part in parts.items() if part}


def _answer(folder: Path, report: JsonObject) -> JsonObject:
    """Return what `--json` prints of a pruned model."""
    layers = report["layers"]
    return report | {
        "out": str(folder),
        "report": str(folder / REPORT),
        "recipe": str(folder / RECIPE),
        "layers": len(layers),
        "zeros": sum(layer["zeros"] for layer in layers),
        "weights": sum(layer["size"] for layer in layers),
    }


def _counts(answer: JsonObject) -> str:
    zeros = answer["zeros"] / answer["weights"]
    return f"{answer['layers']} layers, {zeros:.2%} zeros, {answer['pattern']}"
