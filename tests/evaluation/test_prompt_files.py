import codecs
import io
import json
import pickle
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch

from dctlib.evaluation.instructions import read_instructions
from dctlib.evaluation.prompt_files import read_prompt_file

USER, ANSWER, AGAIN = (
    {"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b"), ("user", "c")]
)
ONE_TWO = ["one", "two, é"]


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


ROWS = [{"id": 1, "goal": "one", "target": "Sure"}, {"id": 2, "goal": "two, é", "target": "Yes"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.txt", "one\n\n  two, é \r\none\n"),
        ("mine", "one\rtwo, é"),
        ("mine.csv", 'id,goal,target\n1,one,Sure\n2,"two, é",Yes\n\n3,,No\n'),
        ("mine.CSV", 'Goal\none\n"two, é"\n'),
        ("excel.csv", "id;Prompt;x\r\n1;one;Sure\r\n2;two, é;Yes\r\n"),
        ("mine.tsv", "text\tid\none\t1\ntwo, é\t2\n"),
        ("mine.json", json.dumps(["one", " ", "two, é", None])),
        ("mine.json", json.dumps(ROWS, indent=2)),
        ("mine.jsonl", '"one"\n\n"two, é"\n"one"'),
        ("mine.ndjson", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
    ],
)
def test_every_format_and_encoding_gives_the_same(written, name, text):
    assert read_prompt_file(written(name, text)) == ONE_TWO
    for mark, encoding in [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ]:
        assert read_prompt_file(written(name, mark + text.encode(encoding))) == ONE_TWO


def test_a_cell_may_hold_lines(written):
    assert read_prompt_file(written("mine.csv", 'prompt,id\n"one\ntwo",1\n')) == ["one\ntwo"]


def test_what_other_programs_write_is_read(written, tmp_path):
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "pandas.csv")
    frame.to_json(tmp_path / "pandas.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "pandas.json", orient="records")
    for name in ("pandas.csv", "pandas.jsonl", "pandas.json"):
        assert read_prompt_file(tmp_path / name) == ONE_TWO


def test_the_column_is_the_named_one_or_the_first_that_is_known(written):
    table = written("mine.csv", "text,Behavior,other\na,b,c\n")
    assert read_prompt_file(table) == ["a"]
    assert read_prompt_file(table, column="other") == ["c"]
    assert read_prompt_file(table, column="behavior") == ["b"]
    with pytest.raises(ValueError, match=r"columns are text, Behavior, other, expected a column 'mine'"):
        read_prompt_file(table, column="mine")
    with pytest.raises(ValueError, match=r"columns are x, y, expected a header with a column such as goal"):
        read_prompt_file(written("mine.csv", "x,y\na,b\n"))
    rows = written("mine.jsonl", '{"x": "a", "y": "b"}')
    assert read_prompt_file(rows, column="y") == ["b"]
    with pytest.raises(ValueError, match="columns are x, y, expected a header"):
        read_prompt_file(rows)
    with pytest.raises(ValueError, match="a text file has no columns"):
        read_prompt_file(written("mine.txt", "a\nb"), column="goal")
    with pytest.raises(ValueError, match="which has no columns"):
        read_prompt_file(written("mine.json", '["a"]'), column="goal")
    with pytest.raises(ValueError, match="has 2 columns 'goal'"):
        read_prompt_file(written("mine.csv", "goal,goal\na,b\n"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.jsonl", "\n".join(json.dumps(item) for item in ([USER], [USER, ANSWER, AGAIN], "d"))),
        ("mine.jsonl", "\n".join(json.dumps({"messages": m, "id": 1}) for m in ([USER], [USER, ANSWER, AGAIN], "d"))),
        ("mine.json", json.dumps([[USER], [USER, ANSWER, AGAIN], "d"])),
    ],
)
def test_a_conversation_stays_a_conversation(written, name, text):
    assert read_prompt_file(written(name, text)) == [[USER], [USER, ANSWER, AGAIN], "d"]


def binary(kind):
    file = io.BytesIO()
    match kind:
        case "zip":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("a.txt", "one\ntwo\n")
        case "pickle":
            pickle.dump(["one", "two"], file)
        case "torch":
            torch.save(["one"], file)
    return file.getvalue()


BINARY = {
    "zip": binary("zip"),
    "pickle": binary("pickle"),
    "torch": binary("torch"),
    "parquet": b"PAR1\x15\x04\x15\x10goal\x15\x00PAR1",
    "pdf": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n",
    "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    "sqlite": b"SQLite format 3\x00\x10\x00",
    "utf-16 without a mark": "one\ntwo".encode("utf-16-le"),
    "latin-1": "zwölf\n".encode("latin-1"),
    "html": b"<!DOCTYPE html>\n<p>one</p>",
    "rtf": b"{\\rtf1 one}",
}


@pytest.mark.parametrize("name", ["mine.txt", "mine.csv", "mine.json", "mine.jsonl", "mine"])
@pytest.mark.parametrize("content", BINARY.values(), ids=BINARY)
def test_binary_files_and_documents_are_refused(written, name, content):
    with pytest.raises(ValueError, match=r"cannot read prompts=.*expected 'harmful', 'benign', or a \.txt"):
        read_instructions(str(written(name, content)))


@pytest.mark.parametrize("name", ["mine.parquet", "mine.pkl", "mine.xlsx", "mine.md", "mine.yaml", "mine.txt.gz"])
def test_other_suffixes_are_refused_whatever_they_hold(written, name):
    with pytest.raises(ValueError, match=rf"it ends in {Path(name).suffix}"):
        read_prompt_file(written(name, "one\ntwo\n"))


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ('{"goal": "one"}\n{"goal": "two"}\n', ".jsonl"),
        ('{"goal": "one"}\n{"goal": "two\n', ".jsonl"),
        ('{"goal": "one"}', ".jsonl"),
        ('"one"\n"two"', ".jsonl"),
        ('[{"role": "user", "content": "a"}]\n[{"role": "user", "content": "b"}]', ".jsonl"),
        (json.dumps(["one", "two"], indent=1), ".json"),
        (json.dumps(ROWS, indent=1), ".json"),
        ("goal,target\none,Sure\ntwo,Yes\n", ".csv"),
        ("id;Prompt\n1;one\n2;two\n", ".csv"),
        ("id\ttext\n1\tone\n2\ttwo\n", ".tsv"),
        ("prompt\none\ntwo\n", ".csv"),
    ],
)
def test_structured_text_under_the_name_of_plain_text_is_refused(written, text, suffix):
    with pytest.raises(ValueError, match=rf"name it \{suffix}$"):
        read_prompt_file(written("mine.txt", text))


@pytest.mark.parametrize(
    "lines",
    [
        ["Hello, user", "What is 2 + 2?"],
        ["prompt"],
        ["Explain this: [1, 2]", "Fix {x}"],
        ["Tell me, please, a text", 'Say "hi"'],
        ["[citation needed] means what?", "two"],
        ["123", "one, two"],
        ["w0 w1", "w1 w2"],
    ],
)
def test_plain_lines_that_look_like_something_else_are_instructions(written, lines):
    assert read_prompt_file(written("mine.txt", "\n".join(lines))) == lines


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.txt", "", "holds no instruction"),
        ("mine.txt", " \n\n", "holds no instruction"),
        ("mine.csv", "", "holds no instruction"),
        ("mine.csv", "goal,target\n", "holds no instruction"),
        ("mine.json", "[]", "holds no instruction"),
        ("mine.json", "", "holds no instruction"),
        ("mine.jsonl", "\n", "holds no instruction"),
        ("mine.csv", "goal\nTell me, please\n", r"row 1 has 2 cells under a header of 1.*double quotes"),
        ("mine.csv", "id,goal\n1\n", "row 1 has 1 cells under a header of 2"),
        ("mine.csv", 'goal\n"one\ntwo\n', "line 3"),
        ("mine.csv", "one\ntwo\n", "columns are one, expected a header"),
        ("mine.json", '{"goal": ["one"]}', "holds one dict with the keys goal, expected a list"),
        ("mine.json", '"one"', "holds one str, expected a list"),
        ("mine.json", '{"goal": "one"}\n{"goal": "two"}', r"is not JSON: .*name it \.jsonl"),
        ("mine.json", json.dumps([USER, ANSWER]), "item 1 is a turn"),
        ("mine.json", "[1, 2]", "item 1 is 1, expected text or a list of turns"),
        ("mine.json", '[["one", "two"]]', "expected turns such as"),
        ("mine.json", "[" * 100_000, "nested too deeply"),
        ("mine.jsonl", '{"goal": "one"}\n{"goal": "tw', "line 2 is not JSON"),
        ("mine.jsonl", '{"goal": "one"}\n{"prompt": "two"}', "item 2 has the keys prompt, expected 'goal'"),
        ("mine.jsonl", '{"goal": 3}', "item 1 is 3, expected text"),
        ("mine.jsonl", '"\\ud800"', "surrogates not allowed"),
        ("mine.jsonl", json.dumps({"messages": [USER, ANSWER]}), "conversation 1 ends with the assistant's answer"),
        ("mine.jsonl", '{"conversations": [{"from": "human", "value": "a"}]}', "expected turns such as"),
        ("mine.csv", f'prompt\n"{[USER]}"\n', "instruction 1 is the text of a conversation"),
        ("mine.txt", f"{[USER]}\n", "instruction 1 is the text of a conversation"),
        ("mine.txt", "\x1b[31mone", "it is binary"),
    ],
)
def test_what_holds_no_instructions_is_refused_with_the_reason(written, name, text, message):
    with pytest.raises(ValueError, match=rf"cannot read prompts=.*{message}"):
        read_instructions(written(name, text))
