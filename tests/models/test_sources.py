import pytest

from dctlib.models.sources import find_source


def test_a_folder_and_a_file_are_found_and_what_is_beside_them_is_named(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "q4.gguf").touch()
    assert find_source(tmp_path).has(r"config\.json")
    assert find_source(str(tmp_path)).gguf is None
    assert find_source(tmp_path / "q4.gguf").gguf == tmp_path / "q4.gguf"
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"a folder of GGUF files; pass one of them: q4\.gguf"):
        find_source(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"got the file .*model\.safetensors, expected a GGUF file or the folder"):
        find_source(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["./nowhere", "~/nowhere", "/nowhere/at all", "models/nowhere", "a/b/c", "q4.gguf", "C:\\x", "~0/x"]
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.model_info", lambda *_args, **_options: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match="no model folder or file"):
        find_source(name)


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    assert find_source("~/tiny").location == str(tmp_path / "tiny")
