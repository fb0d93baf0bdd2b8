"""Prune a model with a metric, or check a model that was pruned so.

Everything that can be wrong is looked at before the weights are loaded: the metric, the target,
the texts, the folder, the model's architecture. Exit codes: 0 done, 2 a mistake in the request,
3 interrupted, 4 the folder does not fit the request.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging
from typer import Option

from evaluation.corpus import Windows, check_available, check_disjoint, token_windows
from evaluation.perplexity import perplexity, window_losses
from pruning.calibration import STATISTICS
from pruning.masks import Target
from pruning.metric_file import ResolvedMetric, resolve_metric
from pruning.models import EMBEDDED, load_model
from pruning.progress import shown_progress
from pruning.pruner import Progress, check_propagation, prune
from pruning.request import (
    Subject,
    check_layers,
    make_recipe,
    resolve_subject,
    resolve_target,
)
from pruning.result import (
    FolderMismatchError,
    Perplexities,
    check_output_folder,
    save_result,
    verify_result,
)

EVAL_WINDOWS = 32

SPLITS = {
    EMBEDDED: ("calibration", "report"),
    "wikitext2": ("train", "test"),
    "c4": ("train", "validation"),
    "ptb": ("train", "test"),
}
"""Splits for calibration and for evaluation; a local file has one, which is `all` of it."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Text:
    """Windows to cut from a corpus: None of them means as many as there are, up to a limit."""

    corpus: str
    split: str
    windows: int | None
    length: int
    seed: int | None


@dataclass(frozen=True)
class Request:
    """A request whose parts were checked; `calibration` is read only if the metric asks for it."""

    subject: Subject
    chosen: ResolvedMetric
    target: Target
    propagation: str
    calibration: Text
    evaluation: Text
    out: Path

    @property
    def texts(self) -> dict[str, Text]:
        """The texts that are read, by role: no calibration for a metric of W alone."""
        texts = {"calibration": self.calibration, "evaluation": self.evaluation}
        return texts if self.chosen.metric.leaves & STATISTICS else {"evaluation": self.evaluation}

    @property
    def warnings(self) -> list[str]:
        """What makes the perplexity say less than it seems to."""
        overlaps = check_disjoint({r: (text.corpus, text.split) for r, text in self.texts.items()})
        return [f"{overlap}: the pruned perplexity is flattered" for overlap in overlaps]


@app.command()
def prune_model(
    model: Annotated[str | None, Option(help="Hub id, folder, or embedded.")] = None,
    metric: Annotated[str | None, Option(help="Baseline's name, file, or formula.")] = None,
    out: Annotated[Path | None, Option(help="New or empty folder for the result.")] = None,
    sparsity: Annotated[float | None, Option(help="Fraction to remove; default 0.5.")] = None,
    pattern: Annotated[str, Option(help="unstructured, or n:m such as 2:4.")] = "unstructured",
    group: Annotated[str | None, Option(help="row, layer, model; default the metric's.")] = None,
    propagation: Annotated[str, Option(help="one-shot or sequential.")] = "one-shot",
    corpus: Annotated[str | None, Option(help="Calibration text; default embedded.")] = None,
    split: Annotated[str | None, Option(help="Its split, with or without a slice.")] = None,
    samples: Annotated[int, Option(help="Calibration windows.")] = 128,
    seqlen: Annotated[int | None, Option(help="Tokens per window; default 512.")] = None,
    seed: Annotated[int, Option(help="Draws the calibration windows.")] = 0,
    eval_corpus: Annotated[str, Option(help="Text that perplexity is measured on.")] = EMBEDDED,
    eval_split: Annotated[str | None, Option(help="Its split.")] = None,
    eval_windows: Annotated[int | None, Option(help="Default: 32, or all.")] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16, float16; auto: the model's.")] = "auto",
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1; default cuda or cpu.")] = None,
    validate: Annotated[bool, Option("--validate", help="Check only; load no weights.")] = False,
    verify: Annotated[Path | None, Option(help="Check a pruned model's folder.")] = None,
) -> None:
    """Prune a model with a metric and save it, or --verify a folder that was saved so."""
    with _exit_codes(out):
        if verify:
            _verify(verify, model or metric or out)
            return
        chosen = resolve_metric(_required("metric", metric))
        target = resolve_target(pattern, sparsity, group, chosen.group)
        check_propagation(propagation, target)
        folder = Path(_required("out", str(out or "")))
        subject = resolve_subject(_required("model", model), dtype, device, seqlen)
        check_output_folder(folder, check_layers(subject, target))
        text = _text(corpus or EMBEDDED, split, 0, samples, subject.seqlen, seed)
        eval_text = _text(eval_corpus, eval_split, 1, eval_windows, subject.seqlen, None)
        request = Request(subject, chosen, target, propagation, text, eval_text, folder)
        _say_notes(request, corpus)
        (_validate if validate else _apply)(request)


def main() -> None:
    """Console entry: runs the command, and says a mistake in its options in one line too."""
    transformers_logging.disable_progress_bar()  # one progress is enough, ours
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
        left = "remove it and " if out and out.is_dir() and any(out.iterdir()) else ""
        what = f"{str(out)!r} is not finished; {left}run" if out else "run"
        print(f"interrupted: {what} the same command again", file=sys.stderr)
        raise typer.Exit(3) from error


def _say_error(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _required(name: str, value: str | None) -> str:
    if not value:
        raise ValueError(
            f"--{name} is required: give --model, --metric and --out, or --verify alone"
        )
    return value


def _text(
    corpus: str, split: str | None, role: int, windows: int | None, length: int, seed: int | None
) -> Text:
    """Return the windows of a role (0 calibration, 1 evaluation), its corpus and split checked."""
    if windows is not None and windows < 1:
        raise ValueError(f"{('samples', 'eval-windows')[role]} must be at least 1, got {windows}")
    default = SPLITS[corpus][role] if corpus in SPLITS else "all"
    text = Text(corpus, split or default, windows, length, seed)
    check_available(text.corpus, text.split)
    return text


def _say_notes(request: Request, corpus: str | None) -> None:
    """Say what a user may not expect; `corpus` is None where the default was taken."""
    if "calibration" in request.texts and corpus is None and request.subject.model != EMBEDDED:
        print(
            f"note: calibrating on the {EMBEDDED} text, since the network is never reached "
            "unasked; --corpus c4 or a file of your own suits this model better",
            file=sys.stderr,
        )
    for warning in request.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _validate(request: Request) -> None:
    """Cut the windows that need no hub, and say what was not checked."""
    for text in request.texts.values():
        if note := check_available(text.corpus, text.split):
            print(note)
        else:
            _windows(request.subject, text)
    print(f"valid: {_summary(request)}; nothing was loaded or written")


def _apply(request: Request) -> None:
    """Measure, prune, measure again, save."""
    subject, metric = request.subject, request.chosen.metric
    windows = {role: _windows(subject, text) for role, text in request.texts.items()}
    evaluation, calibration = windows["evaluation"], windows.get("calibration")
    print(f"pruning: {_summary(request)}", file=sys.stderr)
    with shown_progress() as progress:
        model = load_model(subject.model, subject.dtype, subject.device)
        dense = _perplexity(model, evaluation, "dense perplexity", progress)
        tokens = calibration.tokens if calibration else evaluation.tokens[:0]
        prune(model, metric, request.target, tokens, request.propagation, progress)
        pruned = _perplexity(model, evaluation, "pruned perplexity", progress)
    perplexities = Perplexities(dense, pruned, {**evaluation.provenance, "dtype": subject.dtype})
    recipe = make_recipe(
        subject,
        request.chosen,
        request.target,
        request.propagation,
        calibration.provenance if calibration else None,
    )
    report = save_result(
        model,
        subject.tokenizer,
        request.out,
        recipe,
        request.target,
        perplexities,
        request.warnings,
    )
    _print_outcome(request.out, report, perplexities)


def _verify(folder: Path, other: object) -> None:
    if other:
        raise ValueError("--verify must stand alone: leave out --model, --metric and --out")
    print(f"{folder}: {_counts(verify_result(folder))}; counts and checksums are as reported")


def _windows(subject: Subject, text: Text) -> Windows:
    """Cut a text into windows, and check that the model knows all of its tokens."""
    arguments = (text.length, text.seed)
    cut = token_windows(subject.tokenizer, text.corpus, text.split, text.windows, *arguments)
    if text.windows is None and len(cut.tokens) > EVAL_WINDOWS:
        cut = token_windows(subject.tokenizer, text.corpus, text.split, EVAL_WINDOWS, *arguments)
    vocabulary, largest = subject.config.get_text_config().vocab_size, int(cut.tokens.max())
    if largest >= vocabulary:
        raise ValueError(
            f"tokenizer of {subject.model!r} must stay below the model's vocab_size of "
            f"{vocabulary}, got token {largest}: it belongs to another model"
        )
    return cut


def _perplexity(model: PreTrainedModel, windows: Windows, stage: str, progress: Progress) -> float:
    total = len(windows.tokens)
    return perplexity(
        window_losses(model, windows.tokens, lambda done: progress(stage, done, total))
    )


def _summary(request: Request) -> str:
    target, subject = request.target, request.subject
    group = f" per {target.group_name}" if target.group_name else ""
    return (
        f"{subject.model} ({subject.dtype}, {subject.device}) by {request.chosen.metric.text}: "
        f"{target.sparsity:.1%}, {target.pattern_text}{group}, {request.propagation}"
    )


def _counts(report: Mapping[str, Any]) -> str:
    layers = report["layers"]
    zeros, size = (sum(layer[key] for layer in layers) for key in ("zeros", "size"))
    return f"{len(layers)} layers, {zeros / size:.2%} zeros, {report['pattern']}"


def _print_outcome(out: Path, report: Mapping[str, Any], perplexities: Perplexities) -> None:
    place = "{corpus}, split {split}, {windows} windows of {length} = {tokens} tokens, {dtype}"
    place = place.format(**perplexities.provenance)
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"dense perplexity  {perplexities.dense:.4f} ({place})")
    print(f"pruned perplexity {perplexities.pruned:.4f} ({place})")
    print(f"saved: {out} ({_counts(report)})")
    print(f"verify: prunevolve-prune --verify {shlex.quote(str(out))}")


if __name__ == "__main__":
    main()
