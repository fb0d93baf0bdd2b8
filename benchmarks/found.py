"""Metrics on models, texts and sparsities: loss increases by cell, their mean and the worst.

A cell is a model, a kind of text and a target: 50%, 60% and 70% in each metric's own group, and
2:4. Real models are tested on the WikiText-2 test text and on Python's documentation, and
calibrated on both kinds or only on WikiText-2; the embedded model (fp32) uses its own text. A
relative loss increase is that of log perplexity over dense, divided by the best published metric's
in the cell. Measurements are kept in a folder and not repeated, so a table of several models can be
made in parts.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from tables import conditions, kept, show, show_rises, wikitext2_corpora, write_json

from prunevolve import Criterion, collect_statistics, load_model, load_tokenizer, prune, read_metric
from prunevolve.evaluation.perplexity import perplexity, window_losses
from prunevolve.evaluation.windows import Text, cut_all, share_windows
from prunevolve.pruning.baselines import FOUND, PUBLISHED
from prunevolve.pruning.masks import GROUPS
from prunevolve.pruning.models import EMBEDDED
from prunevolve.pruning.parse import named_metric
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.pruning.store import ResidentStore

TARGETS: Mapping[str, Mapping[str, Any]] = {
    **{f"{percent}%": {"sparsity": percent / 100} for percent in (50, 60, 70)},
    "2:4": {"pattern": "2:4"},
}
"""Arguments of `prune` by their name in a table."""

Named = Mapping[str, Criterion]

Cells = dict[str, dict[str, float]]
"""By cell and metric, or by metric and cell."""


@dataclass(frozen=True)
class Setting:
    """The texts on which a model is calibrated and tested.

    Attributes:
        statistics: The windows for the statistics.
        tests: The test texts by kind.
    """

    model: str
    dtype: str
    statistics: tuple[Text, ...]
    tests: Mapping[str, Text]

    @property
    def name(self) -> str:
        """A name for files, which differs where any text does."""
        digest = sha256(repr(self).encode()).hexdigest()
        return f"{Path(self.model).name}-{digest[:8]}"


def main(
    model: Annotated[list[str], typer.Option(help="embedded, a folder or a hub id; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder that keeps the measurements.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Name, file, run folder or GROUP:TEXT; repeatable.")
    ] = None,
    calibration: Annotated[str, typer.Option(help="Kinds of text: both, or one.")] = "both",
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 64,
    windows: Annotated[int, typer.Option(help="Test windows of each kind of text.")] = 8,
    without: Annotated[
        str, typer.Option(help="Leave sentences with this out of a local calibration text.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Of the real models.")] = "bfloat16",
    json_: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Print a table of perplexities for each model, and one of relative loss increases."""
    out.mkdir(parents=True, exist_ok=True)
    named = {name: named_metric(name) for name in PUBLISHED | FOUND}
    for criterion in map(_criterion, metric or []):
        if criterion not in named.values():
            named[str(criterion)] = criterion
    validation, test = wikitext2_corpora()
    if without:
        validation = str(_filtered(Path(validation), without, out / "validation.txt"))
    figures: dict[str, Any] = {}
    cells: Cells = {}
    for one in model:
        setting = _setting(one, dtype, calibration, samples, windows, validation, test)
        dense, perplexities = _measured(setting, named, out)
        figures[setting.name] = {"dense": dense, "perplexity": perplexities}
        _print(setting, dense, perplexities, named)
        of_model = _relative_rises(dense, perplexities)
        cells |= {f"{Path(one).name} {cell}": row for cell, row in of_model.items()}
    kinds = "only the first kind" if calibration == "one" else "both kinds of text"
    title = (
        f"relative loss increases, {len(cells)} cells, calibrated on {samples} windows of {kinds}"
    )
    by_metric = {name: {cell: cells[cell][name] for cell in cells} for name in named}
    sizes = {name: str(one.metric.size) for name, one in named.items()}
    show_rises(title, by_metric, {"size": sizes})
    metrics = {name: {"metric": one.text, "group": one.group} for name, one in named.items()}
    head = {**conditions(dtype), "metrics": metrics}
    write_json(json_, {**head, **figures, "relative_rises": cells})


def _criterion(entry: str) -> Criterion:
    """Return the metric of an entry; a group and a colon before it set its group."""
    group, colon, rest = entry.partition(":")
    if colon and group in GROUPS:
        return Criterion(read_metric(rest).metric, group)
    return read_metric(entry)


def _relative_rises(dense: Mapping[str, float], perplexities: Cells) -> Cells:
    """Return relative loss increases by cell and metric.

    Args:
        dense: Perplexity by text.
        perplexities: By metric and cell, which is a text and a target; infinite if no mask could
            be made.
    """
    by_cell_and_metric = {}
    for cell in next(iter(perplexities.values())):
        base = math.log(dense[cell.rsplit(" ", 1)[0]])
        rises = {name: math.log(by_cell[cell]) - base for name, by_cell in perplexities.items()}
        unit = min(rises[name] for name in PUBLISHED)
        by_cell_and_metric[cell] = {name: rise / unit for name, rise in rises.items()}
    return by_cell_and_metric


def _measured(setting: Setting, named: Named, out: Path) -> tuple[dict[str, float], Cells]:
    """Return perplexities, of the dense model by text, and of the metrics by name and cell."""
    load = cache(lambda: Loaded(setting))

    def once(name: str, measure: Callable[[Loaded], dict[str, float]]) -> dict[str, float]:
        digest = sha256(name.encode()).hexdigest()
        return kept(out / f"{setting.name}-{digest[:8]}.json", lambda: measure(load()))

    metrics = track(named.items(), f"measuring on {setting.name}", transient=True)
    dense = once("dense", Loaded.perplexities)
    return dense, {
        name: once(str(one), partial(Loaded.pruned, criterion=one)) for name, one in metrics
    }


class Loaded:
    """A model with its dense weights and its statistics."""

    def __init__(self, setting: Setting) -> None:
        tokenizer = load_tokenizer(setting.model)
        self._model = load_model(setting.model, setting.dtype)
        self._dense = {name: x.clone() for name, x in self._model.state_dict().items()}
        self._tests = {kind: text.cut(tokenizer).tokens for kind, text in setting.tests.items()}
        windows = cut_all(setting.statistics, tokenizer).tokens
        self._statistics = collect_statistics(self._model, frozenset(TERMINALS), windows)

    def perplexities(self) -> dict[str, float]:
        """Return the perplexity by kind of text."""
        store = ResidentStore(self._model)
        return {
            kind: perplexity(window_losses(store.states(text), store.logits, text))
            for kind, text in self._tests.items()
        }

    def pruned(self, criterion: Criterion) -> dict[str, float]:
        """Return the perplexity by cell: prune for each target, measure, restore the weights."""
        by_cell: dict[str, float] = {}
        for target, arguments in TARGETS.items():
            try:
                prune(self._model, criterion, statistics=self._statistics, **arguments)
                found = self.perplexities()
            except DegenerateScores:
                found = dict.fromkeys(self._tests, math.inf)
            by_cell |= {f"{kind} {target}": value for kind, value in found.items()}
            self._model.load_state_dict(self._dense)
        return by_cell


def _filtered(source: Path, without: str, target: Path) -> Path:
    """Write a text without the sentences that contain a string, and return its path.

    The tokenized form of WikiText has `<unk>` in every second sentence, the raw form in none.
    """
    lines = source.read_text(encoding="utf-8").splitlines()
    sentences = (re.split(r"(?<= [.!?]) ", line.strip()) for line in lines)
    kept = (" ".join(s for s in line if without not in s) for line in sentences)
    target.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return target


def _setting(
    model: str,
    dtype: str,
    calibration: str,
    samples: int,
    windows: int,
    validation: str,
    test: str,
) -> Setting:
    """Return the texts of a model."""
    if model == EMBEDDED:
        own = (Text(EMBEDDED, "calibration", samples // 2, 256, seed=0),)
        return Setting(model, "float32", own, {"own": Text(EMBEDDED, "report", None, 256)})
    places = [(validation, "validation[:50%]"), (EMBEDDED, "training")]
    texts = [Text(*place, samples, 512, seed=0) for place in places]
    kinds = {"both": texts, "one": texts[:1]}[calibration]
    statistics = share_windows(kinds, [1.0] * len(kinds))
    tests = {
        "text": Text(test, "test", windows, 512),
        "documentation": Text(EMBEDDED, "report", windows, 512),
    }
    return Setting(model, dtype, statistics, tests)


def _print(setting: Setting, dense: Mapping[str, float], perplexities: Cells, named: Named) -> None:
    base = ", ".join(f"{value:.2f} on {kind}" for kind, value in dense.items())
    columns = list(next(iter(perplexities.values())))
    rows = []
    for name, by_cell in perplexities.items():
        values = [by_cell[column] for column in columns]
        texts = [f"{value:.2f}" if value < 1000 else f"{value:.0f}" for value in values]
        rows.append([name, named[name].group, *texts])
    title = f"perplexity, {setting.name}, {setting.dtype}, dense {base}"
    show(title, ["metric", "group", *columns], rows)


if __name__ == "__main__":
    typer.run(main)
