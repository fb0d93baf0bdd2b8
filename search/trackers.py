"""Trackers that record a run's progress outside its files: TensorBoard, MLflow. Off by default."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

Tracker = Callable[[int, Mapping[str, float]], None]
"""Takes the number of candidates so far, and values by name, such as `fitness/best`."""


def check(names: Sequence[str]) -> None:
    """Raise ValueError if a tracker's library is not installed, or it has nowhere to write."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"trackers: {name} is not installed: pip install 'prunevolve[trackers]'"
            )
    if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
        # Without it, MLflow would write to the working directory.
        raise ValueError("trackers: mlflow needs MLFLOW_TRACKING_URI, which is not set")


@contextmanager
def opened(names: Sequence[str], folder: Path) -> Iterator[list[Tracker]]:
    """Open trackers by name for a run folder; close them at the end, whatever happens."""
    known = {"tensorboard": _tensorboard, "mlflow": _mlflow}
    with ExitStack() as stack:
        yield [stack.enter_context(known[name](folder)) for name in names]


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Tracker]:
    """Write event files into the run's folder `tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    with SummaryWriter(folder / "tensorboard") as writer:
        yield log


@contextmanager
def _mlflow(folder: Path) -> Iterator[Tracker]:
    """Write a run named after the folder to the server at MLFLOW_TRACKING_URI."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("prunevolve")
    number = experiment.experiment_id if experiment else client.create_experiment("prunevolve")
    run = client.create_run(number, run_name=folder.name).info.run_id

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            client.log_metric(run, name, value, step=step)

    status = "KILLED"
    try:
        yield log
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)
