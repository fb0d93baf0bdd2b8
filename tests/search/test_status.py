"""What a run says of its status, in lines and for trackers."""

from prunevolve.search.recorder import tensorboard
from prunevolve.search.status import Status

METRIC = "mul(mul(abs(W), sqrt(X)), add(G, X))"
STATUS = Status(
    state="running",
    candidates=30,
    of=90,
    outcomes={"evaluated": 28, "failed": 2},
    per_hour=3600.0,
    workers={"ready": 2, "busy": 1, "starting": 0},
    faults={"lost": 3},
    trouble="lost: it ended",
    best={"metric": METRIC, "group": "row", "fitness": 3.3, "unit": "nats/token"},
    known={"dense": 3.1, "wanda": 3.4},
)


def test_lines_say_the_best_beside_what_is_known_and_every_kind_of_outcome():
    assert STATUS.lines() == [
        "fitness: dense 3.1000, wanda 3.4000, best 3.3000 nats/token",
        f"best: {METRIC}, group row",
        "outcomes: 28 evaluated, 0 stopped, 0 duplicate, 0 degenerate, 2 failed",
        "workers: 2 ready, 1 busy, 0 starting; 3600 candidates an hour",
        "faults: 3 lost; the last: lost: it ended",
    ]


def test_lines_before_anything_is_evaluated():
    first, *others = STATUS.model_copy(update={"best": None, "faults": {}}).lines()
    assert first == "fitness: dense 3.1000, wanda 3.4000, best none yet"
    assert [line.split(":")[0] for line in others] == ["outcomes", "workers"]


def test_tensorboard_gets_every_value_of_a_status(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard(tmp_path) as track:
        track(30, STATUS.values())
        track(40, STATUS.values() | {"fitness/best": 3.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = [
        *("candidates_per_hour", "faults/lost", "fitness/best", "outcomes/evaluated"),
        *("outcomes/failed", "workers/busy", "workers/ready", "workers/starting"),
    ]
    assert sorted(events.Tags()["scalars"]) == names
    best = [(event.step, round(event.value, 4)) for event in events.Scalars("fitness/best")]
    assert best == [(30, 3.3), (40, 3.25)]
