"""Which files of a hub model are fetched, and that they are looked at."""

import pytest
import torch
from safetensors.torch import save_file

from engine.config.source import ModelSource
from engine.models import backbone


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder, `hub.folder`, that the hub gives for "org/model", and the file patterns of every download."""

    class Hub:
        folder, asked = tmp_path / "snapshot", []

    def snapshot_download(name, allow_patterns):
        if name != "org/model":
            raise OSError("404")
        Hub.asked.append(allow_patterns)
        return str(Hub.folder)

    Hub.folder.mkdir()
    monkeypatch.setattr(backbone, "snapshot_download", snapshot_download)
    return Hub


def test_weights_come_once_and_as_safetensors_where_there_are_any(hub):
    save_file({"a": torch.zeros(2)}, hub.folder / "model.safetensors")
    backbone.download_model(ModelSource("org/model"))
    assert hub.asked == [backbone.MODEL_FILES]


def test_an_older_repository_gives_its_bin_files(hub):
    torch.save({"a": torch.zeros(2)}, hub.folder / "pytorch_model.bin")
    backbone.download_model(ModelSource("org/model"))
    assert [("*.bin" in patterns) for patterns in hub.asked] == [False, True]


def test_files_that_are_cut_short_are_named(hub):
    save_file({"a": torch.zeros(2)}, hub.folder / "model.safetensors")
    whole = (hub.folder / "model.safetensors").read_bytes()
    (hub.folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        backbone.download_model(ModelSource("org/model"))


def test_a_folder_needs_no_download_and_a_wrong_name_is_an_error(hub):
    save_file({"a": torch.zeros(2)}, hub.folder / "model.safetensors")
    backbone.download_model(ModelSource(str(hub.folder)))
    assert hub.asked == []
    with pytest.raises(ValueError, match="'org/modle': neither a local"):
        backbone.download_model(ModelSource("org/modle"))
