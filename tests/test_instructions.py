import pytest

from dctlib.instructions import instructions_of, parted


def test_lines_of_a_file_are_instructions(tmp_path):
    (tmp_path / "mine.txt").write_text("one\n\n  two é \nthree\n", encoding="utf-8")
    assert instructions_of(str(tmp_path / "mine.txt")) == ["one", "two é", "three"]
    (tmp_path / "theirs.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\x0bfour")
    assert instructions_of(str(tmp_path / "theirs.txt")) == ["one", "two", "three\x0bfour"]
    assert instructions_of(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfd", b"\xef\xbb"])
def test_what_is_no_text_file_is_named(tmp_path, content):
    path = tmp_path / "mine.txt"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read prompts=.*mine\.txt"):
        instructions_of(str(path))


@pytest.mark.real
def test_pinned_sets_have_names():
    assert len(instructions_of("harmful")) == 64
    assert set(instructions_of("harmful")).isdisjoint(instructions_of("benign"))


def test_no_instruction_is_both_fitted_and_held_out():
    fitted, held_out = parted(["a", "b", "c", "d"], fit=1, held_out=2)
    assert (fitted, held_out) == (["a"], ["b", "c"])
    with pytest.raises(ValueError, match="got 4 instructions, expected at least 3 to fit and 2"):
        parted(["a", "b", "c", "d"], fit=3, held_out=2)
