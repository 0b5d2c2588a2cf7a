from contextlib import ExitStack, suppress

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BLOCKS, hooked_residual, tiny_model, unit_rows

from dctlib import steer
from dctlib.exchange.gguf import read_control_vector, write_control_vector

VECTORS = {2: torch.tensor([1.0, -2.0, 3.5]), 10: torch.tensor([0.0, 1e-30, 7.0])}


def foreign_file(path, tensors, *, kind="controlvector", **added):
    """As repeng and cvector-generator write it: without our checksum."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_string("controlvector.model_hint", "llama")
    for key, value in added.items():
        writer.add_string(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_the_input_of_block_s_is_direction_s_minus_1(tmp_path):
    write_control_vector(tmp_path / "v.gguf", VECTORS, architecture="llama")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    assert {tensor.name for tensor in reader.tensors} == {"direction.1", "direction.9"}
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        layer = {"direction.1": 2, "direction.9": 10}[tensor.name]
        assert tensor.data.tolist() == VECTORS[layer].tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


@settings(max_examples=30, deadline=None)
@given(
    layers=st.sets(st.integers(2, 90), min_size=1, max_size=4),
    d=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_vectors_come_back_in_float32(tmp_path_factory, layers, d, dtype, seed):
    path = tmp_path_factory.mktemp("any") / "v.gguf"
    rows = torch.randn(len(layers), d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    vectors = dict(zip(layers, rows, strict=True))
    write_control_vector(path, vectors, architecture="qwen2")
    assert same(read_control_vector(path), {layer: vector.float() for layer, vector in vectors.items()})


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
def test_an_imported_vector_steers_as_before(tmp_path, family):
    model, tokens = tiny_model(family), torch.arange(6, 14)[None]
    vectors = {2: 4 * unit_rows(32).float(), 3: 2 * unit_rows(32, seed=1).float()}
    write_control_vector(tmp_path / "v.gguf", vectors, architecture=model.config.model_type)

    def residual(added):
        with ExitStack() as stack:
            for layer, vector in added.items():
                stack.enter_context(steer(model, layer=layer, vector=vector))
            return hooked_residual(model, tokens, 0, BLOCKS)

    before, after = residual(vectors), residual(read_control_vector(tmp_path / "v.gguf"))
    assert torch.equal(before, after) and not torch.equal(before, residual({}))


def test_a_file_of_another_writer_is_read(tmp_path):
    directions = {f"direction.{n}": np.full(3, n, np.float32) for n in range(1, 4)}
    path = foreign_file(tmp_path / "repeng.gguf", directions)
    assert same(read_control_vector(path), {n + 1: torch.full((3,), float(n)) for n in range(1, 4)})


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({0: torch.ones(3)}, "layer=0, expected 2 or more"),
        ({1: torch.ones(3)}, "layer=1, expected 2 or more"),
        ({True: torch.ones(3)}, "layer=True"),
        ({10**6 + 1: torch.ones(3)}, "direction.N"),
        ({}, "got 0 vectors"),
        ({2: torch.ones(3), 3: torch.ones(4)}, r"widths \[3, 4\]"),
        ({2: torch.ones(2, 3)}, r"\(2, 3\), expected floating numbers \(d,\)"),
        ({2: torch.ones(0)}, "expected floating numbers"),
        ({2: torch.tensor([1.0, float("nan")])}, "not finite"),
        ({2: torch.tensor([1e300], dtype=torch.float64)}, "not finite"),
    ],
)
def test_what_has_no_place_in_a_control_vector_is_refused_and_nothing_written(tmp_path, vectors, message):
    with pytest.raises(ValueError, match=message):
        write_control_vector(tmp_path / "v.gguf", vectors, architecture="llama")
    assert not list(tmp_path.iterdir())


def test_it_names_its_architecture(tmp_path):
    with pytest.raises(ValueError, match="model_type"):
        write_control_vector(tmp_path / "v.gguf", VECTORS, architecture="")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "at least one"),
        ({"direction.0": np.ones(3, np.float32)}, "N of 1 or more"),
        ({"direction.x": np.ones(3, np.float32)}, "N of 1 or more"),
        ({"direction.٣": np.ones(3, np.float32)}, "N of 1 or more"),
        ({"token_embd.weight": np.ones(3, np.float32)}, "expected direction.N"),
        ({"direction.1": np.ones(3, np.float16)}, "float16"),
        ({"direction.1": np.ones((2, 3), np.float32)}, r"\(2, 3\)"),
        ({"direction.1": np.array([np.inf], np.float32)}, "not finite"),
        ({"direction.1": np.ones(3, np.float32), "direction.2": np.ones(4, np.float32)}, "widths"),
    ],
)
def test_what_llama_cpp_would_not_add_is_refused(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        read_control_vector(foreign_file(tmp_path / "v.gguf", tensors))


def test_a_missing_file_a_folder_and_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        read_control_vector(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        read_control_vector(tmp_path)
    with pytest.raises(ValueError, match=r"'llama', expected 'controlvector'; is it a model\?"):
        read_control_vector(foreign_file(tmp_path / "model.gguf", {"token_embd.weight": np.ones(3)}, kind="llama"))


def test_a_length_beyond_the_file_ends_the_reading(tmp_path):
    path = foreign_file(tmp_path / "v.gguf", {"direction.1": np.ones(3, np.float32)}, note="x" * 20)
    content = path.read_bytes()
    at = content.index(b"note") + 4  # its type: a string; now an array of 2⁶² bytes
    array = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (2**62).to_bytes(8, "little")
    path.write_bytes(content[:at] + array + content[at + len(array) :])
    with pytest.raises(ValueError, match="ends too early"):
        read_control_vector(path)


@settings(max_examples=60, deadline=None)
@given(keep=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path_factory, keep):
    path = tmp_path_factory.mktemp("cut") / "v.gguf"
    write_control_vector(path, VECTORS, architecture="llama")
    content = path.read_bytes()
    content = content[: len(content) - (-3 * 4) % 32]  # padding behind the last direction may go
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        read_control_vector(path)


@settings(max_examples=400, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_is_found_or_harmless(tmp_path_factory, place, mask):
    path = tmp_path_factory.mktemp("flip") / "v.gguf"
    write_control_vector(path, VECTORS, architecture="llama")
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= mask
    path.write_bytes(content)
    with suppress(ValueError):
        assert same(read_control_vector(path), VECTORS)
