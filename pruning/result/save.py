"""A pruned model's folder: shards, tokenizer, recipe, model card and report.

The report comes last: a folder with a report is a finished one.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from pruning.folder_store import FolderStore
from pruning.masks import Target
from pruning.metric_file import SCHEMA
from pruning.models import source_of
from pruning.names import with_revision
from pruning.progress import Progress
from pruning.result.card import Dataset, model_card
from pruning.result.verify import RECIPE, Inspector, LayerCount, check_promise
from pruning.result.work import REPORT, FolderMismatchError, write_json

CROWDED = 0.9
"""Fraction of zeros above which a layer is warned about: little is left of it."""


@dataclass(frozen=True)
class Perplexities:
    """Perplexity before and after pruning, and where it was measured (JSON-able provenance).

    Attributes:
        by_text: For each text `corpus`, `split`, and both perplexities, `dense` and `pruned`.
    """

    dense: float
    pruned: float
    provenance: Mapping[str, Any]
    by_text: Sequence[Mapping[str, Any]] = ()


def save_papers(
    store: FolderStore,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    recipe: Mapping[str, Any],
    target: Target,
    inspector: Inspector,
    perplexities: Perplexities,
    warnings: Sequence[str] = (),
    datasets: Mapping[str, Dataset] | None = None,
    on_progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Write all that makes a folder of shards a pruned model, the report last.

    Args:
        store: Has written a shard for every block into the folder.
        recipe: All that is needed to do it again; schema, versions and checksums are added. Its
            `model`, `revision`, `metric`, `group` and `calibration` are read for configs and card.
        inspector: Has looked at some of the shards, and looks at the others.
        warnings: Lines for the report, before those about the layers.
        datasets: Named corpora that the hub has, by name, for the card.
        on_progress: Told how many of the files that were not looked at yet have been read back.

    Returns:
        The report, as written.

    Raises:
        FolderMismatchError: If the folder cannot be written, or what is read back from it does
            not hold what `target` asks.
    """
    try:
        store.write_outside()
        _write_index(store, folder)
        _save_configs(store.config, with_revision(recipe["model"], recipe["revision"]), folder)
        tokenizer.save_pretrained(folder)
        layers, sums = inspector.look_at_all(folder, "save", on_progress)
        check_promise(folder, layers, target)
        lines = [*warnings, *_crowded(layers)]
        report = _report(recipe["metric"], target, perplexities, layers, lines)
        papers = {"schema": SCHEMA, **recipe, "versions": _versions(), "sha256": sums}
        write_json(folder / RECIPE, papers)
        model_card(papers, report, datasets or {}).save(folder / "README.md")
        write_json(folder / REPORT, report)
    except SafetensorError as error:
        raise FolderMismatchError(f"{str(folder)!r} cannot be written: {error}") from error
    return report


def _write_index(store: FolderStore, folder: Path) -> None:
    placed = store.placed()
    content = {"metadata": {"total_size": store.size}, "weight_map": placed}
    write_json(folder / "model.safetensors.index.json", content)


def _save_configs(config: PretrainedConfig, model: str, folder: Path) -> None:
    config.save_pretrained(folder)
    source, revision = source_of(model)
    try:
        GenerationConfig.from_pretrained(source, revision=revision).save_pretrained(folder)
    except (OSError, ValueError):
        return  # the model has none, or one that transformers refuses to write


def _report(
    metric: str,
    target: Target,
    perplexities: Perplexities,
    layers: Sequence[LayerCount],
    warnings: Sequence[str],
) -> dict[str, Any]:
    return {
        "metric": metric,
        "pattern": target.pattern_text,
        "sparsity": target.sparsity,
        "dense_perplexity": _finite(perplexities.dense),
        "pruned_perplexity": _finite(perplexities.pruned),
        "perplexity_of": dict(perplexities.provenance),
        "by_text": [
            {key: _finite(v) if isinstance(v, float) else v for key, v in text.items()}
            for text in perplexities.by_text
        ],
        "layers": [asdict(layer) for layer in layers],
        "warnings": list(warnings),
    }


def _crowded(layers: Sequence[LayerCount]) -> list[str]:
    """Return one warning about all layers of which little is left, or none."""
    crowded = [layer for layer in layers if layer.zeros > CROWDED * layer.size]
    if not crowded:
        return []
    worst = max(crowded, key=lambda layer: layer.zeros / layer.size)
    told = f"layer {worst.name} is {worst.zeros / worst.size:.1%} zeros"
    others = len(crowded) - 1
    return [
        told if not others else f"{told}, and {others} of {len(layers)} are above {CROWDED:.0%}"
    ]


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("prunevolve", "torch", "transformers", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
