"""Prune a model with a metric, or check a model that was pruned so.

Everything that can be wrong is looked at before the weights are read: the metric, the target, the
texts, the folder, the model's architecture, memory and disk. Exit codes: 0 done, 2 a mistake in the
request, 3 interrupted and resumable, 4 the folder does not fit the request.
"""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers.utils import logging as transformers_logging
from typer import Option

from evaluation.corpus import Windows, check_disjoint
from evaluation.mixture import Mixture
from evaluation.options import EVAL_WINDOWS, calibration_text, cut_all, evaluation_texts
from evaluation.perplexity import losses_of, perplexity
from pruning.checkpoint import open_checkpoint
from pruning.folder_store import FolderStore
from pruning.memory import keep_freed_memory
from pruning.metric_file import ResolvedMetric, resolve_metric
from pruning.models import EMBEDDED
from pruning.progress import shown_progress
from pruning.pruner import check_layers, prune
from pruning.recipe import Recipe
from pruning.result.kept import open_statistics
from pruning.result.plan import Load, Plan, make_plan, parse_size
from pruning.result.request import (
    Subject,
    make_recipe,
    resolve_subject,
    resolve_target,
    shapes_of,
    size_of,
)
from pruning.result.save import Perplexities, save_papers
from pruning.result.verify import Inspector, verify_result
from pruning.result.work import FolderMismatchError, WorkFolder, check_output_folder, opened
from pruning.spool import DiskSpool, Spool
from pruning.store import all_layers
from pruning.walk import Progress, Texts

ONE_KIND = (
    "statistics of one kind of text: what it does not need may be lost. Calibrated on "
    "encyclopaedia alone, a model of perplexity 5.2 on documentation came to 8.7 by wanda and 20.1 "
    "by snip; half of each kind made it 7.6 and 8.1. Give --corpus again for other kinds"
)
"""A warning; measured with a model of 1.5B (docs/APPLY.md)."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Request:
    """A request whose parts were checked; `calibration` is read only if the metric asks for it."""

    subject: Subject
    chosen: ResolvedMetric
    recipe: Recipe
    calibration: Mixture
    evaluation: tuple[Mixture, ...]
    out: Path
    statistics: Path | None
    plan: Plan

    @property
    def texts(self) -> dict[str, tuple[Mixture, ...]]:
        """The texts that are read, by role: no calibration for a metric of W alone."""
        texts = {"calibration": (self.calibration,), "evaluation": self.evaluation}
        return texts if self.recipe.leaves else {"evaluation": self.evaluation}

    @property
    def warnings(self) -> list[str]:
        """What makes the perplexity say less than it seems to."""
        places = {role: [p for t in texts for p in t.places] for role, texts in self.texts.items()}
        overlaps = check_disjoint(places)
        found = [f"{overlap}: the pruned perplexity is flattered" for overlap in overlaps]
        of_one_kind = self.recipe.leaves and len(self.calibration.parts) == 1
        return [*found, ONE_KIND] if of_one_kind and self.subject.model != EMBEDDED else found


@app.command()
def prune_model(
    model: Annotated[str | None, Option(help="Hub id, folder, or embedded.")] = None,
    metric: Annotated[str | None, Option(help="Baseline's name, file, or formula.")] = None,
    out: Annotated[Path | None, Option(help="New or empty folder for the result.")] = None,
    sparsity: Annotated[float | None, Option(help="Fraction to remove; default 0.5.")] = None,
    pattern: Annotated[str, Option(help="unstructured, or n:m such as 2:4.")] = "unstructured",
    group: Annotated[str | None, Option(help="row, layer, model; default the metric's.")] = None,
    propagation: Annotated[str, Option(help="one-shot or sequential.")] = "one-shot",
    corpus: Annotated[
        list[str] | None, Option(help="Calibration text; again for other kinds of text.")
    ] = None,
    split: Annotated[
        list[str] | None, Option(help="Its split, with or without a slice; one a corpus.")
    ] = None,
    share: Annotated[
        list[float] | None, Option(help="Its share of the windows; one a corpus.")
    ] = None,
    samples: Annotated[int, Option(help="Calibration windows.")] = 128,
    seqlen: Annotated[int | None, Option(help="Tokens per window; default 512.")] = None,
    seed: Annotated[int, Option(help="Draws the calibration windows.")] = 0,
    eval_corpus: Annotated[
        list[str] | None, Option(help="Text that perplexity is measured on; again for others.")
    ] = None,
    eval_split: Annotated[list[str] | None, Option(help="Its split; one a corpus.")] = None,
    eval_windows: Annotated[int | None, Option(help="Of each; default: 32, or all.")] = None,
    bos: Annotated[
        bool | None, Option("--bos/--no-bos", help="Windows begin with bos; default the model's.")
    ] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16, float16; auto: the model's.")] = "auto",
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1; default cuda or cpu.")] = None,
    max_memory: Annotated[str | None, Option(help="Such as 6GiB; default what is free.")] = None,
    statistics: Annotated[
        Path | None, Option(help="Folder to keep statistics in and reuse; or a .pth file of G.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with an unfinished folder.")] = False,
    validate: Annotated[bool, Option("--validate", help="Check and plan; read nothing.")] = False,
    verify: Annotated[Path | None, Option(help="Check a pruned model's folder.")] = None,
) -> None:
    """Prune a model with a metric and save it, or --verify a folder that was saved so."""
    with _exit_codes(out):
        if verify:
            _verify(verify, model or metric or out)
            return
        chosen = resolve_metric(_required("metric", metric))
        target = resolve_target(pattern, sparsity, group, chosen.criterion.group)
        recipe = Recipe(chosen.criterion.metric, target, propagation)
        recipe.check()
        folder = Path(_required("out", str(out or "")))
        subject = resolve_subject(_required("model", model), dtype, device, seqlen)
        text = calibration_text(
            *(corpus or [EMBEDDED], split or [], share or [], samples, subject.seqlen, seed, bos)
        )
        eval_texts = evaluation_texts(
            *(eval_corpus or [EMBEDDED], eval_split or [], eval_windows, subject.seqlen, bos)
        )
        plan = _plan(subject, recipe, text, eval_texts, max_memory)
        check_output_folder(folder, plan.disk, resume)
        request = Request(subject, chosen, recipe, text, eval_texts, folder, statistics, plan)
        _say_notes(request, corpus, dtype)
        if validate:
            _validate(request)
        else:
            _apply(request, resume)


def main() -> None:
    """Console entry: runs the command, and says a mistake in its options in one line too."""
    keep_freed_memory()
    transformers_logging.disable_progress_bar()  # one progress is enough, ours
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what clusters send before they kill
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        _say_error(error.format_message())
        sys.exit(2)


@contextmanager
def _exit_codes(out: Path | None) -> Iterator[None]:
    """Turn what can go wrong into one line and an exit code."""
    try:
        yield
    except FolderMismatchError as error:
        _say_error(str(error))
        raise typer.Exit(4) from error
    except torch.OutOfMemoryError as error:
        _say_error(f"out of memory: use a smaller --seqlen, or --device cpu ({error})")
        raise typer.Exit(2) from error
    except ValueError as error:
        _say_error(str(error))
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        begun = out is not None and out.is_dir() and any(out.iterdir())
        what = f"{str(out)!r} is not finished; " if out else ""
        how = " with --resume" if begun else ""
        print(f"interrupted: {what}run the same command again{how}", file=sys.stderr)
        raise typer.Exit(3) from error


def _say_error(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _required(name: str, value: str | None) -> str:
    if not value:
        raise ValueError(
            f"--{name} is required: give --model, --metric and --out, or --verify alone"
        )
    return value


def _plan(
    subject: Subject,
    recipe: Recipe,
    text: Mixture,
    eval_texts: Sequence[Mixture],
    max_memory: str | None,
) -> Plan:
    """Return the plan of a request, after a look at the model's shapes."""
    shapes = shapes_of(subject)
    check_layers(shapes, recipe.target)
    calibration = (text.windows or 0) if recipe.leaves else 0
    evaluation = sum(eval_text.windows or EVAL_WINDOWS for eval_text in eval_texts)
    load = Load(calibration, evaluation, subject.seqlen)
    budget = parse_size(max_memory) if max_memory else None
    return make_plan(shapes, recipe, load, subject, size_of(subject, shapes), budget)


def _say_notes(request: Request, corpus: list[str] | None, dtype: str) -> None:
    """Say what a user may not expect; `corpus` is None where the default was taken."""
    if dtype == "auto" and request.subject.dtype != request.subject.own_dtype:
        print(
            f"note: passes in {request.subject.dtype}, since this CPU has no fast arithmetic for "
            f"{request.subject.own_dtype}; the result keeps the model's dtype",
            file=sys.stderr,
        )
    if "calibration" in request.texts and corpus is None and request.subject.model != EMBEDDED:
        print(
            f"note: calibrating on the {EMBEDDED} text, since the network is never reached "
            "unasked; --corpus c4 or a file of your own suits this model better",
            file=sys.stderr,
        )


def _say_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _validate(request: Request) -> None:
    """Cut the windows that need no hub, and say the plan and what was not checked."""
    for texts in request.texts.values():
        for text in texts:
            if notes := text.check():
                print(*notes, sep="\n")
            else:
                _windows(request.subject, [text])
    _say_warnings(request.warnings)
    for line in request.plan.lines():
        print(line)
    print(f"valid: {_summary(request)}; nothing was loaded or written")


def _apply(request: Request, resume: bool) -> None:
    """Measure, prune, measure again and save, in the walks that the recipe takes."""
    subject = request.subject
    windows = {role: _windows(subject, texts) for role, texts in request.texts.items()}
    _say_warnings(request.warnings)  # not only at the end, which may be hours away
    calibration = windows.get("calibration")
    papers = make_recipe(
        subject,
        request.chosen,
        request.recipe.target,
        request.recipe.propagation,
        calibration.provenance if calibration else None,
    )
    checkpoint = open_checkpoint(subject.model, papers["revision"])
    identity = {
        **{key: papers[key] for key in papers if key not in ("model", "tree", "metric_source")},
        "model": checkpoint.fingerprint(),
        "evaluation": windows["evaluation"].provenance,
    }
    store = FolderStore(
        *(checkpoint, subject.config, subject.dtype, subject.device),
        shards=WorkFolder(request.out).result,
        held=request.plan.held,
    )
    inspector = Inspector(subject.config, all_layers(store), request.recipe.target)
    store.on_shard = inspector.look  # while it is in the system's cache
    statistics: Spool | None = None
    if request.statistics and request.recipe.leaves:
        statistics = open_statistics(request.statistics, identity, store)
    for line in (f"pruning: {_summary(request)}", *request.plan.lines()):
        print(line, file=sys.stderr)
    with shown_progress() as progress, opened(request.out, identity, resume) as work:
        if not work.is_whole:
            _prune(request, store, windows, work, statistics, progress)
            perplexities = _perplexities(work, windows["evaluation"], subject)
            save_papers(
                *(store, subject.tokenizer, work.result, papers, request.recipe.target),
                *(inspector, perplexities, request.warnings),
            )
            progress("save", 1, 1)
        report = work.publish()
    _print_outcome(request.out, report)


def _prune(
    request: Request,
    store: FolderStore,
    windows: Mapping[str, Windows],
    work: WorkFolder,
    statistics: Spool | None,
    progress: Progress,
) -> None:
    """Walk the blocks; each text's losses are put aside as soon as they are known."""
    tokens = windows["evaluation"].tokens
    known = work.losses()

    def measure(
        name: str, states: Iterator[Tensor], logits: Callable[[Tensor], Iterator[Tensor]]
    ) -> None:
        stage, total = f"{name} perplexity", len(tokens)
        losses = losses_of(states, logits, tokens, lambda done: progress(stage, done, total))
        work.keep_losses(name, losses.tolist())

    texts = Texts(
        windows["calibration"].tokens if "calibration" in windows else tokens[:0],
        {name: tokens for name in ("dense", "pruned") if name not in known},
        measure,
    )
    if statistics is None and request.plan.statistics_on_disk:
        statistics = DiskSpool(work.statistics)
    states: Spool = DiskSpool(work.states, fresh=True) if request.plan.states_on_disk else {}
    prune(store, request.recipe, texts, states, statistics, progress)
    work.forget_work()


def _perplexities(work: WorkFolder, evaluation: Windows, subject: Subject) -> Perplexities:
    losses = {name: torch.tensor(values).double() for name, values in work.losses().items()}
    kinds = torch.tensor(evaluation.kinds)
    return Perplexities(
        perplexity(losses["dense"]),
        perplexity(losses["pruned"]),
        {**evaluation.provenance, "dtype": subject.dtype},
        [
            {
                "corpus": part["corpus"],
                "split": part["split"],
                **{name: perplexity(values[kinds == kind]) for name, values in losses.items()},
            }
            for kind, part in enumerate(evaluation.parts)
        ],
    )


def _verify(folder: Path, other: object) -> None:
    if other:
        raise ValueError("--verify must stand alone: leave out --model, --metric and --out")
    print(f"{folder}: {_counts(verify_result(folder))}; counts and checksums are as reported")


def _windows(subject: Subject, texts: Sequence[Mixture]) -> Windows:
    """Cut texts into windows of tokens that the model knows."""
    return cut_all(texts, subject.tokenizer, subject.config.get_text_config().vocab_size)


def _summary(request: Request) -> str:
    target, subject = request.recipe.target, request.subject
    group = f" per {target.group_name}" if target.group_name else ""
    return (
        f"{subject.model} ({subject.dtype}, {subject.device}) by {request.chosen.criterion.text}: "
        f"{target.sparsity:.1%}, {target.pattern_text}{group}, {request.recipe.propagation}"
    )


def _counts(report: Mapping[str, Any]) -> str:
    layers = report["layers"]
    zeros, size = (sum(layer[key] for layer in layers) for key in ("zeros", "size"))
    return f"{len(layers)} layers, {zeros / size:.2%} zeros, {report['pattern']}"


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _print_outcome(out: Path, report: Mapping[str, Any]) -> None:
    place = "{corpus}, split {split}, {windows} windows of {length} = {tokens} tokens, {dtype}"
    place = place.format(**report["perplexity_of"])
    _say_warnings(report["warnings"])
    for name in ("dense", "pruned"):
        print(f"{name + ' perplexity':17} {_shown(report[f'{name}_perplexity'])} ({place})")
    for text in report["by_text"] if len(report["by_text"]) > 1 else []:
        both = ", ".join(f"{name} {_shown(text[name])}" for name in ("dense", "pruned"))
        print(f"  of {text['corpus']}, split {text['split']}: {both}")
    print(f"saved: {out} ({_counts(report)})")
    print(f"verify: prunevolve-prune --verify {shlex.quote(str(out))}")


if __name__ == "__main__":
    main()
