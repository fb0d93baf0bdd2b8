from contextlib import nullcontext

import pytest

from prunevolve.search import recorder

VALUES = {"fitness/best": 3.25, "outcomes/evaluated": 2.0}


def test_tensorboard_writes_every_value_into_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with recorder.opened(["tensorboard"], tmp_path) as opened:
        for log in opened:
            log(10, VALUES)
            log(20, VALUES | {"fitness/best": 3.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    best = [(event.step, event.value) for event in events.Scalars("fitness/best")]
    assert best == [(10, 3.25), (20, 3.0)]
    assert [event.value for event in events.Scalars("outcomes/evaluated")] == [2.0, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED")])
def test_mlflow_gets_a_run_with_every_value_and_how_it_ended(tmp_path, monkeypatch, error, status):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'server'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    ends = pytest.raises(error) if error else nullcontext()
    with ends, recorder.opened(["mlflow"], tmp_path / "my-run") as opened:
        opened[0](10, VALUES)
        if error:
            raise error
    client = MlflowClient()
    number = client.get_experiment_by_name("prunevolve").experiment_id
    (run,) = client.search_runs([number])
    assert run.info.run_name == "my-run"
    assert run.info.status == status
    assert run.data.metrics == VALUES


def test_tracker_that_is_not_installed_or_has_no_server_is_refused(monkeypatch):
    monkeypatch.setattr(recorder, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tensorboard is not installed: pip install"):
        recorder.check_trackers(["tensorboard"])
    monkeypatch.setattr(recorder, "find_spec", lambda name: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="needs MLFLOW_TRACKING_URI"):
        recorder.check_trackers(["mlflow"])
