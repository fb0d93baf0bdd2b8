"""Progress of a search: its journal, checkpoints and `status.json`, the screen and TensorBoard.

A status is what `status.json` holds: `state` (`running`, `measuring finalists`, `finished`, or why
it ended), when it was `written`, `candidates` committed `of` all, `outcomes` by kind, `seconds` of
all processes, `per_hour` (candidates, by these seconds), `workers` (`ready`, `busy` ones of these,
`starting`), `descents` (steps done and in all, by candidate), `faults` by kind, the latest as
`trouble`, `best` (`metric`, `group`, `fitness`, `size`) or null, and the fitness of the
`baselines`.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rich.console import Console

from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.progress import shown_progress
from prunevolve.search.records import OUTCOMES, Record, Timing
from prunevolve.search.run_folder import FolderError, RunFolder, WriteError

if TYPE_CHECKING:  # a status is shown without the libraries of a search
    from prunevolve.search.evolution import Evolution
    from prunevolve.search.experiment import Experiment
    from prunevolve.search.pool.pool import Pool
    from prunevolve.search.pool.worker import Job

OnRecord = Callable[[Record], object]  # called with each that is in the journal, in order

RUNNING, CHOOSING, FINISHED = "running", "measuring finalists", "finished"

SHOWN = 4  # descents of which a line says how far they are
_WIDEST = 60  # characters of a formula in a line
_SHOW_SECONDS, _SAVE_SECONDS = 0.25, 10.0  # between two updates: on screen, of the files


def ignore(record: Record) -> None:
    """Ignore a record."""


@dataclass(eq=False)
class Recorder:
    """Keeps a run's files and the screen up to date while it is opened.

    At the end, whatever it is, it writes the checkpoint, the best metric and the status if it can.
    """

    folder: RunFolder
    experiment: "Experiment"
    evolution: "Evolution"
    pool: "Pool"
    console: Console
    on_record: OnRecord
    began: float  # by `time.monotonic`, as if all the run's processes had followed one another

    def __post_init__(self) -> None:
        self.outcomes: Counter[str] = Counter()  # of the journal's records, by kind
        self._timings: dict[int, Timing] = {}
        self._shown = self._written = 0.0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let screen and event files be open inside the context, and save all files at its end."""
        events: AbstractContextManager[Any] = nullcontext()
        if self.experiment.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = SummaryWriter(self.folder.path / "tensorboard")
        with shown_progress(self.console, self.seconds) as self._show, events as self._events:
            try:
                yield
            except WriteError:
                raise
            except BaseException as error:
                with suppress(WriteError):
                    self._save(str(error) or "interrupted")
                raise
            self._save(CHOOSING if self.evolution.state.best else "nothing evaluated")

    def note(self, job: "Job") -> None:
        """Keep a candidate's timing until its outcome is committed; write its trace, if any."""
        self._timings[job.candidate.index] = job.timing
        if job.trace:
            self.folder.write_failure(str(job.candidate.index), job.trace)

    def add(self, records: list[Record]) -> None:
        """Append committed records to the journal and pass them on."""
        for record in records:
            self.folder.append(record, self._timings.pop(record.index, {}))
            self.outcomes[record.outcome.kind] += 1
        for record in records:  # after all are in the journal: it may raise
            self.on_record(record)

    def show(self) -> None:
        """Show and save the run's status, each at its own interval."""
        now, done = time.monotonic(), self.evolution.done
        if now - self._shown < _SHOW_SECONDS and not done:
            return
        self._shown, status = now, self.status(RUNNING)
        self._show("candidates", status["candidates"], status["of"], lines_of(status))
        if now - self._written >= _SAVE_SECONDS or done:
            self._written = now
            self._save(RUNNING)
            if self._events:
                for name, value in values_of(status).items():
                    self._events.add_scalar(name, value, status["candidates"])

    def _save(self, state_of_run: str) -> None:
        """Write all files that follow from the journal, and the status."""
        folder, state = self.folder, self.evolution.state
        folder.write_json("checkpoint.json", self.evolution.resumable.to_checkpoint())
        folder.write_hall_of_fame([], state.hall_of_fame)
        # A run that is extended keeps its winner until another is chosen.
        if state.best and not (folder.path / "summary.json").is_file():
            folder.write_best(state.best, self.experiment.origin())
        folder.write_json("status.json", self.status(state_of_run))

    @property
    def seconds(self) -> float:
        """Seconds of all the run's processes."""
        return time.monotonic() - self.began

    def status(self, state: str) -> JsonObject:
        """Return the run's status now."""
        workers, evolved, seconds = self.pool.workers, self.evolution.state, self.seconds
        return {
            "state": state,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "candidates": evolved.committed,
            "of": self.experiment.config.search.candidates,
            "outcomes": {kind: self.outcomes[kind] for kind in OUTCOMES},
            "seconds": round(seconds, 1),
            "per_hour": round(3600 * evolved.committed / max(seconds, 1e-9), 1),
            "workers": {"ready": workers.ready, "busy": workers.busy, "starting": workers.starting},
            "descents": {str(index): list(step) for index, step in workers.descents},
            "faults": dict(workers.faults),
            "trouble": workers.trouble,
            "best": evolved.best and evolved.best.described,
            "baselines": dict(self.pool.scale.baselines),
        }


def values_of(status: JsonObject) -> dict[str, float]:
    """Return a status's values for trackers, by name."""
    groups = ("outcomes", "faults", "workers")
    values = {f"{group}/{name}": n for group in groups for name, n in status[group].items()}
    values["candidates_per_hour"] = status["per_hour"]
    return values | ({"fitness/best": status["best"]["fitness"]} if status["best"] else {})


def lines_of(status: JsonObject) -> list[str]:
    """Return all of a status but how far the search is, as lines for a person."""
    best, pace = status["best"], f"{status['per_hour']:.0f} candidates an hour"
    fitness = f"{best['fitness']:.4f}" if best else "none yet"
    lines = [f"fitness: dense 0, best baseline 1, best {fitness}"]
    if best:
        lines.append(f"best: {_formula(best['metric'])}, group {best['group']}")
    lines.append(f"outcomes: {_counts(status['outcomes'])}")
    is_under_way = status["state"] in (RUNNING, CHOOSING)
    lines.append(f"workers: {_counts(status['workers'])}; {pace}" if is_under_way else pace)
    if descents := status.get("descents"):
        steps = [
            f"candidate {index} at step {done} of {n}" for index, (done, n) in descents.items()
        ]
        more = f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else ""
        lines.append(f"descents: {', '.join(steps[:SHOWN])}{more}")
    if status["faults"]:
        lines.append(f"faults: {_counts(status['faults'])}; the last: {status['trouble']}")
    return lines


def convergence(fitness: Sequence[float | None]) -> str:
    """Say when the best of all candidates came, and what the last third of them brought."""
    best = list(accumulate((math.inf if f is None else f for f in fitness), min))
    if not best or best[-1] == math.inf:
        return "no candidate was evaluated yet"
    line = f"last improvement: candidate {best.index(best[-1])} of {len(best)}"
    before = best[len(best) - len(best) // 3 - 1]
    gain = before - best[-1]
    more = f"{gain:.4f} lower in the last third" if gain else "none in the last third"
    return line if before == math.inf else f"{line}, {more}"


def _formula(text: str) -> str:
    """Return a metric's formula, cut behind a factor if it is long."""
    formula, depth, end = Metric.parse(text).infix, 0, 0
    if len(formula) <= _WIDEST:
        return formula
    for i, sign in enumerate(formula[:_WIDEST]):
        depth += (sign == "(") - (sign == ")")
        if depth == 0 and sign in "·/+-" and formula[i - 1] == " ":
            end = i - 1
    return f"{formula[:end]} …" if end else f"{formula[:_WIDEST]}…"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def status_of(folder: RunFolder) -> JsonObject:
    """Return the status of a run as it is now: how far it is says the journal."""
    if not (folder.path / "status.json").is_file():
        raise FolderError(f"{folder.path} has no status before its first candidate: look later")
    status = folder.read_json("status.json", "best")
    if status["state"] in (RUNNING, CHOOSING) and not folder.is_in_use:  # its process is gone
        status["state"] = f"stopped while {status['state']}"
    outcomes = folder.outcomes()
    kinds = Counter(kind for kind, _ in outcomes)
    return status | {
        "candidates": len(outcomes),
        "outcomes": {kind: kinds[kind] for kind in OUTCOMES},
        "convergence": convergence([fitness for _, fitness in outcomes]),
    }


def print_status(folder: RunFolder, console: Console) -> JsonObject:
    """Print and return the status of a run, while it is running or afterwards."""
    status = status_of(folder)
    done, state = f"candidates: {status['candidates']}/{status['of']}", status["state"]
    if state == RUNNING and status["per_hour"]:
        hours = (status["of"] - status["candidates"]) / status["per_hour"]
        done += f", {timedelta(seconds=round(hours * 3600))} left"
    if state not in (RUNNING, CHOOSING, FINISHED):
        state += f"; resume with {folder.resume_command}"
    head = f"{folder.path}: {state}, as of {status['written']}"
    front = [
        f"  size {row['size']:>2}, fitness {float(row['fitness']):.4f}: {_formula(row['metric'])}"
        for row in folder.front()
    ]
    shown = ["front, no smaller one as fit:", *front] if front else []
    console.print(head, done, status["convergence"], *lines_of(status), *shown, sep="\n")
    return status
