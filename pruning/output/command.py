"""What `run_prune.py` does: plan a request, carry it out, verify a result, or measure a model."""

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
from prunevolve.pruning.checkpoint import Checkpoint
from prunevolve.pruning.json_file import JsonObject, write_json
from prunevolve.pruning.models import hub_id, load_model
from prunevolve.pruning.output.folder import REPORT, WorkFolder, work_folder
from prunevolve.pruning.output.kept_statistics import kept_statistics
from prunevolve.pruning.output.options import Options, read_recipe
from prunevolve.pruning.output.request import Request, evaluation_texts
from prunevolve.pruning.output.save import finite, save_result
from prunevolve.pruning.output.verify import RECIPE, Inspector, verify_result
from prunevolve.pruning.progress import Progress, on_stderr, shown_progress
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.spool import DiskSpool, Spool
from prunevolve.pruning.store import FolderStore, ResidentStore, all_layers
from prunevolve.pruning.unloaded import UnloadedModel, resolve_model
from prunevolve.pruning.walk import Texts

_DECIDES = (
    "metric",
    "group",
    "pattern",
    "sparsity",
    "propagation",
    "update",
    "allocation",
    "refine",
    "calibration",
    "dtype",
    "device",
)
"""What a result depends on, of all that its recipe says."""


def validate(request: Request) -> JsonObject:
    """Cut the windows of local texts, and print the plan and what was not checked."""
    _say("note", request.notes)
    unchecked: list[str] = []
    for texts in request.texts.values():
        for text in texts:
            if note := text.check():
                print(note)
                unchecked.append(note)
            else:
                text.cut(request.model.tokenizer)
    if tasks := request.options.zero_shot:
        print(line := f"data sets of zero-shot tasks {', '.join(tasks)}: not checked")
        unchecked.append(line)
    if hub_id(request.model.name):
        print(line := f"weights of model {request.model.name}: on the hub: not checked")
        unchecked.append(line)
    _say("warning", request.warnings)
    plan = request.plan_lines
    print(*plan, sep="\n")
    print(f"valid: {request}; nothing was loaded or written")
    return {
        "options": request.options.to_json(),
        "plan": plan,
        "not_checked": unchecked,
        "warnings": request.warnings,
    }


def apply(request: Request, resume: bool, expected: Mapping[str, str] | None) -> JsonObject:
    """Measure, prune, measure again and save, in as few walks as the recipe allows.

    Args:
        expected: sha256 of the files that the result should have, by name, if known.

    Returns:
        What `--json` prints.

    Raises:
        FolderMismatchError: If a folder belongs to another request or cannot be written.
        ValueError: If a text is too short, scores make no mask, or memory runs out.
    """
    model = request.model
    _say("note", request.notes)
    with on_stderr().status("reading the texts and the zero-shot tasks"):
        windows = {role: cut_all(texts, model.tokenizer) for role, texts in request.texts.items()}
        tasks = zero_shot.load_tasks(request.options.zero_shot or [])
    checkpoint = model.open()
    calibration = windows.get("calibration")
    warnings = request.warnings
    if calibration and (special := special_note(calibration.tokens, model.tokenizer)):
        warnings.append(special)
    _say("warning", warnings)  # not at the end, which may be hours away
    recipe = request.papers(calibration.provenance if calibration else None)
    identity = {key: recipe[key] for key in _DECIDES} | {
        "model": checkpoint.fingerprint(),
        "evaluation": windows["evaluation"].provenance,
        "zero_shot": request.options.zero_shot,
    }
    store = _store(request, checkpoint)
    print(f"pruning: {request}", *request.plan_lines, sep="\n", file=sys.stderr)
    statistics = kept_statistics(request.statistics, identity, store)
    with (
        _out_of_memory_in_one_line(),
        shown_progress(on_stderr()) as progress,
        work_folder(request.out, identity, resume) as work,
    ):
        write_json(work.asked, request.asked(expected))
        if not work.is_whole:
            inspector = Inspector(model.config, all_layers(store), request.recipe.target)
            run = _Run(request, windows, tasks, work, inspector, progress)
            run.save(store, statistics, recipe, warnings)
        report = work.publish()
    _say("warning", [line for line in report["warnings"] if line not in warnings])
    _print_outcome(request.out, report)
    figures = {key: value for key, value in report.items() if key != "layers"}
    figures["group"] = request.recipe.target.group_name
    return _summary(request.out, report) | figures | _comparison(request.out, expected)


def _store(request: Request, checkpoint: Checkpoint) -> FolderStore:
    model, shards = request.model, WorkFolder(request.out).result
    of_model = (model.config, model.dtype, model.device)
    return FolderStore(checkpoint, *of_model, shards, request.plan.resident)


def verify(folder: Path) -> JsonObject:
    """Check a pruned model's folder against its report; return what `--json` prints."""
    with shown_progress(on_stderr()) as progress:
        report = verify_result(folder, progress)
    print(f"{folder}: {_counts(report)}; counts and checksums are as reported")
    return _summary(folder, report)


def evaluate(name: str, options: Options, device: str | None) -> JsonObject:
    """Measure a model, pruned or not; return what `--json` prints.

    Args:
        name: As for `hub_id`.
        options: Those that say what a pruning measures, and how.

    Raises:
        ValueError: If there is no such model, text or task, or memory runs out.
    """
    transformers_logging.disable_progress_bar()  # this program shows its own progress
    with on_stderr().status("reading the model's config, the texts and the tasks"):
        dtype = options.dtype or "auto"
        model = resolve_model(name, dtype, device, options.seqlen, options.revision)
        windows = cut_all(evaluation_texts(options, model.seqlen), model.tokenizer)
        zero_shot.check_tasks(options.zero_shot or [])
        tasks = zero_shot.load_tasks(options.zero_shot or [])
    with _out_of_memory_in_one_line(), shown_progress(on_stderr()) as progress:
        live, total = load_model(model.name, model.dtype, model.device), len(windows.tokens)
        losses = window_losses(
            ResidentStore(live), windows.tokens, lambda done: progress("perplexity", done, total)
        )
        scores = zero_shot.evaluate_tasks(live, model.tokenizer, tasks) if tasks else None
    perplexities = {
        "perplexity": perplexity(losses),
        "perplexity_of": {**windows.provenance, "dtype": model.dtype},
        "by_text": _by_text({"perplexity": losses}, windows),
    }
    measured = finite(perplexities) | ({"zero_shot": {"measured": scores}} if scores else {})
    _print_measured(measured)
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

    request: Request
    windows: Mapping[str, Windows]
    tasks: zero_shot.Tasks
    work: WorkFolder
    inspector: Inspector
    progress: Progress

    def save(
        self, store: FolderStore, statistics: Spool | None, recipe: JsonObject, warnings: list[str]
    ) -> None:
        """Measure the model, prune it, measure it again and save it with its recipe and report."""
        model, inspector = self.request.model, self.inspector
        inspector.shares = self.work.known().get("shares", {})
        dense = self._scores("dense", model.name) if self.tasks else {}
        self._prune(store, statistics)
        report = _measured(self.work, self.windows["evaluation"], model) | {"warnings": warnings}
        recipe |= {"shares": inspector.shares} if inspector.shares else {}

        def measure_saved(folder: Path) -> JsonObject:
            if not self.tasks:
                return {}
            return {"zero_shot": {"dense": dense, "pruned": self._scores("pruned", str(folder))}}

        save_result(store, model.tokenizer, recipe, report, inspector, self.progress, measure_saved)

    def _prune(self, store: FolderStore, statistics: Spool | None) -> None:
        """Walk the blocks, and keep what is found out as soon as it is known."""
        tokens, known = self.windows["evaluation"].tokens, self.work.known()

        def measure(
            name: str, states: Iterator[Tensor], logits: Callable[[Tensor], Iterator[Tensor]]
        ) -> None:
            stage, total = f"{name} perplexity", len(tokens)
            losses = losses_of(
                states, logits, tokens, lambda done: self.progress(stage, done, total)
            )
            self.work.keep(name, losses.tolist())

        def tell(name: str, value: JsonObject) -> None:
            if name == "shares":
                self.inspector.shares = value
                self.work.keep(name, value)
            else:
                self.work.keep("training", {**self.work.known().get("training", {}), name: value})

        texts = Texts(
            self.windows["calibration"].tokens if "calibration" in self.windows else tokens[:0],
            {name: tokens for name in ("dense", "pruned") if name not in known},
            measure,
        )
        if statistics is None and "statistics" in self.request.plan.on_disk:
            statistics = self._spool("statistics")
        states = self._spool("hidden states")
        store.on_shard = self.inspector.look  # while the shard is in the system's cache
        recipe = self.request.recipe
        prune(store, recipe, texts, states, statistics, self.progress, tell=tell)
        self.work.forget_work()

    def _scores(self, name: str, place: str) -> zero_shot.Scores:
        """Return a model's zero-shot results, which are kept as soon as they are known.

        Args:
            name: `dense` or `pruned`.
            place: Where it is loaded from, in the dtype and on the device of the other passes.
        """
        stage, model = f"{name} zero-shot", self.request.model
        if stage not in self.work.known():
            live = load_model(place, model.dtype, model.device)
            self.work.keep(stage, zero_shot.evaluate_tasks(live, model.tokenizer, self.tasks))
            self.progress(stage, 1, 1)
        scores: zero_shot.Scores = self.work.known()[stage]
        return scores

    def _spool(self, what: str) -> Spool:
        """Return a place for the statistics, or an empty one for the hidden states, as planned."""
        if what not in self.request.plan.on_disk:
            return {}
        if what == "hidden states":
            return DiskSpool(self.work.states, fresh=True)
        return DiskSpool(self.work.statistics)


def _measured(work: WorkFolder, evaluation: Windows, model: UnloadedModel) -> JsonObject:
    """Return what the report says of perplexity."""
    known = work.known()
    losses = {name: torch.tensor(known[name]).double() for name in ("dense", "pruned")}
    return {
        "dense_perplexity": perplexity(losses["dense"]),
        "pruned_perplexity": perplexity(losses["pruned"]),
        "perplexity_of": {**evaluation.provenance, "dtype": model.dtype},
        "by_text": _by_text(losses, evaluation),
        **{name: known[name] for name in ("training",) if name in known},
    }


def _by_text(losses: Mapping[str, Tensor], evaluation: Windows) -> list[JsonObject]:
    kinds = torch.tensor(evaluation.kinds)
    return [
        {"corpus": part["corpus"], "split": part["split"]}
        | {name: perplexity(values[kinds == kind]) for name, values in losses.items()}
        for kind, part in enumerate(evaluation.parts)
    ]


def _counts(report: JsonObject) -> str:
    layers = report["layers"]
    zeros, size = (sum(layer[key] for layer in layers) for key in ("zeros", "size"))
    return f"{len(layers)} layers, {zeros / size:.2%} zeros, {report['pattern']}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _print_outcome(out: Path, report: JsonObject) -> None:
    source = _source(report)
    for name in ("dense", "pruned"):
        print(f"{name + ' perplexity':17} {_number(report[f'{name}_perplexity'])} ({source})")
    for text in report["by_text"] if len(report["by_text"]) > 1 else []:
        both = ", ".join(f"{name} {_number(text[name])}" for name in ("dense", "pruned"))
        print(f"  of {text['corpus']}, split {text['split']}: {both}")
    for line in zero_shot.lines(report):
        print(line)
    print(f"saved: {out} ({_counts(report)})")
    print(f"verify: python run_prune.py --verify {shlex.quote(str(out))}")


def _print_measured(measured: JsonObject) -> None:
    print(f"perplexity {_number(measured['perplexity'])} ({_source(measured)})")
    for text in measured["by_text"] if len(measured["by_text"]) > 1 else []:
        print(f"  of {text['corpus']}, split {text['split']}: {_number(text['perplexity'])}")
    for line in zero_shot.lines(measured):
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
    _, sums = read_recipe(str(folder / RECIPE))
    assert sums is not None
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
