"""What goes wrong on other people's machines: bad activations, odd tokenizers, damaged caches, full disks."""

import shutil
import subprocess
import sys

import pytest
import torch
from tiny import tiny_tokenizer, unit_rows

from dctlib import (
    CausalMap,
    FunctionMap,
    calibrate,
    fit_exponential,
    fit_linear,
    fit_quadratic,
    format_chat,
    score_vectors,
)
from dctlib.evaluation.instructions import read_instructions
from dctlib.maps.synthetic import synthetic_map
from dctlib.runs.cache import cached_fit
from dctlib.steering.effects import effects
from dctlib.steering.generation import generate_completions
from dctlib.steering.scoring import score_texts

D = 32

# activations that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("block", [0, 2])  # below the slice, and in it
def test_activations_that_are_not_finite_are_named_with_their_layer(llama, tokenizer, texts, block, value):
    llama.model.layers[block].self_attn.o_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match="activations at layer 3 are not finite; try dtype='float32'"):
        CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)


def test_what_lies_above_the_slice_does_not_matter(llama, tokenizer, texts):
    expected = CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)(unit_rows(2, D))
    llama.model.layers[3].self_attn.o_proj.weight[0, 0] = float("nan")
    assert torch.equal(CausalMap.from_model(llama, tokenizer, texts, source=1, target=3)(unit_rows(2, D)), expected)


def test_but_no_score_is_read_from_it(llama, tokenizer, texts):
    llama.model.layers[3].self_attn.o_proj.weight[0, 0] = float("nan")
    for score in (score_vectors, effects):
        with pytest.raises(ValueError, match="not finite"):
            score(llama, tokenizer, texts, unit_rows(2, D), layer=1, progress=False)
    with pytest.raises(ValueError, match="not finite"):
        score_texts(llama, tokenizer, texts)


def broken(function):
    return FunctionMap(function, d_source=D, d_target=D, dtype=torch.float64)


def test_a_map_that_overflows_at_the_scale_of_a_fit_is_named():
    overflowing = broken(lambda theta: theta + torch.exp(800 * theta) / 1e300)
    with pytest.raises(ValueError, match="not finite; try dtype='float32' or a smaller input scale"):
        fit_exponential(overflowing, num_factors=4, input_scale=1e3, iterations=3, progress=False)
    assert calibrate(overflowing) < 10  # it looks below what overflows


@pytest.mark.parametrize(
    "fit",
    [
        lambda cmap: fit_linear(cmap, num_factors=4),
        lambda cmap: fit_linear(cmap, num_factors=4, projections=8),
        lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=1.0),
        lambda cmap: fit_quadratic(cmap, num_factors=4),
    ],
)
def test_derivatives_that_are_not_finite_are_named(fit):
    with pytest.raises(ValueError, match="not finite"):
        fit(broken(lambda theta: theta.abs().sqrt()))


def test_a_jacobian_that_is_not_finite_has_no_scale():
    with pytest.raises(ValueError, match="not finite"):
        calibrate(broken(lambda theta: theta.abs().sqrt()))


# tokenizers


def test_a_tokenizer_without_a_chat_template_or_special_tokens_fits_plain_texts(llama, texts):
    plain = tiny_tokenizer()
    plain.chat_template = plain.pad_token = None
    with pytest.raises(ValueError, match=r"no chat template.*Pass plain texts"):
        format_chat(plain, ["w1"])
    found, expected = (
        CausalMap.from_model(llama, tokenizer, texts, source=1, target=3) for tokenizer in (plain, tiny_tokenizer())
    )
    assert torch.equal(found(unit_rows(2, D)), expected(unit_rows(2, D)))
    scores = score_vectors(llama, plain, texts, unit_rows(2, D), layer=1, progress=False)
    assert torch.equal(scores, score_vectors(llama, tiny_tokenizer(), texts, unit_rows(2, D), layer=1, progress=False))
    bare = tiny_tokenizer()
    bare.pad_token = bare.eos_token = None
    said, *others = (
        generate_completions(llama, tokenizer, texts, max_new_tokens=4, progress=False)
        for tokenizer in (tiny_tokenizer(), plain, bare)
    )
    assert others == [said, said] and len({len(text.split()) for text in texts}) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"positive": "Sure w1"}, r"positive='Sure w1' is 2 tokens \['Sure', 'w1'\]"),
        ({"negative": "Sorry w1 w2"}, r"negative='Sorry w1 w2' is 3 tokens"),
        ({"negative": ""}, r"negative='' is 0 tokens"),
        pytest.param(
            {"positive": "Surely"},
            r"positive='Surely' is .*<unk>",
        ),
    ],
)
def test_a_word_that_is_not_one_token_is_named_with_its_parameter(llama, tokenizer, texts, words, message):
    with pytest.raises(ValueError, match=message):
        score_vectors(llama, tokenizer, texts, unit_rows(1, D), layer=1, progress=False, **words)


# text files


def instructions(tmp_path, content):
    (tmp_path / "mine.txt").write_bytes(content)
    return read_instructions(str(tmp_path / "mine.txt"))


def test_lines_may_end_as_on_windows(tmp_path):
    assert instructions(tmp_path, b"one\r\n\r\ntwo\r\n") == ["one", "two"]


def test_a_byte_order_mark_is_no_part_of_an_instruction(tmp_path):
    assert instructions(tmp_path, "\ufeffone\ntwo".encode()) == ["one", "two"]


def test_only_line_feeds_end_an_instruction(tmp_path):
    assert instructions(tmp_path, "one\u2028two\nthree\x0bfour".encode()) == ["one\u2028two", "three\x0bfour"]


# the cache of fits


@pytest.fixture
def fitted(tmp_path):
    """Fit, remembered; how often it was computed; and the file that remembers it."""
    cmap, calls = synthetic_map(3, 12, dtype=torch.float64).cmap, []
    cmap.digest = "of the test"  # pyright: ignore[reportAttributeAccessIssue]

    def fit(cmap, **settings):
        calls.append(settings)
        return fit_exponential(cmap, input_scale=2.0, iterations=2, progress=False, **settings)

    def remembered_fit():
        return cached_fit(tmp_path, fit, cmap, num_factors=4)  # pyright: ignore[reportArgumentType]

    dct = remembered_fit()
    (path,) = tmp_path.iterdir()
    return remembered_fit, dct, calls, path


def rewritten(path, content):
    path.unlink()  # what is loaded is mapped from the old file
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\0" * len(content),
        lambda content: content.replace(b"exponential", b"exponentiel"),
    ],
)
def test_a_damaged_fit_is_computed_again(fitted, damage):
    again, dct, calls, path = fitted
    rewritten(path, damage(path.read_bytes()))
    assert torch.equal(again().V, dct.V)
    assert len(calls) == 2


def test_one_flipped_bit_of_a_fit_is_never_a_wrong_result(fitted):
    again, dct, calls, path = fitted
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    rewritten(path, content)
    found = again()
    assert len(calls) == 2
    for name in ("U", "V", "alpha", "objective", "change"):
        assert torch.equal(getattr(found, name), getattr(dct, name))


def test_a_fit_killed_while_it_is_written_is_computed_again(fitted):
    again, dct, calls, path = fitted
    path.rename(path.parent / f".{path.name}.left")  # what a kill leaves: a name that nobody asks for
    assert torch.equal(again().V, dct.V)
    assert len(calls) == 2


# a full disk

_FULL = """
import resource, sys
from pathlib import Path
import torch
from safetensors import SafetensorError
from dctlib import Transcoder
from dctlib.exchange.gguf import write_control_vector
from dctlib.exchange.hub import save_folder
from dctlib._io import sha256, write_json

def dct(m):
    rows = torch.nn.functional.normalize(torch.ones(m, 1000))
    facts = {"activation": "linear", "input_scale": 1.0, "source": 2, "target": 3, "seconds": 0.0}
    rest = {"alpha": torch.ones(m), "objective": torch.ones(0), "change": torch.ones(0)}
    return Transcoder(U=rows, V=rows.clone(), **rest, **facts)

def contents():
    return {str(path): sha256(path) for path in folder.rglob("*") if path.is_file()}

def share(path, rows):
    facts = {"layer": 1, "model": "m", "revision": None, "architecture": "llama"}
    save_folder(path, rows, [{"source": "mine"}] * len(rows), **facts, texts=["a"])

folder = Path(sys.argv[1])
writers = {
    "a.json": lambda path, m: write_json(path, list(range(10_000 * m))),
    "dct.safetensors": lambda path, m: dct(m).save(path),
    "v.gguf": lambda path, m: write_control_vector(path, {2: torch.ones(10_000 * m)}, architecture="llama"),
    "folder": lambda path, m: share(path, dct(2 * m).V),
}
for name, write in writers.items():
    write(folder / name, 1)
before = contents()
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for name, write in writers.items():
    for path in (folder / name, folder / f"new_{name}"):
        try:
            write(path, 20)
        except (OSError, SafetensorError):
            print(name)
assert contents() == before
"""


# A disk of its own, 256 KiB, in a namespace that ends with the process.
_MOUNTED = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
_MOUNTED += ['mount -t tmpfs -o size=256k none "$1" && shift && exec "$@"', "sh"]


def can_mount(folder):
    return shutil.which("unshare") and not subprocess.run([*_MOUNTED, folder, "true"], capture_output=True).returncode


@pytest.mark.parametrize("full", ["disk", "limit"])  # where no disk can be mounted, a limit on the size of a file
def test_a_full_disk_leaves_old_files_whole_and_no_half_ones(tmp_path, full):
    if full == "disk" and not can_mount(tmp_path):
        pytest.skip("mounting needs Linux with user namespaces")
    mounted = [*_MOUNTED, tmp_path] if full == "disk" else []
    done = subprocess.run([*mounted, sys.executable, "-c", _FULL, tmp_path, full], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed = done.stdout.split()
    names = ("a.json", "dct.safetensors", "v.gguf", "folder")
    assert failed == [name for name in names for _ in ("over the old one", "anew")]
