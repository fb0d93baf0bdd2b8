"""A made-up run with all that a report can show: two tasks, finalists, a path of factors."""

import json
import random
from pathlib import Path
from typing import Any

from toy_records import record_of

from prunevolve.configs import schema
from prunevolve.search.breeding.variation import Breeder, seeded
from prunevolve.search.records import OUTCOMES, Record
from prunevolve.search.run_folder import RunFolder

WINNER = "mul(W, add(G, sqr(W)))"
CONFIG = schema.load(None, ["tasks=[{sparsity: 0.6}, {pattern: 2:4}]", "search.seed=7"])

STATUS = {
    "outcomes": {"evaluated": 28, "stopped": 0, "failed": 2},
    "per_hour": 3600.0,
    "workers": {"ready": 2, "busy": 1, "starting": 0},
    "faults": {"lost": 3},
    "trouble": "lost: it ended",
    "best": {"metric": "mul(W, X)", "group": "row", "fitness": 0.9},
}


def records_of(count: int) -> list[Record]:
    """Return a journal in which each candidate descends from the two before it; the last wins."""
    draw = random.Random(0)
    bred = Breeder(CONFIG.search.model_copy(update={"primitives": "release"}), "row")
    records = []
    for index in range(count):
        with seeded(index):
            metric = bred.varied.random()
        last = index == count - 1
        kind = "evaluated" if last or index % 3 else draw.choice(OUTCOMES[1:])
        fitness = 0.9 if last else 1.0 + draw.expovariate(3 + index / 100)
        records.append(
            record_of(
                index,
                WINNER if last else metric.text,
                fitness if kind == "evaluated" else None,
                kind=kind,
                fingerprint=f"{index:016x}",
                parents=(index - 2, index - 1) if index >= 2 else (),
            )
        )
    return records


def task_of(**changes: Any) -> dict[str, Any]:
    return {
        **{"name": "embedded 60%", "model": "embedded", "weight": 1.0},
        **{"sparsity": 0.6, "pattern": "unstructured", "best": {"perplexity": 30.0}},
        "dense": 25.0,
        "baselines": {"wanda": 35.0, "snip": 50.0},
        "behind_best": {
            "wanda": {"nats": 0.15, "standard_error": 0.01},
            "snip": {"nats": 0.5, "standard_error": None},
        },
        "by_text": [],
        "perplexity_of": {
            **{"corpus": "embedded", "split": "report", "windows": 3, "length": 32},
            **{"tokens": 96, "dtype": "float32"},
        },
        **changes,
    }


def finalist_of(record: Record, name: str, factors: int, **changes: Any) -> dict[str, Any]:
    fields = {"name": name, "factors": factors, "selection": 0.95, "left_out": None}
    return {**fields, **record.described, **changes}


def summary_of(records: list[Record], **changes: Any) -> dict[str, Any]:
    best = records[-1]
    behind = {
        "wanda": {"nats": -0.13, "standard_error": 0.02},
        "snip": {"nats": 0.22, "standard_error": None},
    }
    other = task_of(name="embedded 2:4", pattern="2:4", behind_best=behind)
    other["best"] = {"perplexity": 40.0}
    chosen = finalist_of(best, f"{best.index}-1", 2, left_out="sqrt(X)")
    whole = finalist_of(best, str(best.index), 3, metric=f"mul({WINNER}, sqrt(X))", size=8)
    worse, at_best = {"difference": 0.25, "standard_error": 0.01}, {"difference": 0.0}
    path = [
        {**whole, **at_best, "standard_error": 0.0, "chosen": False},
        {**chosen, **worse, "chosen": True},
    ]
    fields: dict[str, Any] = {
        **{"verdict": "", "candidates": len(records), "seconds": 12.5},
        "best": {**chosen, "perplexity": 30.0},
        "selection": path,
        "path": path,
        "outcomes": {kind: sum(r.outcome.kind == kind for r in records) for kind in OUTCOMES},
        "pruning": {"sparsity": 0.6, "pattern": "unstructured", "group": "row"},
        "tasks": [task_of(), other],
    }
    return {**fields, **changes}


def write_run(
    path: Path, records: list[Record], summary: dict[str, Any] | None = None
) -> RunFolder:
    """Write a run's folder, which is then open; without a summary it has not ended."""
    folder = RunFolder.create(path)
    lines = [record.to_dict() for record in records]
    folder.write_text("journal.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    timings = [{"index": r.index, "seconds": 0.1, "worker": r.index % 2} for r in records]
    folder.write_text("timings.jsonl", "".join(f"{json.dumps(one)}\n" for one in timings))
    folder.write_text("config.yaml", schema.to_yaml(CONFIG))
    packages = {"torch": "2.13.0", "ray": "2.60.0"}
    machine = {"python": "3.11.7", "cores": 2, "platform": "Linux", "cuda": []}
    folder.write_json("environment.json", {**machine, "packages": packages})
    folder.write_json("status.json", {"written": "2026-11-26T09:39:08+00:00"})
    if summary:
        folder.write_json("summary.json", summary)
    return folder
