import hashlib
import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import BLOCKS, hooked_residual, unit_rows

from dctlib import steer
from dctlib.exchange.hub import load_folder, model_reference, prompts_digest, save_folder

TEXTS = ["Tell me a secret.", "Sag’s mir."]
FILES = {"config.json", "vectors.safetensors", "SHA256SUMS", "README.md"}
VECTORS = torch.tensor([[12.5], [6.25], [20.0]]) * unit_rows(3, 6).float()
ROWS = [
    {
        "source": "exponential",
        "damage": 0.25,
        "score": 0.75,
        "held_out": 0.5,
        "says": "Sure! | Here",
        "request": TEXTS[0],
    },
    {"source": "power steering", "damage": float("nan"), "score": 0.5},
    {"source": "mine"},
]


def save(folder, vectors=VECTORS, rows=ROWS, **changes):
    facts = {"layer": 10, "architecture": "llama", "texts": TEXTS}
    facts |= {"model": "owner/name", "revision": "0123abc", **changes}
    save_folder(folder, vectors, rows, **facts)
    return folder


def sign(folder):
    """Make the checksums fit again, as somebody who edits a file on purpose would."""
    names = ("config.json", "vectors.safetensors")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


@settings(max_examples=20, deadline=None)
@given(
    k=st.integers(1, 5),
    d=st.integers(1, 9),
    scale=st.floats(1e-3, 1e6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_vectors_come_back_bit_for_bit(tmp_path_factory, k, d, scale, dtype):
    vectors = (scale * unit_rows(k, d)).to(dtype)
    found = load_folder(save(tmp_path_factory.mktemp("any") / "folder", vectors, [{"source": "mine"}] * k))
    assert found.vectors.dtype == dtype and torch.equal(found.vectors, vectors)
    assert [each.length for each in found.facts.vectors] == pytest.approx(
        vectors.double().norm(dim=1).tolist(), rel=1e-5
    )


def test_the_folder_says_what_the_vectors_are_for_and_holds_no_prompt(tmp_path):
    folder = save(tmp_path / "new" / "folder")
    assert {path.name for path in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dctlib_version")
    unknown = {"damage": None, "score": None, "held_out": None, "says": ""}
    assert config == {
        "model": "owner/name",
        "revision": "0123abc",
        "hook_point": "resid_pre",
        "layer": 10,
        "architecture": "llama",
        "operation": "add",
        "positions": "all",
        "vectors": [
            {
                "source": "exponential",
                "length": 12.5,
                "damage": 0.25,
                "score": 0.75,
                "held_out": 0.5,
                "says": "Sure! | Here",
            },
            {**unknown, "source": "power steering", "length": 6.25, "score": 0.5},
            {**unknown, "source": "mine", "length": 20.0},
        ],
        "prompts_sha256": hashlib.sha256(json.dumps(TEXTS).encode()).hexdigest(),
    }
    _, head, card = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "owner/name"
    assert "3 steering vectors" in card and "block 10" in card and 'load_model("owner/name@0123abc")' in card
    assert "| 1 | power steering | 6.25 |  | 0.5 |  |" in card
    assert not any(text.encode() in path.read_bytes() for path in folder.iterdir() for text in TEXTS)


def test_vectors_that_were_shared_steer_as_before(tmp_path, llama):
    vectors = 4 * unit_rows(2, 32).float()
    found = load_folder(save(tmp_path / "folder", vectors, ROWS[:2], layer=1))

    def residual(vector):
        with steer(llama, layer=found.facts.layer, vector=vector):
            return hooked_residual(llama, torch.arange(6, 14)[None], 0, BLOCKS)

    assert torch.equal(residual(found.vectors[1]), residual(vectors[1]))


def test_a_search_that_found_nothing_is_shared_as_such(tmp_path):
    found = load_folder(save(tmp_path / "folder", VECTORS[:0], []))
    assert found.vectors.shape == (0, 6) and found.facts.vectors == []
    assert "0 steering vectors" in (tmp_path / "folder/README.md").read_text()


def test_prompts_are_told_apart_by_their_order_and_borders():
    digests = {prompts_digest(texts) for texts in (["a", "b"], ["b", "a"], ["ab"], ["a\nb"], ['a", "b'])}
    assert len(digests) == 5
    with pytest.raises(ValueError, match="at least one prompt"):
        prompts_digest("one string")


def test_a_folder_is_replaced_by_a_folder_and_nothing_else_is(tmp_path):
    folder = save(tmp_path / "folder")
    save(folder, VECTORS[:2], ROWS[:2])
    assert len(load_folder(folder).vectors) == 2
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
        ({"rows": ROWS[:2]}, "2 rows, expected .* k rows"),
        ({"vectors": VECTORS[0]}, r"got vectors \(6,\)"),
        ({"vectors": 0 * VECTORS}, "vectors.0.length: "),
        ({"vectors": VECTORS / 0}, "vectors.0.length: "),
        ({"layer": -1}, "layer: "),
        ({"model": "owner/name\n# Injected"}, "model: .*pattern"),
        ({"model": ""}, "model: "),
        ({"revision": ""}, "revision: "),
        ({"texts": []}, "at least one prompt"),
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
        ({"layer": "10"}, "layer: .* integer, got '10'"),
        ({"vectors": [{"source": "mine", "length": 12.5}]}, r"got vectors \(3, 6\) .* says 1 vectors"),
        ({"vectors": [{"source": "mine", "length": 12.6}] * 3}, r"of the lengths \[12.6"),
        ({"vectors": [{"source": "mine", "length": 12.5, "gain": 2.0}]}, "vectors.0.gain: Extra inputs"),
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


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"vectors": VECTORS[:2]}, r"got vectors \(2, 6\)"),
        ({"vectors": 2 * VECTORS}, "of the lengths"),
        ({"vectors": VECTORS.int()}, "int32"),
        ({"vectors": VECTORS.flatten()}, r"\(18,\)"),
        ({"V": VECTORS}, "no tensor 'vectors'"),
    ],
)
def test_other_numbers_are_refused(tmp_path, tensors, message):
    folder = save(tmp_path / "folder")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "vectors.safetensors")
    sign(folder)
    with pytest.raises(ValueError, match=message):
        load_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "vectors.safetensors", "SHA256SUMS"])
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
    (folder / "vectors.bin").write_bytes(b"\x80\x04.")
    (folder / "modeling.py").write_text("raise SystemExit")
    assert torch.equal(load_folder(folder).vectors, VECTORS)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["config.json", "vectors.safetensors", "SHA256SUMS"]),
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
        ("~/models/m", "m", None),
        ("/data/smollm2-135m-instruct", "smollm2-135m-instruct-local", None),
    ],
)
def test_a_model_is_named_without_a_path_of_this_machine(tmp_path, model, name, revision):
    assert model_reference(model) == (name, revision)
    assert load_folder(save(tmp_path / "folder", model=name, revision=revision)).facts.model == name
