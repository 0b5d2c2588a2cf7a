"""Objects of the real repeng and steering-vectors, held to them by the logits of models that they steer.

Both pin older NumPy or transformers than ours, so `make unit` installs them beside the environment, without what they
pin:

    pip install --no-deps --target build/peers repeng==0.4.0 steering-vectors==0.12.2
"""

import copy
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import BLOCKS, FAMILIES, tiny_model, unit_rows

from dctlib import steer
from dctlib.exchange.export import export_vector
from dctlib.exchange.gguf import read_control_vector, write_control_vector
from dctlib.exchange.hub import save_folder
from dctlib.exchange.packages import _repeng, from_repeng, from_steering_vectors, to_repeng, to_steering_vectors

sys.path.append(str(Path(__file__).parents[2] / "build" / "peers"))
TOKENS = torch.arange(6, 14)[None]
VECTORS = {layer: 3 * unit_rows(32, seed=layer).float() for layer in (1, 2, BLOCKS)}


@pytest.fixture
def repeng():
    try:
        return _repeng()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def steering_vectors():
    return pytest.importorskip("steering_vectors", reason="see this file's docstring")


def steered_logits(model, vectors):
    with ExitStack() as stack:
        for layer, vector in vectors.items():
            stack.enter_context(steer(model, layer=layer, vector=vector))
        return model(TOKENS).logits


def repeng_logits(repeng, model, control_vector, **options):
    controlled = repeng.ControlModel(copy.deepcopy(model), list(control_vector.directions))
    controlled.set_control(control_vector, **options)
    return controlled(TOKENS).logits


def assert_equal_logits(found, expected, unsteered):
    assert (expected - unsteered).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[layer], expected[layer]) for layer in expected)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "GPTNeoX"])  # where it finds no blocks
def test_repeng_steers_as_we_do(repeng, family):
    model = tiny_model(family)
    found = repeng_logits(repeng, model, to_repeng(VECTORS, architecture=model.config.model_type))
    assert_equal_logits(found, steered_logits(model, VECTORS), model(TOKENS).logits)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_a_control_vector_of_repeng_steers_our_model(repeng, llama, kind):
    rows = unit_rows(BLOCKS, 32).numpy()
    control_vector = repeng.ControlVector("llama", {block: kind(2 * row) for block, row in enumerate(rows)})
    vectors = {layer: -1.5 * vector for layer, vector in from_repeng(control_vector).items()}
    assert vectors.keys() == {1, 2, 3, BLOCKS}
    found = repeng_logits(repeng, llama, control_vector, coeff=-1.5)
    torch.testing.assert_close(steered_logits(llama, vectors), found, rtol=0, atol=1e-6)  # repeng scales in float32
    assert (found - llama(TOKENS).logits).abs().max() > 0.1


def test_repeng_s_default_file_steers_through_the_documented_loop(repeng, llama, tmp_path):
    """It trains blocks 1 to the last and writes them as they are counted."""
    rows = unit_rows(BLOCKS, 32).float().numpy()
    control_vector = repeng.ControlVector("llama", {block: 3 * rows[block] for block in range(BLOCKS - 1, 0, -1)})
    control_vector.export_gguf(tmp_path / "theirs.gguf")
    vectors = read_control_vector(tmp_path / "theirs.gguf")
    assert sorted(vectors) == [2, 3, BLOCKS]
    found = steered_logits(llama, vectors)
    assert_equal_logits(found, repeng_logits(repeng, llama, control_vector), llama(TOKENS).logits)


def test_repeng_trains_what_we_read(repeng, llama, tokenizer):
    """Its own training says which blocks its default covers."""
    pairs = [repeng.DatasetEntry(positive=f"w1 w2 w{i}", negative=f"w3 w4 w{i}") for i in range(8)]
    control_vector = repeng.ControlVector.train(llama, tokenizer, pairs)
    vectors = from_repeng(control_vector)
    assert sorted(vectors) == [2, 3, BLOCKS]
    longer = {layer: 3 * vector for layer, vector in vectors.items()}
    found = repeng_logits(repeng, llama, control_vector, coeff=3.0)
    torch.testing.assert_close(steered_logits(llama, longer), found, rtol=0, atol=1e-6)


def test_objects_and_files_of_repeng_hold_the_same(repeng, tmp_path):
    vectors = {2: unit_rows(32).float(), 3: unit_rows(32, seed=1).float()}
    control_vector = to_repeng(vectors, architecture="qwen2")
    write_control_vector(tmp_path / "ours.gguf", vectors, architecture="qwen2")
    assert repeng.ControlVector.import_gguf(tmp_path / "ours.gguf") == control_vector
    assert same(from_repeng(control_vector), vectors)
    control_vector.directions[1][0] = 9.0
    assert vectors[2][0] != 9.0  # nothing is shared with what was given
    assert not hasattr(np, "float_")


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_vectors_steers_as_we_do(steering_vectors, family):
    model = tiny_model(family)
    vectors = {layer: vector.double() for layer, vector in VECTORS.items()}
    steering_vector = to_steering_vectors(vectors)
    assert isinstance(steering_vector, steering_vectors.SteeringVector)
    with steering_vector.apply(model):
        found = model(TOKENS).logits
    assert_equal_logits(found, steered_logits(model, vectors), model(TOKENS).logits)
    assert same(from_steering_vectors(steering_vector), vectors)


def test_a_vector_that_steering_vectors_trained_steers_our_model(steering_vectors, llama, tokenizer):
    samples = [(f"w1 w2 w{i}", f"w3 w4 w{i}") for i in range(8)]
    steering_vector = steering_vectors.train_steering_vector(llama, tokenizer, samples, layers=[0, -1])
    vectors = from_steering_vectors(steering_vector)
    assert sorted(vectors) == [1, BLOCKS]
    with steering_vector.apply(llama, multiplier=2.0):
        found = llama(TOKENS).logits
    doubled = {layer: 2 * vector for layer, vector in vectors.items()}
    assert_equal_logits(found, steered_logits(llama, doubled), llama(TOKENS).logits)


@pytest.mark.parametrize(("read", "field"), [(from_repeng, "directions"), (from_steering_vectors, "layer_activations")])
def test_numpy_and_torch_are_read_alike(read, field):
    row = unit_rows(5)
    found = read(SimpleNamespace(**{field: {np.int64(0): row.numpy(), 3: row.requires_grad_()}}))
    assert same(found, {1: row.detach(), 4: row.detach()})
    assert not found[4].requires_grad


@pytest.mark.parametrize(("read", "field"), [(from_repeng, "directions"), (from_steering_vectors, "layer_activations")])
@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "at least one"),
        ({-1: np.ones(3)}, "block -1, expected 0 or more"),
        ({True: np.ones(3)}, "block True"),
        ({"1": np.ones(3)}, "block '1'"),
        ({1: np.ones((2, 3))}, r"\(2, 3\)"),
        ({1: np.array(["a"])}, "expected floating numbers"),
        ({1: np.array([1, 2])}, "int64"),
        ({1: np.array([np.nan])}, "not finite"),
        ({1: np.ones(3), 2: np.ones(4)}, r"widths \[3, 4\]"),
        ([np.ones(3)], "expected an object with"),
    ],
)
def test_what_adds_nothing_to_a_block_is_refused(read, field, held, message):
    with pytest.raises(ValueError, match=message):
        read(SimpleNamespace(**{field: held}))


def test_other_places_than_the_output_of_a_block_are_refused():
    with pytest.raises(ValueError, match="layer_type='mlp', expected 'decoder_block'"):
        from_steering_vectors(SimpleNamespace(layer_activations={1: torch.ones(3)}, layer_type="mlp"))
    with pytest.raises(ValueError, match="got dict, expected an object with directions"):
        from_repeng({1: torch.ones(3)})


@pytest.mark.parametrize("write", [to_steering_vectors, lambda vectors: to_repeng(vectors, architecture="llama")])
@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({}, "got 0 vectors"),
        ({0: torch.ones(3)}, "layer=0, expected 1 or more"),
        ({1: torch.ones(2, 3)}, r"\(2, 3\)"),
        ({1: torch.tensor([float("inf")])}, "not finite"),
        ({1: torch.ones(3), 2: np.ones(4)}, r"widths \[3, 4\]"),
    ],
)
def test_what_another_tool_cannot_add_is_refused(write, vectors, message):
    with pytest.raises(ValueError, match=message):
        write(vectors)


@pytest.mark.parametrize("write", [to_steering_vectors, lambda vectors: to_repeng(vectors, architecture="llama")])
def test_a_package_that_is_not_installed_is_named(write, monkeypatch):
    for name in ("repeng", "steering_vectors"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="is not installed; pip install --no-deps"):
        write({1: torch.ones(3)})
    assert not hasattr(np, "float_")


@pytest.mark.parametrize("layer", [1, 2])  # a GGUF file for llama.cpp starts at 2
def test_repeng_reads_a_vector_that_was_exported_for_it(repeng, tmp_path, layer):
    vector = VECTORS[layer]
    facts = {"layer": layer, "model": "m", "revision": None, "architecture": "qwen2"}
    save_folder(tmp_path / "shared", vector[None], [{"source": "mine"}], **facts, texts=["a"])
    export_vector(tmp_path / "shared", 0, "repeng", tmp_path / "theirs.gguf")
    (found,) = from_repeng(repeng.ControlVector.import_gguf(tmp_path / "theirs.gguf")).items()
    assert found[0] == layer and torch.equal(torch.as_tensor(found[1]), vector)
