"""One vector of a shared folder for other tools, and the command that writes it."""

import sys

import numpy as np
import pytest
import torch
from exchange.test_hub import ROWS, save
from tiny import tiny_model, unit_rows
from transformers import AutoModelForCausalLM

from dctlib import steer
from dctlib.cli import main
from dctlib.exchange.export import export_vector
from dctlib.exchange.gguf import read_control_vector
from dctlib.exchange.hub import load_folder

VECTORS = torch.tensor([[3.0], [5.0], [4.0]]) * unit_rows(3, 32).float()


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "shared", VECTORS, ROWS, layer=2)


def test_a_gguf_file_holds_the_vector_at_its_layer_and_length(folder, tmp_path):
    line = export_vector(folder, 1, "gguf", tmp_path / "v.gguf")
    assert str(tmp_path / "v.gguf") in line
    ((layer, vector),) = read_control_vector(tmp_path / "v.gguf").items()
    assert layer == 2 and torch.equal(vector, VECTORS[1])


def test_arrays_for_numpy(folder, tmp_path):
    export_vector(folder, 2, "npz", tmp_path / "v.npz")
    with np.load(tmp_path / "v.npz") as arrays:
        assert arrays["layer"] == 2 and np.array_equal(arrays["vector"], VECTORS[2].numpy())


def test_a_folder_of_one_vector_keeps_its_facts(folder, tmp_path):
    export_vector(folder, 1, "folder", tmp_path / "one")
    one, all_of_them = load_folder(tmp_path / "one"), load_folder(folder)
    assert torch.equal(one.vectors, VECTORS[1:2])
    assert one.facts.vectors == [all_of_them.facts.vectors[1]]
    assert one.facts.prompts_sha256 == all_of_them.facts.prompts_sha256


def test_a_model_that_is_steered_by_its_weights(folder, tmp_path, tokenizer):
    model = tiny_model("Llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    export_vector(folder, 0, "model", tmp_path / "steered", model=str(tmp_path / "plain"))
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "steered")
    tokens = torch.arange(6, 14)[None]
    with steer(model, layer=2, vector=VECTORS[0]):
        expected = model(tokens).logits
    torch.testing.assert_close(copied(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_model_from_a_folder_is_not_taken_for_one_of_the_same_name(tmp_path):
    local = save(tmp_path / "local", VECTORS, ROWS, layer=2, model="gpt2", revision=None)
    with pytest.raises(ValueError, match=r"of a folder 'gpt2', whose place is not known; pass model="):
        export_vector(local, 0, "model", tmp_path / "steered")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shared", "3", "--to", "npz", "--output", "v"], "got vector 3, expected 0 to 2"),
        (["shared", "0", "--to", "onnx", "--output", "v"], "'onnx', expected one of gguf, repeng, npz, folder, model"),
        (["shared", "0", "--to", "npz", "--output", "shared"], "shared exists"),
        (["nowhere", "0", "--to", "npz", "--output", "v"], "lacks a file"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dctlib", "export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_the_command_says_how_to_use_what_it_wrote(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dctlib", "export", "shared", "0", "--to", "npz", "--output", "v.npz"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert "wrote v.npz, to use as: np.load('v.npz')" in capsys.readouterr().out


def test_a_folder_without_vectors_is_said_to_be_empty(tmp_path):
    empty = save(tmp_path / "empty", VECTORS[:0], [], layer=2)
    with pytest.raises(ValueError, match="holds no vector: the search found nothing"):
        export_vector(empty, 0, "gguf", tmp_path / "v.gguf")
