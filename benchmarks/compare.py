"""Metrics, alone and with methods around them, on models, texts and sparsities.

A cell is a model, a kind of text and a target: a sparsity in each metric's own group, 2:4, or a
share of the neurons, where the reference is the published scores of neurons. Real
models are calibrated on WikiText-2 and Python's documentation and tested on both; the embedded
model (fp32) is on its own text, of which it takes 32 calibration windows of 256 tokens at most. A
relative loss increase is that of log perplexity over dense, divided by the least that a reference
has in the cell. Measurements are kept in a folder and not repeated, so a table of several models
can be made in parts.
"""

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, NotRequired, TypedDict

import typer
from rich.progress import track
from tables import ROOT, conditions, show, write_json

from prunevolve import Criterion, collect_statistics, load_model, load_tokenizer, prune, read_metric
from prunevolve.evaluation.perplexity import perplexity, window_losses
from prunevolve.evaluation.windows import Text, cut_all, share_windows
from prunevolve.pruning.baselines import BASELINES, NAMED, NEURON_BASELINES, SPARSEGPT
from prunevolve.pruning.masks import GROUPS
from prunevolve.pruning.model_name import EMBEDDED
from prunevolve.pruning.models import linear_layers
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.pruning.run.job import held_back_count
from prunevolve.pruning.run.options import MethodArguments
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.pruning.store import ResidentStore

VARIANTS: Mapping[str, MethodArguments] = {
    "plain": {},
    "update": {"update": "sparsegpt"},
    "reconstruct": {"update": "reconstruct"},
}
"""What is done beside masking, as arguments of `prune`."""

TARGETS = ("50%", "60%", "70%", "2:4")

OURS = tuple(name for name, row in NAMED.items() if row.source == "this project, 2026")


class Result(TypedDict):
    """What was measured of a model."""

    perplexity: dict[str, float]  # by kind of text
    seconds: float  # of pruning
    update_part: NotRequired[float | None]  # how much of an update stays


@dataclass(frozen=True)
class Method:
    """A metric, or SparseGPT by its name, and what is done beside."""

    metric: Criterion | str
    variant: str


@dataclass(frozen=True)
class Setting:
    """A model, and the texts on which it is calibrated and tested, those by kind."""

    model: str
    dtype: str
    calibration: tuple[Text, ...]
    tests: Mapping[str, Text]


def main(
    model: Annotated[list[str], typer.Option(help="embedded, a folder or a hub id; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder that keeps the measurements.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Name, file, run folder or GROUP:TEXT; repeatable; none: all names."),
    ] = None,
    variant: Annotated[list[str], typer.Option(help="plain, update, reconstruct.")] = ["plain"],  # noqa: B006
    reference: Annotated[
        list[str] | None, typer.Option(help="As --metric; none: the published ones.")
    ] = None,
    target: Annotated[
        list[str], typer.Option(help="Such as 50%, 2:4 or neurons 20%; repeatable.")
    ] = [*TARGETS],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of every window.")] = 512,
    windows: Annotated[int, typer.Option(help="Test windows of each kind of text.")] = 8,
    without: Annotated[
        str, typer.Option(help="Leave sentences with this out of a local calibration text.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Of the real models.")] = "bfloat16",
    json_: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Print a table of perplexities for each model, and one of relative loss increases."""
    out.mkdir(parents=True, exist_ok=True)
    of_neurons = any(goal.startswith("neurons") for goal in target)
    published = [x for x in NAMED if x not in OURS and x not in {*NEURON_BASELINES} - {*BASELINES}]
    default = NEURON_BASELINES if of_neurons else published
    references = _methods(reference or default, ["plain"])
    methods = references | _methods(metric or [*default, *OURS], variant)
    validation, test = _wikitext2()
    if without:
        validation = str(_filtered(Path(validation), without, out / "validation.txt"))
    figures: dict[str, object] = {}
    increases: dict[str, dict[str, float]] = {name: {} for name in methods}
    seconds: dict[str, list[float]] = defaultdict(list)
    for source in model:
        setting = _setting(source, dtype, validation, test, samples, seqlen, windows)
        dense, results = _measured(setting, methods, target, out)
        figures[source] = {"dense": dense, "results": results}
        _print_perplexities(setting, dense, results)
        for goal, (kind, before) in product(target, dense.items()):
            after = {name: results[name][goal]["perplexity"][kind] for name in methods}
            rises = {name: math.log(value / before) for name, value in after.items()}
            unit = min(rises[name] for name in references)
            for name, rise in rises.items():
                increases[name][f"{Path(source).name} {kind} {goal}"] = rise / unit
                seconds[name].append(results[name][goal]["seconds"])
    _print_increases(increases, seconds, samples)
    texts = {name: str(method.metric) for name, method in methods.items()}
    head = {**conditions(dtype), "metrics": texts, "references": [*references]}
    write_json(json_, {**head, **figures, "relative_rises": increases})


def _methods(metrics: Iterable[str], variants: Iterable[str]) -> dict[str, Method]:
    """Return methods by name; SparseGPT's update is its own."""
    return {
        entry if variant == "plain" else f"{entry} {variant}": Method(_metric(entry), variant)
        for entry, variant in product(metrics, variants)
        if (entry, variant) != (SPARSEGPT, "update")
    }


def _metric(entry: str) -> Criterion | str:
    """Return the metric of an entry; a group and a colon before it set its group."""
    group, colon, rest = entry.partition(":")
    if colon and group in GROUPS:
        return Criterion(read_metric(rest).metric, group)
    return entry if entry == SPARSEGPT else read_metric(entry)


def _wikitext2() -> tuple[str, str]:
    """Return the validation and the test text: those in `build/wikitext2`, or else the hub's."""
    local = ROOT / "build" / "wikitext2"
    if local.is_dir():
        return str(local / "valid.tokens.txt"), str(local / "test.raw.txt")
    return "wikitext2", "wikitext2"


def _filtered(source: Path, without: str, target: Path) -> Path:
    """Write a text without the sentences that contain a string, and return its path.

    The tokenized form of WikiText has `<unk>` in every second sentence, the raw form in none.
    """
    lines = source.read_text(encoding="utf-8").splitlines()
    sentences = (re.split(r"(?<= [.!?]) ", line.strip()) for line in lines)
    left = (" ".join(s for s in line if without not in s) for line in sentences)
    target.write_text("\n".join(left) + "\n", encoding="utf-8")
    return target


def _setting(
    model: str, dtype: str, validation: str, test: str, samples: int, seqlen: int, windows: int
) -> Setting:
    """Return the texts of a model."""
    if model == EMBEDDED:
        own = Text(EMBEDDED, "calibration", min(samples, 32), 256, seed=0)
        return Setting(model, "float32", (own,), {"own": Text(EMBEDDED, "report", None, 256)})
    parts = ((validation, "validation[:50%]"), (EMBEDDED, "training"))
    kinds = [Text(*part, samples, seqlen, seed=0) for part in parts]
    tests = {
        "text": Text(test, "test", windows, seqlen),
        "documentation": Text(EMBEDDED, "report", windows, seqlen),
    }
    return Setting(model, dtype, share_windows(kinds, [1.0, 1.0]), tests)


def _measured(
    setting: Setting, methods: Mapping[str, Method], targets: Sequence[str], out: Path
) -> tuple[dict[str, float], dict[str, dict[str, Result]]]:
    """Return the dense model's perplexities by text, and what came by method and target."""
    load = cache(lambda: Loaded(setting))

    def once(what: object, measure: Callable[[Loaded], Result]) -> Result:
        """Return what a file holds; if there is none, measure it first."""
        digest = sha256(f"{setting} {what}".encode()).hexdigest()
        path = out / f"{Path(setting.model).name}-{digest[:12]}.json"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(measure(load()), indent=1), encoding="utf-8")
            temporary.replace(path)
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        return result

    results: dict[str, dict[str, Result]] = {name: {} for name in methods}
    runs = track([*product(methods, targets)], f"measuring on {setting.model}", transient=True)
    for name, target in runs:
        measure = partial(Loaded.pruned, method=methods[name], target=target)
        results[name][target] = once((methods[name], target), measure)
    return once("dense", Loaded.measured)["perplexity"], results


class Loaded:
    """A model with its dense weights and its statistics."""

    def __init__(self, setting: Setting) -> None:
        tokenizer = load_tokenizer(setting.model)
        self._model = load_model(setting.model, setting.dtype)
        self._dense = {x: x.data for x in self._model.parameters()}  # pruning writes to none
        self._tests = {kind: text.cut(tokenizer).tokens for kind, text in setting.tests.items()}
        self._windows = cut_all(setting.calibration, tokenizer).tokens
        # As `run_prune.py` draws them to judge updates.
        count = held_back_count(len(self._windows))
        others = [replace(text, seed=1, windows=count) for text in setting.calibration]
        self._held_back = cut_all(share_windows(others, [1.0] * len(others)), tokenizer).tokens
        self._statistics = collect_statistics(self._model, frozenset(TERMINALS), self._windows)

    def measured(self, seconds: float = 0.0) -> Result:
        """Return the perplexity by kind of text, beside the seconds that pruning took."""
        store = ResidentStore(self._model)
        perplexities = {
            kind: perplexity(window_losses(store.states(text), store.logits, text))
            for kind, text in self._tests.items()
        }
        return {"perplexity": perplexities, "seconds": seconds}

    def pruned(self, method: Method, target: str) -> Result:
        """Prune, measure and restore the weights; infinite perplexities if there is no mask."""
        options: MethodArguments = {**VARIANTS[method.variant]}
        pattern, _, share = target.rpartition(" ")
        options |= {"pattern": pattern} if pattern else {}
        options |= {"pattern": share} if ":" in share else {"sparsity": float(share[:-1]) / 100}
        try:
            began = time.perf_counter()
            report = prune(
                self._model,
                method.metric,
                self._windows,
                held_back=self._held_back,
                statistics=self._statistics,
                **options,
            )
            seconds = time.perf_counter() - began
            return {**self.measured(seconds), "update_part": report.update_part}
        except DegenerateScores:
            return {"perplexity": dict.fromkeys(self._tests, math.inf), "seconds": 0.0}
        finally:
            for parameter, dense in self._dense.items():
                parameter.data = dense
            for layer in linear_layers(self._model).values():
                layer.out_features, layer.in_features = layer.weight.shape


def _print_perplexities(
    setting: Setting, dense: Mapping[str, float], results: Mapping[str, Mapping[str, Result]]
) -> None:
    base = ", ".join(f"{value:.2f} on {kind}" for kind, value in dense.items())
    rows, columns = [], []
    for name, by_target in results.items():
        columns = [f"{kind} {target}" for target, kind in product(by_target, dense)]
        values = [result["perplexity"][kind] for result in by_target.values() for kind in dense]
        rows.append([name, *(f"{x:.2f}" if x < 1000 else f"{x:.0f}" for x in values)])
    show(f"perplexity, {setting.model}, {setting.dtype}, dense {base}", ["metric", *columns], rows)


def _print_increases(
    increases: Mapping[str, Mapping[str, float]],
    seconds: Mapping[str, Sequence[float]],
    samples: int,
) -> None:
    """Print methods in the order of their mean, each with its worst cell."""
    means = {name: fmean(by_cell.values()) for name, by_cell in increases.items()}
    rows = []
    for name in sorted(means, key=means.__getitem__):
        values = increases[name]
        worst = max(values, key=values.__getitem__)
        above = f"{sum(value > 1 for value in values.values())} of {len(values)}"
        row = [name, f"{means[name]:.3f}", f"{values[worst]:.3f}", worst, above]
        rows.append([*row, f"{fmean(seconds[name]):.1f}"])
    title = f"relative loss increases, {samples} calibration windows; seconds without statistics"
    show(title, ["metric", "mean", "worst", "where", "above 1", "seconds"], rows)


if __name__ == "__main__":
    typer.run(main)
