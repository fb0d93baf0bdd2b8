"""What a model may be called."""

import pytest

from pruning.models import comes_from_hub, load_config, split_revision, with_revision


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "/no/where", "a/b/c", "~/x", "", "a/.."])
def test_load_config_refuses_what_is_neither_a_folder_nor_a_hub_id(model):
    with pytest.raises(ValueError, match=r"is no folder: give embedded, a folder or a hub id$"):
        load_config(model)


def test_comes_from_hub_refuses_a_file_and_a_name_that_no_file_can_have(tmp_path):
    (tmp_path / "model").touch()
    for name in (str(tmp_path / "model"), "x" * 300):
        with pytest.raises(ValueError, match="is no folder"):
            comes_from_hub(name)


def test_comes_from_hub_guesses_the_embedded_model():
    with pytest.raises(ValueError, match=r"'Embeded' is no folder: did you mean embedded\? or "):
        comes_from_hub("Embeded")


def test_comes_from_hub_is_false_for_a_folder_and_the_embedded_model(tmp_path):
    assert not comes_from_hub(str(tmp_path))
    assert not comes_from_hub("embedded")
    assert comes_from_hub("facebook/opt-125m")


def test_split_revision_undoes_with_revision():
    assert split_revision(with_revision("owner/name", "v1.0")) == ("owner/name", "v1.0")
    assert split_revision(with_revision("owner/name", None)) == ("owner/name", None)
