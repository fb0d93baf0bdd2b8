"""What a model may be called."""

import pytest

from pruning.models import comes_from_hub, load_config, split_revision, with_revision

NAMES = ["nowhere", "./nowhere", "/no/where", "a/b/c", "~/x", "", "a/..", "x" * 300, __file__]


@pytest.mark.parametrize("model", NAMES)
def test_load_config_refuses_what_is_neither_a_folder_nor_a_hub_id(model):
    with pytest.raises(ValueError, match=r"is no folder: give embedded, a folder or a hub id$"):
        load_config(model)


def test_comes_from_hub_knows_a_folder_the_embedded_model_and_a_hub_id(tmp_path):
    assert not comes_from_hub(str(tmp_path))
    assert not comes_from_hub("embedded")
    assert comes_from_hub("facebook/opt-125m")


def test_split_revision_undoes_with_revision():
    assert split_revision(with_revision("owner/name", "v1.0")) == ("owner/name", "v1.0")
    assert split_revision(with_revision("owner/name", None)) == ("owner/name", None)
