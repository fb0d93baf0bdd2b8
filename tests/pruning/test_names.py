import threading

import pytest

import hub_answers
from pruning.models import load_config
from pruning.names import comes_from_hub, metric_file


@pytest.fixture
def asked(monkeypatch):
    """A hub that answers nothing; returns how often it was asked, one entry each."""
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid:9")
    monkeypatch.setenv("no_proxy", "hub.invalid")
    monkeypatch.setattr(hub_answers.socket, "create_connection", refuse)
    return asked


def test_a_hub_id_without_a_hub_is_one_line(asked):
    with pytest.raises(ValueError) as error:
        load_config("owner/name")
    assert str(error.value) == (
        "model 'owner/name' cannot be loaded: there is no such folder, and the Hugging Face hub "
        "does not answer (hub.invalid:9: [Errno 111] Connection refused; HF_HUB_OFFLINE=1 reads "
        "its cache); give embedded or a folder"
    )
    assert asked == [("hub.invalid", 9)]


def test_a_hub_that_is_never_found_is_not_waited_for(asked, monkeypatch):
    found = threading.Event()

    def wait(address, timeout):
        found.wait()
        raise ConnectionRefusedError

    monkeypatch.setattr(hub_answers, "SECONDS", 0.01)
    monkeypatch.setattr(hub_answers.socket, "create_connection", wait)
    assert hub_answers.silence() == "hub.invalid:9: timed out; HF_HUB_OFFLINE=1 reads its cache"
    found.set()


def test_nothing_is_asked_where_the_hub_is_switched_off(asked, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_answers.silence() is None
    assert asked == []


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "/no/where", "a/b/c", "~/x", "", "a/.."])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_and_nobody_asked(model, asked):
    with pytest.raises(ValueError, match=r"is no folder: give embedded, a folder or a hub id$"):
        load_config(model)
    assert asked == []


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(ValueError, match="is no folder"):
        comes_from_hub(str(tmp_path / "model"))


def test_a_folder_and_the_embedded_model_do_not_come_from_the_hub(tmp_path):
    assert not comes_from_hub(str(tmp_path))
    assert not comes_from_hub("embedded")
    assert comes_from_hub("facebook/opt-125m")


@pytest.mark.parametrize("argument", ["wanda", "W", "mul(W, sqrt(X))", "W/X", "sqrt(W) / X", "0.5"])
def test_metric_file_leaves_names_and_formulas_to_others(argument):
    assert metric_file(argument) is None
