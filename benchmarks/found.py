"""Metrics on models, texts and sparsities: relative rises by cell, their mean and the worst.

A cell is a model, a kind of text and a target: 50%, 60% and 70% in each metric's own group, and
2:4. Real models (bf16) are tested on the WikiText-2 test text and on Python's documentation, and
calibrated on both kinds or only on WikiText-2; the embedded model (fp32) uses its own text. A
relative rise is the rise of log perplexity over dense, divided by that of the best published metric
in the cell. With several numbers of calibration windows, a last table shows how the rises grow as
windows get fewer. Measurements are kept in a folder and not repeated, so a table of several models
can be made in parts.

`--finalists N` also takes the N fittest of each run folder. Then a last table tells whether a
metric's units or its fitness in its search foretell its rise on a model that the search did not
see: the rank correlation of the mean rise with the size of each exponent and with the fitness.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.progress import track
from safetensors.torch import load_file, save_file
from tables import (
    conditions,
    rank_correlation,
    show,
    show_rises,
    wikitext2_corpora,
    write_json,
)

from prunevolve.configs.schema import Memory
from prunevolve.evaluation.corpus import Mixture, Part
from prunevolve.pruning.baselines import FOUND, PUBLISHED
from prunevolve.pruning.leaves import LEAF_SETS
from prunevolve.pruning.masks import DegenerateScores, NOfM, Target, group_of
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.metric_file import read_metric
from prunevolve.pruning.models import EMBEDDED, load_tokenizer
from prunevolve.pruning.operators import Units
from prunevolve.search.checkpoint import read_state
from prunevolve.search.fitness import perplexity_of
from prunevolve.search.memory import keep_freed_memory
from prunevolve.search.population import Record
from prunevolve.search.resident import Resident, Subject

SPARSITIES = (0.5, 0.6, 0.7)
LEAVES = frozenset(LEAF_SETS["extended"])
GROUPS = ("row", "layer", "model")

Named = Mapping[str, Criterion]

Cells = dict[str, dict[str, float]]
"""By cell and metric, or by metric and cell."""


@dataclass(frozen=True)
class Setting:
    """The texts on which a model is calibrated and tested.

    Attributes:
        calibration: Kinds of text for the statistics: `both`, `one` or `own`.
        samples: Calibration windows of 512 tokens.
        statistics: The windows for the statistics.
        tests: The test texts by kind.
    """

    model: str
    dtype: str
    calibration: str
    samples: int
    statistics: Mixture
    tests: Mapping[str, Mixture]

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{Path(self.model).name}-{self.calibration}-{self.samples}"


def main(
    model: Annotated[list[str], typer.Option(help="embedded, a folder or a hub id; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder that keeps the measurements.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Name, file, run folder or GROUP:TEXT; repeatable.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="Published metrics to compare with, by commas; none: all.")
    ] = "",
    calibration: Annotated[str, typer.Option(help="both, one, or both,one")] = "both,one",
    samples: Annotated[
        str, typer.Option(help="Calibration windows of 512 tokens; several by commas.")
    ] = "64",
    windows: Annotated[
        int, typer.Option(help="Test windows of 512 tokens of each kind of text.")
    ] = 10,
    finalists: Annotated[
        int, typer.Option(help="Of each --metric that is a run folder, so many of the fittest.")
    ] = 0,
    without: Annotated[
        str, typer.Option(help="Leave sentences with this out of a local calibration text.")
    ] = "",
    json_: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Print a table of perplexities for each model and calibration, and one of relative rises."""
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    published = [name for name in against.split(",") if name] or list(PUBLISHED)
    if unknown := set(published) - PUBLISHED.keys():
        raise typer.BadParameter(f"no published metric is named {min(unknown)}")
    named = {name: (PUBLISHED | FOUND)[name].criterion for name in (*published, *FOUND)}
    fitness = {record.criterion: record.rank[0] for record in _fittest(metric or [], finalists)}
    for criterion in (*map(_criterion, metric or []), *fitness):
        if criterion not in named.values():
            named[str(criterion)] = criterion
    sizes = [int(size) for size in samples.split(",")]
    if len(sizes) > 1 and "wanda" not in published:
        raise typer.BadParameter("several numbers of windows are compared with wanda: add it")
    validation, test = wikitext2_corpora()
    if without:
        validation = str(_filtered(Path(validation), without, out / "validation.txt"))
    figures: dict[str, Any] = {}
    rises: dict[str, Cells] = {}
    for setting in settings_of(model, calibration.split(","), sizes, windows, validation, test):
        measured = Measured(setting, out)
        perplexities = measured.of(named)
        figures[setting.name] = {"dense": measured.dense, "perplexity": perplexities}
        _print(setting, measured.dense, perplexities, named)
        kinds = "only the first kind" if setting.calibration == "one" else "both kinds of text"
        cells = rises.setdefault(f"{setting.samples} windows of {kinds}", {})
        of_model = relative_rises(measured.dense, perplexities, published)
        cells |= {f"{Path(setting.model).name} {cell}": row for cell, row in of_model.items()}
    columns = {
        "size": {name: str(one.metric.size) for name, one in named.items()},
        "units": {name: _units(one) for name, one in named.items()},
    }
    for calibrated, cells in rises.items():
        by_metric = {name: {cell: cells[cell][name] for cell in cells} for name in named}
        title = f"relative rises over {len(cells)} cells, calibrated on {calibrated}"
        show_rises(title, by_metric, columns)
        if fitness:
            found = {one: fmean(by_metric[name].values()) for name, one in named.items()}
            _print_foretold({one: found[one] for one in fitness}, fitness)
    if len(sizes) > 1:
        _print_growth(figures, named)
    metrics = {
        name: {"metric": one.text, "group": one.group, "size": one.metric.size}
        for name, one in named.items()
    }
    head = {**conditions("bfloat16"), "metrics": metrics}
    write_json(json_, {**head, **figures, "relative_rises": rises})


def _criterion(entry: str) -> Criterion:
    """Return the metric of an entry; a group and a colon before it set its group."""
    group, colon, rest = entry.partition(":")
    if colon and group in GROUPS:
        return Criterion(read_metric(rest).metric, group)
    return read_metric(entry)


def _fittest(entries: Sequence[str], count: int) -> Iterator[Record]:
    """Yield the fittest of each entry that is a run folder."""
    for path in map(Path, entries):
        if count and (path / "checkpoint.json").is_file():
            yield from read_state(path / "checkpoint.json").finalists(count)


def _units(criterion: Criterion) -> str:
    try:
        return str(criterion.metric.units)
    except ValueError:
        return "disagree"


def relative_rises(
    dense: Mapping[str, float], perplexities: Cells, published: Sequence[str]
) -> Cells:
    """Return relative rises by cell and metric.

    Args:
        dense: Perplexity by text.
        perplexities: By metric and cell, which is a text and a target; infinite if no mask could
            be made.
        published: Metrics whose best is the unit.
    """
    by_cell_and_metric = {}
    for cell in next(iter(perplexities.values())):
        base = math.log(dense[cell.rsplit(" ", 1)[0]])
        rises = {name: math.log(by_cell[cell]) - base for name, by_cell in perplexities.items()}
        unit = min(rises[name] for name in published)
        by_cell_and_metric[cell] = {name: rise / unit for name, rise in rises.items()}
    return by_cell_and_metric


class Measured:
    """One model's perplexities, measured unless they are in a file.

    Attributes:
        dense: Perplexity by kind of text.
    """

    def __init__(self, setting: Setting, out: Path) -> None:
        self._setting, self._out = setting, out
        self._path = out / f"{setting.name}.json"
        self._resident: Resident | None = None
        # The round trip turns tuples into lists, as reading a file does.
        texts = json.loads(json.dumps(asdict(setting)))
        self._saved: dict[str, Any] = {"setting": texts, "dense": {}, "perplexity": {}}
        if self._path.exists():
            self._saved = json.loads(self._path.read_text(encoding="utf-8"))
            if self._saved["setting"] != texts:
                raise typer.BadParameter(f"{self._path} has other texts: name another folder")
        if not self._saved["dense"]:
            self._saved["dense"] = self._perplexities()
            self._save()
        self.dense: dict[str, float] = self._saved["dense"]

    def of(self, named: Named) -> Cells:
        """Return the perplexities by metric and cell."""
        saved: Cells = self._saved["perplexity"]
        missing = [c for c in named.values() if str(c) not in saved]
        for criterion in track(missing, f"measuring on {self._setting.name}", transient=True):
            saved[str(criterion)] = self._measure(criterion)
            self._save()
        return {name: saved[str(criterion)] for name, criterion in named.items()}

    def _measure(self, criterion: Criterion) -> dict[str, float]:
        group = group_of(criterion.group)
        targets = {f"{sparsity:.0%}": Target(sparsity, group) for sparsity in SPARSITIES}
        targets["2:4"] = Target(0.5, NOfM(2, 4))
        perplexities: dict[str, float] = {}
        for name, target in targets.items():
            try:
                self._loaded.prune(criterion.metric, target)
                values = self._perplexities()
            except DegenerateScores:
                values = dict.fromkeys(self._setting.tests, math.inf)
            perplexities |= {f"{kind} {name}": value for kind, value in values.items()}
        self._loaded.restore()
        return perplexities

    def _perplexities(self) -> dict[str, float]:
        return {kind: perplexity_of(self._loaded.losses(kind)) for kind in self._setting.tests}

    @property
    def _loaded(self) -> Resident:
        """The model with its statistics, once something has to be measured."""
        if self._resident is None:
            setting, tokenizer = self._setting, load_tokenizer(self._setting.model)
            windows = {kind: text.cut(tokenizer).tokens for kind, text in setting.tests.items()}
            windows["fitness"] = next(iter(windows.values()))[:1]
            windows["calibration"] = setting.statistics.cut(tokenizer).tokens
            subject = Subject(setting.model, setting.dtype)
            targets = len(SPARSITIES) + 1
            memory = Memory(scores="keep")
            resident = Resident(subject, windows, "cpu", memory, tasks=targets)
            path = self._out / f"{setting.name}.safetensors"
            if not path.exists():
                save_file(resident.collect_statistics(LEAVES), path)
            resident.use_statistics(load_file(path))
            self._resident = resident
        return self._resident

    def _save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._saved, indent=1), encoding="utf-8")
        temporary.replace(self._path)


def _filtered(source: Path, without: str, target: Path) -> Path:
    """Write a text without the sentences that contain a string, and return its path.

    The tokenized form of WikiText has `<unk>` in every second sentence, the raw form in none.
    """
    lines = source.read_text(encoding="utf-8").splitlines()
    sentences = (re.split(r"(?<= [.!?]) ", line.strip()) for line in lines)
    kept = (" ".join(s for s in line if without not in s) for line in sentences)
    target.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return target


def settings_of(
    models: Sequence[str],
    calibrations: Sequence[str],
    sizes: Sequence[int],
    windows: int,
    validation: str,
    test: str,
) -> Iterator[Setting]:
    """Yield what is measured: each model by each number of windows and kind of calibration."""
    for model, samples in product(models, sizes):
        if model == EMBEDDED:
            statistics = Mixture((Part(EMBEDDED, "calibration"),), samples // 2, 256, 0)
            report = {"own": Mixture((Part(EMBEDDED, "report"),), None, 256, None)}
            yield Setting(model, "float32", "own", samples, statistics, report)
            continue
        parts = (Part(validation, "validation[:50%]"), Part(EMBEDDED, "training"))
        tests = {
            "text": Mixture((Part(test, "test"),), windows, 512, None),
            "documentation": Mixture((Part(EMBEDDED, "report"),), windows, 512, None),
        }
        for calibration in calibrations:
            kinds = {"both": parts, "one": parts[:1]}[calibration]
            statistics = Mixture(kinds, samples, 512, 0)
            yield Setting(model, "bfloat16", calibration, samples, statistics, tests)


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


def _print_growth(figures: Mapping[str, Any], named: Named) -> None:
    """Print each metric's rise by model and windows, as a multiple of Wanda's with as many."""
    rows = []
    for name in named:
        row = []
        for setting in figures.values():
            cells = relative_rises(setting["dense"], setting["perplexity"], ["wanda"])
            values = [by_metric[name] for by_metric in cells.values()]
            two_of_four = [value[name] for cell, value in cells.items() if cell.endswith("2:4")]
            row.append(f"{fmean(values):.3f}, {fmean(two_of_four):.3f}")
        rows.append([name, *row])
    show("rises as multiples of wanda's: all cells, 2:4", ["metric", *figures], rows)


def _print_foretold(rises: Mapping[Criterion, float], fitness: Mapping[Criterion, float]) -> None:
    """Print what foretells a rise: the exponents' sizes or the fitness in the search."""
    having = [one for one in rises if _units(one) != "disagree"]
    signs = {
        f"exponent of {scale}": {one: abs(one.metric.units[place]) for one in having}
        for place, scale in enumerate(Units._fields)
    }
    rows = []
    for name, values in {**signs, "fitness in the search": fitness}.items():
        orders = [list(values.values()), [rises[one] for one in values]]
        known = all(len(set(order)) > 1 for order in orders)
        rows.append([name, str(len(values)), f"{rank_correlation(*orders):.2f}" if known else "-"])
    show("rank correlation with the mean rise", ["of", "metrics", "correlation"], rows)


if __name__ == "__main__":
    typer.run(main)
