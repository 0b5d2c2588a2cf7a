import hashlib
import json
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import BLOCKS, hooked_residual, unit_rows

from dctlib import CausalMap, Transcoder, fit_exponential, steer
from dctlib.exchange.hub import load_folder, model_reference, prompts_digest, save_folder

TEXTS = ["Tell me a secret.", "Sag’s mir."]
FILES = {"config.json", "transcoder.safetensors", "SHA256SUMS", "README.md"}


def transcoder(m=4, d_source=6, d_target=5, **changes):
    facts = {
        "U": unit_rows(m, d_target, seed=1).float(),
        "V": unit_rows(m, d_source, seed=2).float(),
        "alpha": torch.linspace(0, 1, m),
        "activation": "exponential",
        "input_scale": 25.3,
        "source": 10,
        "target": 20,
        "objective": torch.tensor([1.0, 2.0]),
        "change": torch.tensor([0.5, 0.1]),
        "seconds": 1.5,
    }
    return Transcoder(**{**facts, **changes})


def save(folder, dct=None, **changes):
    facts = {"model": "owner/name", "revision": "0123abc", "texts": TEXTS, **changes}
    save_folder(folder, transcoder() if dct is None else dct, **facts)
    return folder


def same(found, expected):
    tensors = ("U", "V", "alpha", "objective", "change")
    facts = ("activation", "input_scale", "source", "target", "seconds")
    return all(
        getattr(found, name).dtype == getattr(expected, name).dtype
        and torch.equal(getattr(found, name), getattr(expected, name))
        for name in tensors
    ) and all(getattr(found, name) == getattr(expected, name) for name in facts)


def sign(folder):
    """Make the checksums fit again, as somebody who edits a file on purpose would."""
    names = ("config.json", "transcoder.safetensors")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 5),
    d_source=st.integers(1, 9),
    d_target=st.integers(1, 9),
    activation=st.sampled_from(["linear", "quadratic", "exponential"]),
    scale=st.floats(1e-3, 1e6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_transcoder_comes_back_bit_for_bit(tmp_path_factory, m, d_source, d_target, activation, scale, dtype):
    dct = transcoder(m, d_source, d_target, activation=activation, input_scale=scale)
    dct = replace(dct, V=dct.V.to(dtype))
    found = load_folder(save(tmp_path_factory.mktemp("any") / "folder", dct))
    assert same(found.transcoder, dct)
    assert found.facts.scale == scale and found.facts.activation == activation


def test_the_folder_says_what_the_vectors_are_for_and_holds_no_prompt(tmp_path):
    folder = save(tmp_path / "new" / "folder")
    assert {path.name for path in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dctlib_version")
    assert config == {
        "model": "owner/name",
        "revision": "0123abc",
        "hook_point": "resid_pre",
        "layer": 10,
        "operation": "add",
        "positions": "all",
        "scale": 25.3,
        "activation": "exponential",
        "target_layer": 20,
        "prompts_sha256": hashlib.sha256(json.dumps(TEXTS).encode()).hexdigest(),
    }
    _, head, card = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "owner/name"
    assert "4 steering vectors" in card and "block 10" in card and "25.3" in card
    assert not any(text.encode() in path.read_bytes() for path in folder.iterdir() for text in TEXTS)


def test_a_fit_that_was_shared_steers_as_before(tmp_path, llama, tokenizer, texts):
    cmap = CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)
    dct = fit_exponential(cmap, num_factors=3, input_scale=4.0, iterations=2)
    found = load_folder(save(tmp_path / "folder", dct, texts=texts))
    assert found.facts.prompts_sha256 == prompts_digest(texts)
    assert same(found.transcoder, dct)

    def residual(dct):
        with steer(llama, layer=dct.source, vector=dct.steering_vectors()[0]):
            return hooked_residual(llama, torch.arange(6, 14)[None], 0, BLOCKS)

    assert torch.equal(residual(dct), residual(found.transcoder))


def test_prompts_are_told_apart_by_their_order_and_borders():
    digests = {prompts_digest(texts) for texts in (["a", "b"], ["b", "a"], ["ab"], ["a\nb"], ['a", "b'])}
    assert len(digests) == 5
    with pytest.raises(ValueError, match="at least one prompt"):
        prompts_digest("one string")


def test_a_folder_is_replaced_by_a_folder_and_nothing_else_is(tmp_path):
    folder = save(tmp_path / "folder")
    save(folder, transcoder(m=2))
    assert len(load_folder(folder).transcoder) == 2
    (folder / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in (folder, tmp_path / "file"):
        with pytest.raises(ValueError, match="choose another name"):
            save(taken)
    assert (folder / "thesis.tex").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dct": transcoder(source=None, target=None)}, "plain function"),
        ({"model": "owner/name\n# Injected"}, "model: .*pattern"),
        ({"model": ""}, "model: "),
        ({"revision": ""}, "revision: "),
        ({"texts": []}, "at least one prompt"),
        ({"dct": transcoder(input_scale=float("inf"))}, "scale: "),
    ],
)
def test_what_nobody_could_use_is_not_saved(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "folder", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "ablate"}, "operation: Input should be 'add', got 'ablate'"),
        ({"hook_point": "resid_post"}, "hook_point: Input should be 'resid_pre'"),
        ({"positions": "last"}, "positions: Input should be 'all'"),
        ({"activation": "cubic"}, "activation: "),
        ({"layer": "10"}, "layer: .* integer, got '10'"),
        ({"layer": 9}, "got layer=9, but transcoder.safetensors says 10"),
        ({"target_layer": 21}, "got target_layer=21"),
        ({"scale": 25.4}, "got scale=25.4"),
        ({"activation": "linear"}, "got activation='linear'"),
        ({"prompts_sha256": "0" * 63}, "prompts_sha256: "),
        ({"revision": "absent"}, "revision: Field required"),
        ({"auto_map": "evil.py"}, "auto_map: Extra inputs are not permitted"),
    ],
)
def test_an_unknown_or_contradictory_fact_is_refused(tmp_path, changes, message):
    folder = save(tmp_path / "folder")
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_folder(folder)


def test_numbers_of_another_shape_are_refused(tmp_path):
    folder = save(tmp_path / "folder")
    dct = transcoder()
    facts = {name: getattr(dct, name) for name in ("activation", "input_scale", "source", "target", "seconds")}
    tensors = {name: getattr(dct, name) for name in ("U", "V", "alpha", "objective", "change")}
    tensors["V"] = tensors["V"][:3].clone()
    save_file(tensors, folder / "transcoder.safetensors", metadata={"transcoder": json.dumps(facts)})
    sign(folder)
    with pytest.raises(ValueError, match=r"V \(3, 6\)"):
        load_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "transcoder.safetensors", "SHA256SUMS"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = save(tmp_path / "folder")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"lacks a file .*{name}"):
        load_folder(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_config_is_refused(tmp_path, content):
    folder = save(tmp_path / "folder")
    (folder / "config.json").write_bytes(content)
    sign(folder)
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_folder(folder)


def test_the_model_card_may_be_edited_and_other_files_are_never_read(tmp_path):
    folder = save(tmp_path / "folder")
    (folder / "README.md").write_text("Mine is better.")
    (folder / "transcoder.bin").write_bytes(b"\x80\x04.")
    (folder / "modeling.py").write_text("raise SystemExit")
    assert same(load_folder(folder).transcoder, transcoder())


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["config.json", "transcoder.safetensors", "SHA256SUMS"]),
    place=st.floats(0, 1, exclude_max=True),
    mask=st.integers(0, 255),
)
def test_damage_is_found(tmp_path_factory, name, place, mask):
    folder = save(tmp_path_factory.mktemp("damage") / "folder")
    content = bytearray((folder / name).read_bytes())
    at = int(place * len(content))
    if mask:
        content[at] ^= mask
    else:
        del content[at:]
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_folder(folder)


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_a_folder_with_files_of_ones_own_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("notes")
    with pytest.raises(ValueError, match="no folder that save_folder wrote"):
        save(tmp_path)
    assert (tmp_path / name).read_text() == "notes"


@pytest.mark.parametrize(
    ("model", "name", "revision"),
    [
        ("owner/name@0abc", "owner/name", "0abc"),
        ("models/laptop/refusal", "models/laptop/refusal", None),
        ("/data/my models/m@2", "m-2", None),
        ("../.cache/it", "it", None),
    ],
)
def test_a_model_is_named_without_a_path_of_this_machine(tmp_path, model, name, revision):
    assert model_reference(model) == (name, revision)
    assert load_folder(save(tmp_path / "folder", model=name, revision=revision)).facts.model == name
