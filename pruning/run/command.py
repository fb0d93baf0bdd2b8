"""What `run_prune.py` does: plan a job, carry it out, verify a result, or measure a model."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from prunevolve.evaluation import zero_shot
from prunevolve.evaluation.perplexity import losses_of, perplexity, window_losses
from prunevolve.evaluation.windows import Windows, cut_all, special_note
from prunevolve.pruning.checkpoint import DiskOffload, Offload
from prunevolve.pruning.json_file import JsonObject, read_object
from prunevolve.pruning.models import hub_id, load_model, resolve_model
from prunevolve.pruning.progress import Progress, on_stderr, shown_progress
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.run.job import Job, evaluation_texts
from prunevolve.pruning.run.kept_statistics import kept_statistics
from prunevolve.pruning.run.options import Measurement
from prunevolve.pruning.run.result import WorkFolder, finite, save_model, save_papers, work_folder
from prunevolve.pruning.run.verify import RECIPE, REPORT, Inspector, verify_result
from prunevolve.pruning.store import FolderStore, ResidentStore, all_layers
from prunevolve.pruning.stream import Texts


def validate(job: Job) -> JsonObject:
    """Cut the windows of local texts, and print the plan and what was not checked."""
    _say("note", job.notes)
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
    print(*unchecked, sep="\n", end="\n" * bool(unchecked))
    _say("warning", job.warnings)
    print(*job.plan_lines, sep="\n")
    print(f"valid: {job}; nothing was loaded or written")
    return {
        "options": job.request.deciding(),
        "plan": job.plan_lines,
        "not_checked": unchecked,
        "warnings": job.warnings,
    }


def apply(job: Job, expected: Mapping[str, str] | None) -> JsonObject:
    """Measure, prune, measure again and save, in as few passes as the recipe allows.

    Args:
        expected: sha256 of the files that the result should have, by name, if known.

    Returns:
        What `--json` prints.

    Raises:
        FolderMismatchError: If a folder belongs to another request or cannot be written.
        ValueError: If a text is too short, scores make no mask, or memory runs out.
    """
    model, request = job.model, job.request
    _say("note", job.notes)
    with on_stderr().status("reading the texts and the zero-shot tasks"):
        windows = {role: cut_all(texts, model.tokenizer) for role, texts in job.texts.items()}
        tasks = zero_shot.load_tasks(request.tasks)
    checkpoint = model.open()
    calibration = windows.get("calibration")
    warnings = job.warnings
    if calibration and (special := special_note(calibration.tokens, model.tokenizer)):
        warnings.append(special)
    _say("warning", warnings)  # not at the end, which may be hours away
    recipe = job.papers(calibration.provenance if calibration else None)
    evaluation = windows["evaluation"].provenance
    identity = {**recipe, "model": checkpoint.fingerprint(), "evaluation": evaluation}
    of_model = (model.config, model.dtype, model.device)
    shards = WorkFolder(job.out).result
    store = FolderStore(checkpoint, *of_model, shards, job.plan.resident)
    print(f"pruning: {job}", *job.plan_lines, sep="\n", file=sys.stderr)
    kept = request.statistics if job.recipe.dense_leaves else None
    statistics = kept_statistics(Path(kept), identity, store) if kept else None
    with (
        _out_of_memory_in_one_line(),
        shown_progress(on_stderr()) as progress,
        work_folder(job.out) as work,
    ):
        work.begin(request.model_dump(), identity, expected)
        if not (work.result / REPORT).exists():  # else it has only to be moved to its place
            run = _Run(job, windows, tasks, work, store, progress)
            run.save(statistics, recipe, warnings)
        report = work.publish()
    _say("warning", [line for line in report["warnings"] if line not in warnings])
    _print_outcome(job.out, report)
    figures = {key: value for key, value in report.items() if key != "layers"}
    figures["group"] = job.recipe.target.group_name
    return _summary(job.out, report) | figures | _comparison(job.out, expected)


def verify(folder: Path) -> JsonObject:
    """Check a pruned model's folder against its report; return what `--json` prints."""
    with shown_progress(on_stderr()) as progress:
        report = verify_result(folder, progress)
    print(f"{folder}: {_counts(report)}; counts and checksums are as reported")
    return _summary(folder, report)


def evaluate(request: Measurement) -> JsonObject:
    """Measure the request's model, pruned or not; return what `--json` prints.

    Raises:
        ValueError: If there is no such model, text or task, or memory runs out.
    """
    transformers_logging.disable_progress_bar()  # this program shows its own progress
    with on_stderr().status("reading the model's config, the texts and the tasks"):
        model = resolve_model(
            str(request.model), request.dtype, request.device, request.seqlen, request.revision
        )
        windows = cut_all(evaluation_texts(request, model.seqlen), model.tokenizer)
        zero_shot.check_tasks(request.tasks)
        tasks = zero_shot.load_tasks(request.tasks)
    with _out_of_memory_in_one_line(), shown_progress(on_stderr()) as progress:
        live, total = load_model(model.name, model.dtype, model.device), len(windows.tokens)
        losses = window_losses(
            ResidentStore(live), windows.tokens, lambda done: progress("perplexity", done, total)
        )
        scores = zero_shot.evaluate_tasks(live, model.tokenizer, tasks) if tasks else None
    perplexities = _measured({"perplexity": losses}, windows, model.dtype)
    measured = perplexities | ({"zero_shot": {"measured": scores}} if scores else {})
    print(f"perplexity {_number(measured['perplexity'])} ({_source(measured)})")
    _print_texts_and_tasks(measured, ["perplexity"])
    return {"model": model.name, **measured}


@contextmanager
def _out_of_memory_in_one_line() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory: use a smaller --seqlen, or --device cpu ({error})"
        ) from error


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

    def save(self, statistics: Offload | None, recipe: JsonObject, warnings: list[str]) -> None:
        """Measure the model, prune it, measure it again and save it with its recipe and report."""
        model, work = self.job.model, self.work
        inspector = Inspector(model.config, all_layers(self.store), self.job.recipe.target)
        inspector.shares = work.found.get("shares", {})
        scores = {"dense": self._scores("dense", model.name)} if self.tasks else {}
        self._prune(statistics, inspector)
        counted = save_model(self.store, model.tokenizer, inspector, self.progress)
        if self.tasks:
            scores["pruned"] = self._scores("pruned", str(work.result))
        found = work.found
        losses = {f"{name}_perplexity": torch.tensor(found[name]) for name in ("dense", "pruned")}
        report = _measured(losses, self.windows["evaluation"], model.dtype)
        report |= {key: found[key] for key in ("training",) if key in found}
        report |= {"warnings": warnings} | ({"zero_shot": scores} if scores else {})
        recipe |= {"shares": inspector.shares} if inspector.shares else {}
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
            work.keep(name, losses.tolist())

        def tell(name: str, value: JsonObject) -> None:
            if name == "shares":
                inspector.shares = value
                work.keep(name, value)
            else:
                work.keep("training", work.found.get("training", {}) | {name: value})

        texts = Texts(
            self.windows["calibration"].tokens if "calibration" in self.windows else tokens[:0],
            {name: tokens for name in ("dense", "pruned") if name not in work.found},
            measure,
        )
        if statistics is None and "statistics" in plan.on_disk:
            statistics = DiskOffload(work.statistics)
        states = DiskOffload(work.states, fresh=True) if "hidden states" in plan.on_disk else {}
        self.store.on_shard = inspector.look  # while the shard is in the system's cache
        prune(self.store, self.job.recipe, texts, states, statistics, self.progress, tell=tell)
        work.forget_work()

    def _scores(self, name: str, place: str) -> zero_shot.Scores:
        """Return a model's zero-shot results, which are kept as soon as they are known.

        Args:
            name: `dense` or `pruned`.
            place: Where it is loaded from, in the dtype and on the device of the passes.
        """
        stage, model = f"{name} zero-shot", self.job.model
        if stage not in self.work.found:
            live = load_model(place, model.dtype, model.device)
            self.work.keep(stage, zero_shot.evaluate_tasks(live, model.tokenizer, self.tasks))
            self.progress(stage, 1, 1)
        scores: zero_shot.Scores = self.work.found[stage]
        return scores


def _measured(losses: Mapping[str, Tensor], windows: Windows, dtype: str) -> JsonObject:
    """Return what a report says of perplexity, from each window's mean NLL by name."""
    kinds = torch.tensor(windows.kinds)
    by_name = {name: values.double() for name, values in losses.items()}
    by_text = []
    for kind, part in enumerate(windows.parts):
        of_kind = {name: perplexity(values[kinds == kind]) for name, values in by_name.items()}
        shown = {name.removesuffix("_perplexity"): value for name, value in of_kind.items()}
        by_text.append({"corpus": part["corpus"], "split": part["split"], **shown})
    perplexities = {name: perplexity(values) for name, values in by_name.items()}
    place = {**windows.provenance, "dtype": dtype}
    return finite({**perplexities, "perplexity_of": place, "by_text": by_text})


def _counts(report: JsonObject) -> str:
    layers = report["layers"]
    zeros, size = (sum(layer[key] for layer in layers) for key in ("zeros", "size"))
    return f"{len(layers)} layers, {zeros / size:.2%} zeros, {report['pattern']}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _print_outcome(out: Path, report: JsonObject) -> None:
    for name in ("dense", "pruned"):
        value = _number(report[f"{name}_perplexity"])
        print(f"{name + ' perplexity':17} {value} ({_source(report)})")
    _print_texts_and_tasks(report, ["dense", "pruned"])
    print(f"saved: {out} ({_counts(report)})")
    print(f"verify: python run_prune.py --verify {shlex.quote(str(out))}")


def _print_texts_and_tasks(report: JsonObject, names: Sequence[str]) -> None:
    """Print the perplexities of each text if there are several, and zero-shot results."""
    for text in report["by_text"] if len(report["by_text"]) > 1 else []:
        shown = [f"{name} {_number(text[name])}".removeprefix("perplexity ") for name in names]
        print(f"  of {text['corpus']}, split {text['split']}: {', '.join(shown)}")
    for line in zero_shot.lines(report):
        print(line)


def _source(measured: JsonObject) -> str:
    source = "{corpus}, split {split}, {windows} windows of {length} = {tokens} tokens, {dtype}"
    return source.format(**measured["perplexity_of"])


def _summary(folder: Path, report: JsonObject) -> JsonObject:
    """Return a pruned model's paths and counts."""
    layers = report["layers"]
    return {
        "out": str(folder),
        "report": str(folder / REPORT),
        "recipe": str(folder / RECIPE),
        "pattern": report["pattern"],
        "layers": len(layers),
        "zeros": sum(layer["zeros"] for layer in layers),
        "weights": sum(layer["size"] for layer in layers),
    }


def _comparison(folder: Path, expected: Mapping[str, str] | None) -> JsonObject:
    """Print whether a result has the files that its recipe names; return that for `--json`."""
    if expected is None:
        return {}
    sums = read_object(folder / RECIPE)["sha256"]
    differing = sorted(name for name in {*sums, *expected} if sums.get(name) != expected.get(name))
    if differing:
        line = (
            f"{len(differing)} of {len(sums)} files differ from the recipe's, {differing[0]} "
            "first: the model, the texts, the options or the versions are not the same"
        )
        _say("warning", [line])
    else:
        print("repeated: all files match the recipe's, byte for byte")
    return {"repeated": not differing}
