import pytest
from hypothesis import given
from hypothesis import strategies as st

from dctlib.evaluation.instructions import load_benign, read_instructions, shuffled, split, split_instructions


def test_lines_of_a_file_are_instructions(tmp_path):
    (tmp_path / "mine.txt").write_text("one\n\n  two é \nthree\n", encoding="utf-8")
    assert read_instructions(str(tmp_path / "mine.txt")) == ["one", "two é", "three"]
    (tmp_path / "theirs.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\x0bfour")
    assert read_instructions(str(tmp_path / "theirs.txt")) == ["one", "two", "three\x0bfour"]
    assert read_instructions(["a", "b", "a"]) == ["a", "b"]
    turns = [{"role": "user", "content": "a"}]
    assert read_instructions(["a", turns, turns]) == ["a", turns]
    for prompts in ("harmful", ["a"]):
        with pytest.raises(ValueError, match=r"got column='goal' without a file"):
            read_instructions(prompts, column="goal")


def test_a_file_is_looked_up_here_first_and_then_in_the_clone(tmp_path, monkeypatch):
    (tmp_path / "clone").mkdir()
    (tmp_path / "mine.txt").write_text("here")
    monkeypatch.setattr("dctlib._io.ROOT", tmp_path / "clone")
    for name in ("mine.txt", "other.txt"):
        (tmp_path / "clone" / name).write_text("there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_instructions("mine.txt") == read_instructions("~/mine.txt") == ["here"]
    assert read_instructions("other.txt") == ["there"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfd", b"\xef\xbb"])
def test_what_is_no_text_file_is_named(tmp_path, content):
    path = tmp_path / "mine.txt"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read prompts=.*mine\.txt"):
        read_instructions(str(path))


@pytest.mark.real
def test_pinned_sets_have_names():
    assert len(read_instructions("harmful")) == 64
    assert set(read_instructions("harmful")).isdisjoint(read_instructions("benign"))


def test_no_instruction_is_both_fitted_and_held_out():
    fitted, held_out = split_instructions(["a", "b", "c", "d"], fit=1, held_out=2)
    assert (fitted, held_out) == (["a"], ["b", "c"])
    with pytest.raises(ValueError, match="got 4 instructions, expected at least 3 to fit and 2"):
        split_instructions(["a", "b", "c", "d"], fit=3, held_out=2)


def test_benign_instructions_need_no_input(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text('[{"instruction": "a", "input": ""}, {"instruction": "b", "input": "c"}]')
    assert load_benign(path) == ["a"]


@given(st.integers(164, 600), st.integers(0, 99))
def test_splits_are_disjoint_complete_and_fixed(count, seed):
    parts = split(range(count), seed=seed)
    together = parts.train + parts.fit + parts.validation + parts.test
    assert sorted(together) == list(range(count))
    assert (len(parts.fit), len(parts.validation), len(parts.test)) == (32, 32, 100)
    assert parts == split(range(count), seed=seed)


def test_seeds_shuffle_differently():
    assert shuffled(range(50), seed=1) != shuffled(range(50), seed=2)


def test_too_few_items():
    with pytest.raises(ValueError, match="got 10 items, expected at least"):
        split(range(10))
