"""Where a run's progress is shown beside its folder: TensorBoard, MLflow. Off by default."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

Tracker = Callable[[int, Mapping[str, float]], None]
"""Takes numbers by name, such as `fitness/best`, after so many candidates."""


def check(names: Sequence[str]) -> None:
    """Raise ValueError if a tracker's library is not installed, or it has nowhere to write."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"trackers: {name} is not installed: pip install 'prunevolve[trackers]'"
            )
    if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
        # Without it, MLflow would write where the program was started.
        raise ValueError("trackers: mlflow needs MLFLOW_TRACKING_URI, and it is not set")


@contextmanager
def opened(names: Sequence[str], folder: Path) -> Iterator[list[Tracker]]:
    """Open trackers by name; closed at the end, whatever happens.

    Args:
        names: Some of `TRACKERS`.
        folder: Of the run.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(TRACKERS[name](folder)) for name in names]


@contextmanager
def tensorboard(folder: Path) -> Iterator[Tracker]:
    """Write event files into the folder `tensorboard` of the run."""
    from torch.utils.tensorboard import SummaryWriter

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    with SummaryWriter(folder / "tensorboard") as writer:
        yield log


@contextmanager
def mlflow(folder: Path) -> Iterator[Tracker]:
    """Write a run named like the folder to the server that MLFLOW_TRACKING_URI names."""
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


TRACKERS: dict[str, Callable[[Path], AbstractContextManager[Tracker]]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
}
