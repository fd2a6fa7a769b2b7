"""Which files of a hub model are fetched, and when nothing is."""

import pytest

from engine import backbone


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[list[str]]:
    """The file patterns of every download; `tmp_path/snapshot` is what the hub gives."""
    patterns = []

    def snapshot_download(name, allow_patterns):
        if name != "org/model":
            raise OSError("404")
        patterns.append(allow_patterns)
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(backbone, "snapshot_download", snapshot_download)
    return patterns


def test_weights_come_once_and_as_safetensors_where_there_are_any(asked, tmp_path):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").touch()
    backbone.download_model("org/model")
    assert asked == [backbone.MODEL_FILES]


def test_an_older_repository_gives_its_bin_files(asked):
    backbone.download_model("org/model")
    assert [("*.bin" in patterns) for patterns in asked] == [False, True]


def test_a_folder_needs_no_download_and_a_wrong_name_is_an_error(asked, tmp_path):
    backbone.download_model(str(tmp_path))
    assert asked == []
    with pytest.raises(ValueError, match="'org/modle': neither a local"):
        backbone.download_model("org/modle")
