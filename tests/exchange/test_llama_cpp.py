"""llama.cpp itself, steered by a file of ours, must say what our steered model says. Not in CI: it compiles llama.cpp.

    pip install --no-deps --target build/llama llama-cpp-python    # needs a C++ compiler and cmake; about 15 minutes
    PYTHONPATH=build/llama .venv/bin/pytest tests/exchange/test_llama_cpp.py

Both sides compute in float32 on the weights that models/smollm2-135m-instruct was made from: the pinned GGUF file with
every tensor dequantised. Tokens, not texts, go in and come out, so llama.cpp's tokenizer takes no part.
"""

import ctypes
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny import unit_rows

from dctlib import format_chat, load_model, steer
from dctlib.exchange.gguf import read_control_vector, write_control_vector
from dctlib.exchange.steered_model import steered_copy
from dctlib.models.assets import fetch

llama: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (see this file's docstring)")
pytestmark = pytest.mark.real

TOKENS = 24
PROMPTS = ["What is the capital of France?", "Tell me a short story about a fox.", "How do I boil an egg?"]
LENGTHS = {2: 20.0, 10: 40.0, 20: 60.0, 29: 500.0, 30: 500.0}  # of a vector at each layer: enough to be heard
BLOCKS, WIDTH, VOCABULARY = 30, 576, 49152


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2-135m-instruct", device="cpu", dtype="float32")[0]


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_model("smollm2-135m-instruct", device="cpu")[1]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in format_chat(tokenizer, PROMPTS)]


@pytest.fixture(scope="module")
def clean(model, prompts):
    return [ours(model, prompt) for prompt in prompts]


@contextmanager
def opened(path):
    """A context of llama.cpp on a model file, which is deleted at the end."""
    llama.llama_backend_init()
    weights = llama.llama_model_load_from_file(bytes(path), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 256
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    settings.type_k = settings.type_v = int(gguf.GGMLQuantizationType.F32)  # half precision unless told
    settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds, and moves logits by 0.01
    context = llama.llama_init_from_model(weights, settings)
    yield context
    llama.llama_free(context)
    llama.llama_model_free(weights)
    path.unlink()


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "float32.gguf"
    dequantise(fetch("smollm2"), path)
    with opened(path) as context:
        yield context


def dequantise(source, path, added=()):
    """A float32 copy of a GGUF file, all else equal, with more tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), *field.types)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    for name, tensor in added:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def directions(path):
    """What llama.cpp's ``common_control_vector_load`` makes of a file: direction.N at row N − 1, zeros elsewhere."""
    rows = np.zeros((BLOCKS - 1, WIDTH), np.float32)
    if path is not None:
        for tensor in gguf.GGUFReader(path).tensors:
            rows[int(tensor.name.removeprefix("direction.")) - 1] += tensor.data
    return rows


def theirs(context, prompt, path=None):
    """Greedy tokens of llama.cpp, and the logits of the first, under a control vector over its default layer range."""
    rows = directions(path)
    data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama.llama_set_adapter_cvec(context, data, rows.size, WIDTH, 1, BLOCKS) == 0
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    said, first, tokens = [], None, prompt
    while len(said) < TOKENS:
        fed = (llama.llama_token * len(tokens))(*tokens)  # the batch points to it and does not keep it
        assert llama.llama_decode(context, llama.llama_batch_get_one(fed, len(tokens))) == 0
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (VOCABULARY,)).copy()
        first = logits if first is None else first
        tokens = [int(logits.argmax())]
        said += tokens
    return said, torch.from_numpy(first)


def ours(model, prompt, *, layer=0, vector=None):
    """The same of the Hugging Face model, under :func:`steer`."""
    tokens = torch.tensor([prompt])
    with steer(model, layer=layer, vector=torch.zeros(WIDTH) if vector is None else vector):
        first = model(tokens).logits[0, -1]
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        said = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return said[0, len(prompt) :].tolist(), first


def assert_alike(found, expected):
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-3)


def test_without_a_vector_both_say_the_same(prompts, clean, context):
    for prompt, expected in zip(prompts, clean, strict=True):
        assert_alike(theirs(context, prompt), expected)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("layer", LENGTHS)
def test_a_vector_steers_llama_cpp_as_it_steers_our_model(model, prompts, clean, context, tmp_path, layer, seed):
    path = tmp_path / "v.gguf"
    vector = LENGTHS[layer] * unit_rows(WIDTH, seed=seed).float()
    write_control_vector(path, {layer: vector}, architecture="llama")
    for prompt, (unsteered, _) in zip(prompts, clean, strict=True):
        steered = theirs(context, prompt, path)
        assert_alike(steered, ours(model, prompt, layer=layer, vector=read_control_vector(path)[layer]))
        assert steered[0] != unsteered


@pytest.mark.parametrize("off", [-1, 1])
def test_one_layer_off_is_another_model(model, prompts, context, tmp_path, off):
    path = tmp_path / "v.gguf"
    vector = LENGTHS[10] * unit_rows(WIDTH).float()
    write_control_vector(path, {10 + off: vector}, architecture="llama")
    for prompt in prompts:
        found, expected = theirs(context, prompt, path), ours(model, prompt, layer=10, vector=vector)
        assert found[0] != expected[0]
        assert (found[1] - expected[1]).abs().max() > 0.5


def test_a_vector_in_the_weights_runs_in_llama_cpp(model, prompts, clean, tmp_path):
    """The biases that the copy has more than the model, under the names that gguf's converter gives them."""
    vector = LENGTHS[10] * unit_rows(WIDTH).float()
    weights = steered_copy(model, layer=10, vector=vector).state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    added = [
        (f"{names.get_name(name.removesuffix('.bias'))}.bias", weights[name].numpy())
        for name in weights.keys() - model.state_dict().keys()
    ]
    dequantise(fetch("smollm2"), tmp_path / "steered.gguf", added)
    with opened(tmp_path / "steered.gguf") as context:
        for prompt, (unsteered, _) in zip(prompts, clean, strict=True):
            steered = theirs(context, prompt)
            assert_alike(steered, ours(model, prompt, layer=10, vector=vector))
            assert steered[0] != unsteered
