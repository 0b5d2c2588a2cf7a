"""Whatever a file holds, a loader takes it or raises ValueError: ``FUZZ_EXAMPLES=10000 pytest tests/test_fuzz.py``."""

import json
import os
import re
import string
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exchange.test_gguf import VECTORS, foreign_file
from exchange.test_hub import VECTORS as SHARED
from exchange.test_hub import save, sign
from fits.test_transcoder import transcoder as a_transcoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dctlib import Transcoder
from dctlib._io import ROOT
from dctlib.evaluation.instructions import read_instructions
from dctlib.exchange.gguf import read_control_vector, write_control_vector
from dctlib.exchange.hub import SharedVectors, load_folder
from dctlib.paper.params import check_profile, load_profile

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SMOKE: dict[str, Any] = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text(encoding="utf-8"))
FACTS = {"activation": "linear", "input_scale": 1.0, "source": 1, "target": 2, "seconds": 0.5}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates() | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.none(), inner, max_size=3)
        | st.tuples(inner)
    ),
    max_leaves=5,
)
json_text = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
).map(json.dumps) | st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "1e999", "-0", '"\\ud800"', ""])


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """A valid file with pieces overwritten, cut out, doubled or put in."""

    def apply(edits: list[tuple[str, float, int, bytes]]) -> bytes:
        found = content
        for kind, place, length, new in edits:
            at = int(place * len(found))
            before, piece, after = found[:at], found[at : at + length], found[at + length :]
            match kind:
                case "overwrite":
                    found = before + new + found[at + len(new) :]
                case "insert":
                    found = before + new + piece + after
                case "delete":
                    found = before + after
                case "double":
                    found = before + piece + piece + after
                case "end":
                    found = before
        return found

    new = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**63)])
    kind = st.sampled_from(["overwrite", "insert", "delete", "double", "end"])
    edit = st.tuples(kind, st.floats(0, 1, exclude_max=True), st.integers(1, 40), new)
    return st.lists(edit, min_size=1, max_size=4).map(apply)


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def accepted(load: Callable[..., Any], *arguments: Any) -> Any:
    """What a loader gives, or None where it raises ValueError; anything else is a crash."""
    try:
        return load(*arguments)
    except ValueError:
        return None


def same(found: Transcoder, expected: Transcoder) -> bool:
    return all(torch.equal(getattr(found, name), getattr(expected, name)) for name in ("U", "V", "alpha"))


# params


def profile_of(folder: Path, content: bytes) -> dict[str, dict[str, Any]]:
    (folder / "params").mkdir(exist_ok=True)
    if not (folder / "notebooks").exists():
        (folder / "notebooks").symlink_to(ROOT / "notebooks")
    written(folder / "params", "mine.yaml", content)
    return load_profile("mine", folder)


YAML = [
    "!!bool x", "!!int ''", "!!float ''", "!!timestamp x", "2001-99-99", "0b_", "1:99", "9" * 5000, "!!binary é",
    "[" * 2000, "{a: " * 2000, "? [a]\n: 1", "<<: 1", "&a [*a]", "*a", "!!python/name:os.system", "a: !!set [1]",
    "\ud7ff: \x85", "a: 1\na: 2", "!!omap [1]", "%YAML 9.9\n--- a", "--- a\n--- b", "{1: 2}", "null: null", "!!null x",
]  # fmt: skip


@fuzzed
@given(text=st.text(string.printable, max_size=40) | st.text(max_size=20) | st.sampled_from(YAML))
def test_any_text_for_params_is_a_value_error(tmp_path, text):
    with pytest.raises(ValueError):
        profile_of(tmp_path, text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError):
        profile_of(tmp_path, b"organisms: {steps: " + text.encode("utf-8", "surrogatepass") + b"}")


@fuzzed
@given(content=mutations(yaml.safe_dump({"ablation": SMOKE["ablation"]}).encode()))
def test_a_mutated_section_is_refused_or_holds_every_parameter(tmp_path, content):
    if found := accepted(profile_of, tmp_path, content):
        assert found["ablation"].keys() == SMOKE["ablation"].keys()


def test_what_is_fuzzed_is_valid():
    assert check_profile(SMOKE, "params/smoke.yaml") == SMOKE


keys = [(section, key) for section, values in SMOKE.items() for key in values]


@fuzzed
@given(where=st.sampled_from(keys), value=anything)
def test_a_parameter_of_any_type_is_taken_or_named(where, value):
    section, key = where
    found = accepted(check_profile, {section: {**SMOKE[section], key: value}}, "params/mine.yaml")
    if found:
        given_to_notebook = found[section][key]
        assert not (isinstance(value, bool) and isinstance(given_to_notebook, int)), "true is no count"
        json.dumps(given_to_notebook, allow_nan=False)


@fuzzed
@given(content=anything)
def test_options_of_discover_are_taken_or_named(content):
    options = content if isinstance(content, dict) else {"prompts": content}
    accepted(check_profile, {"discover": options}, "params/mine.yaml")


# Transcoder files


TYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"]
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "C64": 8}
SHAPES = {"U": [2, 3], "V": [2, 4], "alpha": [2], "objective": [1], "change": [1]}
shape = st.lists(st.integers(0, 4), max_size=3)
shapes = st.dictionaries(st.sampled_from([*SHAPES, "more"]), shape, max_size=2).map(lambda changes: SHAPES | changes)


def container(specification: dict[str, tuple[str, list[int]]], metadata: Any, fill: bytes) -> bytes:
    """A safetensors file by the letter of the format, of any types and shapes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (kind, sizes) in specification.items():
        count = torch.Size(sizes).numel() * SIZES.get(kind, 1)
        count = count // 2 if kind == "F4" else count
        header[name] = {"dtype": kind, "shape": sizes, "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + ((fill or b"\0") * end)[:end]


@fuzzed
@given(data=st.data())
def test_a_mutated_transcoder_is_refused_or_whole(tmp_path, data):
    a_transcoder().save(tmp_path / "dct.safetensors")
    content = data.draw(mutations((tmp_path / "dct.safetensors").read_bytes()))
    refused_or_usable(written(tmp_path, "dct.safetensors", content))


@fuzzed
@given(kinds=st.sampled_from(TYPES) | st.lists(st.sampled_from(TYPES), min_size=6), sizes=shapes, fill=st.binary())
def test_tensors_of_any_type_and_shape_are_refused_or_usable(tmp_path, kinds, sizes, fill):
    kinds = [kinds] * len(sizes) if isinstance(kinds, str) else kinds
    specification = {name: (kind, sizes[name]) for name, kind in zip(sizes, kinds, strict=False)}
    content = container(specification, {"transcoder": json.dumps(FACTS)}, fill)
    refused_or_usable(written(tmp_path, "dct.safetensors", content))


facts = st.fixed_dictionaries({}, optional=dict.fromkeys([*FACTS, "more"], anything))


@fuzzed
@given(text=json_text | facts.map(lambda changes: json.dumps({**FACTS, **changes}, default=str, skipkeys=True)))
def test_facts_of_any_type_are_refused_or_usable(tmp_path, text):
    tensors = {name: getattr(a_transcoder(), name) for name in ("U", "V", "alpha", "objective", "change")}
    save_file(tensors, tmp_path / "dct.safetensors", metadata={"transcoder": text})
    refused_or_usable(tmp_path / "dct.safetensors")


def refused_or_usable(path: Path) -> None:
    if dct := accepted(Transcoder.load, path):
        assert type(dct.input_scale) in (float, int) and abs(dct.input_scale) < float("inf")
        assert dct.source is None or type(dct.source) is int
        assert dct.target is None or type(dct.target) is int
        assert dct.steering_vectors().isfinite().all()
        assert dct.objective.ndim == dct.change.ndim == 1


# control vectors


@fuzzed
@given(data=st.data(), ours=st.booleans())
def test_a_mutated_control_vector_is_refused_or_whole(tmp_path, data, ours):
    path = tmp_path / "v.gguf"
    if ours:
        write_control_vector(path, VECTORS, architecture="llama")
    else:
        foreign_file(path, {f"direction.{layer - 1}": vector.numpy() for layer, vector in VECTORS.items()})
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    if found := accepted(read_control_vector, path):
        assert all(layer >= 2 and vector.isfinite().all() for layer, vector in found.items())
        assert len({vector.shape for vector in found.values()}) == 1


FIELD = st.tuples(st.integers(0, 14), st.integers(0, 14), st.sampled_from([0, 1, 3, 2**31, 2**63, 2**64 - 1]))


@fuzzed
@given(version=st.sampled_from([2, 3]), fields=st.lists(FIELD, max_size=3), tail=st.binary(max_size=64))
def test_a_gguf_file_that_counts_to_anything_is_a_value_error(tmp_path, version, fields, tail):
    content = struct.pack("<4sIQQ", b"GGUF", version, 1, len(fields))
    for number, (kind, inner, count) in enumerate(fields):
        content += struct.pack("<Q1sI", 1, b"%d" % number, kind) + struct.pack("<IQ", inner, count)
    with pytest.raises(ValueError):
        read_control_vector(written(tmp_path, "v.gguf", content + tail))


# shared folders


@fuzzed
@given(data=st.data())
def test_a_config_that_somebody_edits_and_signs_is_refused_or_usable(tmp_path_factory, data):
    folder = save(tmp_path_factory.mktemp("edited") / "folder")
    config = (folder / "config.json").read_bytes()
    edits = st.dictionaries(st.sampled_from([*json.loads(config), "more"]), anything, min_size=1, max_size=2)
    edited = edits.map(lambda found: json.dumps({**json.loads(config), **found}, default=str, skipkeys=True).encode())
    content = data.draw(mutations(config) | edited | json_text.map(lambda text: text.encode("utf-8", "surrogatepass")))
    (folder / "config.json").write_bytes(content)
    sign(folder)
    if found := accepted(load_folder, folder):
        assert isinstance(found, SharedVectors) and torch.equal(found.vectors, SHARED)
        assert type(found.facts.layer) is int and found.facts.layer >= 0 and found.facts.operation == "add"


@fuzzed
@given(data=st.data(), name=st.sampled_from(["config.json", "vectors.safetensors", "SHA256SUMS"]))
def test_a_shared_file_that_is_damaged_is_found(tmp_path_factory, data, name):
    folder = save(tmp_path_factory.mktemp("damaged") / "folder")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(damaged := data.draw(mutations(content)))
    if damaged != content:
        with pytest.raises(ValueError, match="damaged"):
            load_folder(folder)


# prompt files


@fuzzed
@given(
    content=st.binary(max_size=60)
    | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text(max_size=30).map(lambda text: text.encode("utf-16", "surrogatepass")),
)
def test_a_prompt_file_gives_instructions_or_a_value_error(tmp_path, content):
    found = accepted(read_instructions, str(written(tmp_path, "mine.txt", content)))
    if found is not None:
        assert found and all(isinstance(line, str) and line and line == line.strip() for line in found)
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        assert set(found) == {line.strip() for line in re.split(r"[\r\n]", text)} - {""}


@fuzzed
@given(
    content=json_text.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text(alphabet='ab,;"\n\t{}[]:', max_size=30).map(str.encode),
    suffix=st.sampled_from(["csv", "tsv", "json", "jsonl"]),
    column=st.sampled_from([None, "a"]),
)
def test_a_table_gives_instructions_or_a_value_error(tmp_path, content, suffix, column):
    found = accepted(partial(read_instructions, column=column), written(tmp_path, f"mine.{suffix}", content))
    assert found is None or (found and all(isinstance(each, str | list) for each in found))


@fuzzed
@given(name=st.text(max_size=12).filter(lambda name: name not in ("harmful", "benign")))
def test_a_name_of_no_prompt_file_is_a_value_error(name):
    if not (ROOT / name).is_file():
        with pytest.raises(ValueError):
            read_instructions(name)
