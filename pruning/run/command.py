"""What `run_prune.py` does: plan a job, carry it out, verify a result, or measure a model."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from prunevolve.command_line import PRUNE
from prunevolve.evaluation import zero_shot
from prunevolve.evaluation.perplexity import losses_of, perplexity, perplexity_error
from prunevolve.evaluation.windows import Windows, cut_all, special_note
from prunevolve.pruning.checkpoint import DiskOffload, Offload
from prunevolve.pruning.json_file import JsonObject, finite, read_object
from prunevolve.pruning.models import hub_id, linear_layers, load_model
from prunevolve.pruning.parse import SCHEMA
from prunevolve.pruning.progress import Progress, on_stderr, shown_progress
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.pruning.run.job import Job, evaluation_texts, resolve
from prunevolve.pruning.run.options import Measurement
from prunevolve.pruning.run.result import (
    WorkFolder,
    kept_statistics,
    measured_lines,
    save_model,
    save_papers,
    work_folder,
)
from prunevolve.pruning.run.verify import RECIPE, REPORT, Inspector, verify_result
from prunevolve.pruning.store import FolderStore, ResidentStore
from prunevolve.pruning.stream import Texts


def validate(job: Job) -> JsonObject:
    """Cut the windows of local texts, and print the plan and what was not checked."""
    unchecked: list[str] = []
    for text in (text for texts in job.texts.values() for text in texts):
        if note := text.check():
            unchecked.append(note)
        else:
            text.cut(job.model.tokenizer)
    if tasks := job.request.tasks:
        unchecked.append(f"data sets of zero-shot tasks {', '.join(tasks)}: not checked")
    if hub_id(job.model.name):
        unchecked.append(f"weights of model {job.model.name}: on the hub: not checked")
    _say("warning", job.warnings)
    print(*unchecked, *job.plan_lines, sep="\n")
    print(f"valid: {job}; nothing was loaded or written")
    return {
        "options": job.request.deciding(),
        "plan": job.plan_lines,
        "not_checked": unchecked,
        "warnings": job.warnings,
    }


def apply(job: Job, expected: Mapping[str, str] | None) -> JsonObject:
    """Measure, prune, measure again and save; return what `--json` prints.

    Args:
        expected: sha256 of the files that the result should have, by name, if known.
    """
    model, request = job.model, job.request
    with on_stderr().status("reading the texts and the zero-shot tasks"):
        windows = {role: cut_all(texts, model.tokenizer) for role, texts in job.texts.items()}
        tasks = zero_shot.load_tasks(request.tasks)
    checkpoint = model.open()
    calibration = windows.get("calibration")
    warnings = job.warnings
    if calibration and (special := special_note(calibration.tokens, model.tokenizer)):
        warnings = [*warnings, special]
    _say("warning", warnings)  # not at the end, which may be hours away
    recipe = {
        "schema": SCHEMA,
        **request.deciding(),
        "group": job.recipe.target.group_name,
        "calibration": calibration.provenance if calibration else None,
        "device": model.device,
    }
    if not job.recipe.own_masks:  # SparseGPT is no formula alone
        recipe["tree"] = job.recipe.metric.to_release_json()
    evaluation = windows["evaluation"].provenance
    identity = {**recipe, "model": checkpoint.fingerprint(), "evaluation": evaluation}
    shards = WorkFolder(job.out).result
    of_model = (model.config, model.dtype, model.device)
    store = FolderStore(checkpoint, *of_model, shards, job.plan.resident)
    print(f"pruning: {job}", *job.plan_lines, sep="\n", file=sys.stderr)
    kept = request.statistics if job.recipe.dense_terminals else None
    statistics = kept_statistics(Path(kept), identity, store) if kept else None
    with shown_progress(on_stderr()) as progress, work_folder(job.out) as work:
        work.begin(request.model_dump(), identity, expected)
        if not (work.result / REPORT).exists():  # else it has only to be moved to its place
            _Run(job, windows, tasks, work, store, progress).save(statistics, recipe, warnings)
        report = work.publish()
    _say("warning", [line for line in report["warnings"] if line not in warnings])
    told = _told(job.out, report) | {"group": job.recipe.target.group_name}
    print(*measured_lines(report), sep="\n")
    print(f"saved: {job.out} ({_counts(told)})")
    print(f"verify: {PRUNE} --verify {shlex.quote(str(job.out))}")
    return told | (_compare(job.out, expected) if expected else {})


def finished(folder: Path) -> JsonObject | None:
    """Say that a result is finished; return what `--json` prints, or None if it is not."""
    if not (folder / REPORT).is_file():
        return None
    report = WorkFolder(folder).publish()  # a kill may have come before its end
    print(f"{folder}: finished; nothing to do")
    return _told(folder, report)


def verify(folder: Path) -> JsonObject:
    """Check a pruned model's folder against its report; return what `--json` prints."""
    with shown_progress(on_stderr()) as progress:
        told = _told(folder, verify_result(folder, progress))
    print(f"{folder}: {_counts(told)}; counts and checksums are as reported")
    return told


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
        losses = losses_of(
            states, store.logits, tokens, lambda done: progress("perplexity", done, len(tokens))
        )
        scores = zero_shot.evaluate_tasks(live, model.tokenizer, tasks) if tasks else None
    _say("warning", _not_finite({"perplexity": losses}, windows, model.dtype))
    measured = _measured({"perplexity": losses}, windows, model.dtype)
    measured |= {"zero_shot": {"measured": scores}} if scores else {}
    print(*measured_lines(measured), sep="\n")
    return {"model": model.name, **measured}


def _say(kind: str, lines: Sequence[str]) -> None:
    for line in lines:
        print(f"{kind}: {line}", file=sys.stderr)


@dataclass(frozen=True)
class _Run:
    """One pruning in its work folder."""

    job: Job
    windows: Mapping[str, Windows]
    tasks: zero_shot.Tasks
    work: WorkFolder
    store: FolderStore
    progress: Progress

    def save(self, statistics: Offload | None, recipe: JsonObject, warnings: Sequence[str]) -> None:
        """Measure the model, prune it, measure it again and save it with its recipe and report."""
        model, work, blocks = self.job.model, self.work, self.store.blocks
        layers = [*linear_layers(self.store.model)]
        inspector = Inspector(model.config, layers, self.job.recipe.target)
        for path in map(self.store.shard, sorted(self.store.written)):  # by the run before
            known = work.found.get("sha256", {}).get(path.name)
            inspector.look(path, work.found.get("shares", {}), known)
        self._score("dense", model.name)
        self._prune(statistics, inspector)
        shares = work.found.get("shares", {})
        counted = save_model(self.store, inspector, shares, self.progress)
        self._score("pruned", str(work.result))
        found, names = work.found, ("dense", "pruned")
        losses = {f"{x}_perplexity": torch.from_numpy(np.array(found[x], float)) for x in names}
        parts = {
            "training": {block: found[block] for block in blocks if block in found},
            "damping": {x: found[x]["damping"] for x in layers if x in found},
            "zero_shot": {x: found[f"{x} zero-shot"] for x in names if self.tasks},
        }
        evaluation = self.windows["evaluation"]
        warnings = [*warnings, *_not_finite(losses, evaluation, model.dtype)]
        if grown := parts["damping"]:
            worst = max(grown, key=lambda layer: grown[layer])
            told = f"the damping of {len(grown)} Gram matrices grew tenfold, for layer {worst} "
            warnings.append(f"{told}{grown[worst]} times: the update makes up for less there")
        report = _measured(losses, evaluation, model.dtype) | {"warnings": warnings}
        report |= {name: part for name, part in parts.items() if part}
        recipe |= {"shares": shares} if shares else {}
        save_papers(work.result, recipe, report, counted)

    def _prune(self, statistics: Offload | None, inspector: Inspector) -> None:
        """Prune the blocks, and keep what is found out as soon as it is known."""
        work, plan, tokens = self.work, self.job.plan, self.windows["evaluation"].tokens

        def measure(
            name: str, states: Iterator[Tensor], logits: Callable[[Tensor], Iterator[Tensor]]
        ) -> None:
            stage, total = f"{name} perplexity", len(tokens)
            losses = losses_of(
                states, logits, tokens, lambda done: self.progress(stage, done, total)
            )
            if not losses.isfinite().all():
                self.store.checkpoint.check_finite()  # else a value overflows in this dtype
            work.keep(name, losses.tolist())

        texts = Texts(
            self.windows["calibration"].tokens if "calibration" in self.windows else None,
            {name: tokens for name in ("dense", "pruned") if name not in work.found},
            measure,
        )
        if statistics is None and "statistics" in plan.on_disk:
            statistics = DiskOffload(work.statistics)
        states = DiskOffload(work.states, fresh=True) if "hidden states" in plan.on_disk else {}

        def look(path: Path) -> None:  # while the shard is in the system's cache
            inspector.look(path, work.found.get("shares", {}))
            work.keep("sha256", dict(inspector.sums))

        self.store.on_shard = look
        recipe, progress = self.job.recipe, self.progress
        try:
            prune(self.store, recipe, texts, states, statistics, progress, record=work.keep)
        except DegenerateScores:
            self.store.checkpoint.check_finite()  # else it is the metric's fault
            raise
        work.forget_work()

    def _score(self, name: str, place: str) -> None:
        """Keep the zero-shot results of the model in a place, in the passes' dtype and device."""
        stage, model = f"{name} zero-shot", self.job.model
        if self.tasks and stage not in self.work.found:
            live = load_model(place, model.dtype, model.device)
            self.work.keep(stage, zero_shot.evaluate_tasks(live, model.tokenizer, self.tasks))
            self.progress(stage, 1, 1)


def _measured(losses: Mapping[str, Tensor], windows: Windows, dtype: str) -> JsonObject:
    """Return what a report says of perplexity, from each window's mean NLL by name.

    Behind each is its standard error. What is not finite is None.
    """

    def of(part: Tensor) -> JsonObject:
        found: JsonObject = {}
        for name, values in losses.items():
            found[name] = finite(perplexity(values[part]))
            found[f"{name}_standard_error"] = finite(perplexity_error(values[part]))
        return found

    kinds = torch.tensor(windows.kinds)
    by_text = []
    for kind, part in enumerate(windows.parts):
        shown = {name.replace("_perplexity", ""): x for name, x in of(kinds == kind).items()}
        by_text.append({"corpus": part["corpus"], "split": part["split"], **shown})
    place = {**windows.provenance, "dtype": dtype}
    return {**of(kinds >= 0), "perplexity_of": place, "by_text": by_text}


def _not_finite(losses: Mapping[str, Tensor], windows: Windows, dtype: str) -> list[str]:
    """Return a warning for each model with windows whose loss is not finite."""
    lines = []
    for name, values in losses.items():
        if bad := torch.nonzero(~values.isfinite()).flatten().tolist():
            text = windows.parts[windows.kinds[bad[0]]]
            lines.append(
                f"{name.replace('_', ' ')} is not finite in {dtype}: {len(bad)} windows are not, "
                f"first window {bad[0] + 1} ({text['corpus']}, split {text['split']}); give "
                "another --dtype"
            )
    return lines


def _told(folder: Path, report: JsonObject) -> JsonObject:
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


def _counts(told: JsonObject) -> str:
    zeros = told["zeros"] / told["weights"]
    return f"{told['layers']} layers, {zeros:.2%} zeros, {told['pattern']}"


def _compare(folder: Path, expected: Mapping[str, str]) -> JsonObject:
    """Print whether a result has the files that its recipe names; return that for `--json`."""
    sums = read_object(folder / RECIPE)["sha256"]
    if sums == expected:
        print("repeated: all files match the recipe's, byte for byte")
        return {"repeated": True}
    first = min(x for x in {*sums, *expected} if sums.get(x) != expected.get(x))
    line = f"files differ from the recipe's, {first} first: the model, the texts, the options or "
    _say("warning", [f"{line}the versions are not the same"])
    return {"repeated": False}
