"""The command ``python -m dctlib discover``, from its options to its files."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model
from typer.testing import CliRunner

from dctlib import format_chat
from dctlib._io import ROOT
from dctlib.cli import app, main
from dctlib.discovery.options import DiscoverOptions, chat_options, choose_slice
from dctlib.exchange.hub import load_folder

ABSENT = ["dvc", "papermill", "seaborn", "peft", "math_verify", "pypandoc", "typst", "ray", "nbformat", "nbconvert"]


@pytest.fixture
def arguments(tmp_path, tokenizer):
    """Arguments of a small run on a tiny model and eight instructions."""
    tiny_model("Llama", dtype=torch.float32).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "mine.txt").write_text("\n".join(f"w{4 * i} w{4 * i + 1}" for i in range(8)))
    small = {"num-factors": 2, "iterations": 1, "fit-prompts": 2, "validation": 4, "answer-tokens": 4}
    pairs = {
        "model": tmp_path / "tiny",
        "prompts": tmp_path / "mine.txt",
        **small,
        "max-damage": 100.0,
        "margin": 0.001,
        "dtype": "float32",
    }
    return [text for name, value in pairs.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command in this process, with its folders in `tmp_path`."""
    monkeypatch.setattr("dctlib.cli.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dctlib", "discover", *arguments])
        main()

    return run


def test_discover_runs_without_the_papers_packages_and_another_ranking_computes_nothing_again(
    arguments, tmp_path, run, capsys
):
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        f"import pathlib, dctlib.cli as cli; cli.ROOT = pathlib.Path({str(tmp_path)!r}); cli.main()"
    )
    command = [sys.executable, "-c", program, "discover", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stage 5 of 5" in done.stderr
    printed = done.stdout.strip().splitlines()
    assert printed.pop() == "next:    python -m dctlib export vectors/tiny/discover 0 --to gguf --output vector.gguf"
    assert [line.split()[-1] for line in printed[-3:]] == [
        "runs/tiny/discover_explorer.html",
        "runs/tiny/discover.json",
        "vectors/tiny/discover",
    ]
    results = json.loads((tmp_path / "runs/tiny/discover.json").read_text())
    assert (results["source"], results["target"]) == (1, 2)
    assert printed[0] == results["meaning"]
    assert len(printed[1:-3]) == len(results["readings"]) == results["found"] > 1
    shared = load_folder(tmp_path / "vectors/tiny/discover")
    assert (shared.facts.model, shared.facts.layer) == ("tiny", 1)
    assert [each.says for each in shared.facts.vectors] == [row["says"] for row in results["readings"]]
    assert "What tiny hides" in (tmp_path / "runs/tiny/discover_explorer.html").read_text()

    remembered = sorted(path.name for path in (tmp_path / ".cache/tiny").iterdir())
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--rank-by", "damage")
    assert stopped.value.code == 0
    assert sorted(path.name for path in (tmp_path / ".cache/tiny").iterdir()) == remembered
    told = capsys.readouterr().err
    assert "stage" not in told
    assert "this search is remembered: only its vectors are ranked again, by damage" in told
    again = json.loads((tmp_path / "runs/tiny/discover.json").read_text())
    damage = [row["damage"] for row in again["readings"]]
    assert damage == sorted(damage)
    assert sorted(damage) == sorted(row["damage"] for row in results["readings"])


def test_another_search_of_the_model_leaves_the_first_alone(arguments, tmp_path, run, capsys):
    def searched(*more):
        with pytest.raises(SystemExit):
            run(*arguments, *more)
        return capsys.readouterr()

    def files(name):
        folders = [tmp_path / "runs" / name, tmp_path / "vectors" / name]
        return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}

    assert "another search" not in searched().err
    first = files("tiny")
    told = searched("--seed", "1")
    assert "runs/tiny holds another search, so this one goes to runs/tiny-2\n" in told.err
    assert "vectors/tiny-2/discover 0 --to gguf" in told.out
    assert files("tiny") == first
    second = files("tiny-2")
    assert len(second) == len(first) > 5
    assert "vectors/tiny-2/discover" in (tmp_path / "runs/tiny-2/discover_explorer.html").read_text()

    searched("--seed", "1")  # each search finds its own files again
    searched()
    (tmp_path / "mine.txt").write_text("\n".join(f"w{i} w{i + 2}" for i in range(8)))
    assert "goes to runs/tiny-3\n" in searched().err  # the same options, other prompts
    assert (files("tiny"), files("tiny-2")) == (first, second)


@pytest.mark.parametrize(
    ("given", "expected"), [([], None), (["--device", "auto"], None), (["--device", "cpu"], "cpu")]
)
def test_the_model_is_loaded_on_the_device_that_is_named(arguments, run, monkeypatch, given, expected):
    class Enough(Exception):
        pass

    def record(name, **options):
        assert options == {"device": expected, "dtype": "float32"}
        raise Enough

    monkeypatch.setattr("dctlib.discovery.discover.load_model", record)
    with pytest.raises(Enough):
        run(*arguments, *given)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "gpu"], "discover: device: got 'gpu', expected auto, cpu, cuda or cuda:NUMBER"),
        (["--device", "cuda:99"], "got device 'cuda:99', which this machine and this torch lack"),
        (["--source", "5"], "discover: give both source and target"),
        (["--source", "5", "--target", "5"], "discover: source=5 must lie below target=5"),
        (["--num-factors", "0"], "discover: num_factors = 0: Input should be greater than or equal to 1"),
        (["--max-damage", "0"], "discover: max_damage = "),
        (["--name", "../m"], "got --name '../m'"),
        (["--name", "laptop"], "got --name 'laptop'"),
        (["--prompts", "nowhere.txt"], "cannot read prompts='nowhere.txt'"),
        (["--fit-prompts", "30"], "got 8 instructions, expected at least 30"),
        (["--source", "1", "--target", "9"], "got source=1, target=9"),
        (["--model", "."], "is a folder without config.json"),
        (["--column", "goal"], "a text file has no columns"),
        (["--template-arguments", "enable_thinking"], "'enable_thinking', expected NAME=VALUE"),
        (["--template-arguments", "a=1", "--template-arguments", "a=2"], "template argument a twice"),
        (["--template-arguments", "enable_thinkin=false"], "no argument enable_thinkin; it reads none"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_fitted(arguments, tmp_path, run, capsys, more, message):
    (tmp_path / "params").mkdir()
    (tmp_path / "params/laptop.yaml").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, *more)
    assert str(stopped.value).startswith("error: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert "stage 2" not in capsys.readouterr().err and not (tmp_path / ".cache").exists()


def test_a_system_message_and_conversations_reach_every_step(arguments, tmp_path, run, monkeypatch):
    """A run with a system message is that of the same conversations with a system turn each."""
    formatted = []

    def record(tokenizer, instructions, **options):
        formatted.append((len(instructions), options))
        return format_chat(tokenizer, instructions, **options)

    for module in ("discovery.discover", "discovery.search", "discovery.reading", "discovery.damage"):
        monkeypatch.setattr(f"dctlib.{module}.format_chat", record)
    users = [[{"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(8)]
    tables = {"users": users, "whole": [[{"role": "system", "content": "w9"}, *turns] for turns in users]}
    for name, conversations in tables.items():
        lines = [json.dumps({"id": 1, "asked": turns}) for turns in conversations]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    more = ["--column", "asked", "--source", "1", "--target", "3"]
    readings = []
    for prompts, system, name in [("users", ["--system", "w9"], "a"), ("whole", [], "b"), ("users", [], "c")]:
        with pytest.raises(SystemExit):
            run(*arguments, *more, "--prompts", str(tmp_path / f"{prompts}.jsonl"), *system, "--name", name)
        results = json.loads((tmp_path / f"runs/{name}/discover.json").read_text())
        readings.append(results)
        assert len(formatted) >= 4
        assert all(options == ({"system": "w9"} if system else {}) for _, options in formatted)
        formatted.clear()
        page = (tmp_path / f"runs/{name}/discover_explorer.html").read_text()
        assert '"instructions":["w2 w3","w3 w4","w4 w5","w5 w6"]' in page
    with_system, whole, without = readings
    assert with_system["input_scale"] != without["input_scale"]
    assert (with_system["options"]["system"], with_system["options"]["column"]) == ("w9", "asked")
    assert {name: whole[name] for name in ("input_scale", "of")} == {
        name: with_system[name] for name in ("input_scale", "of")
    }


@pytest.mark.parametrize(
    ("depth", "expected"), [(1, (0, 1)), (4, (1, 2)), (24, (8, 16)), (28, (9, 18)), (30, (10, 20))]
)
def test_a_slice_that_is_left_out_is_the_middle_third(depth, expected):
    assert choose_slice(depth, None, None) == expected
    assert choose_slice(depth, 2, 5) == (2, 5)


def test_template_arguments_are_values_of_the_template():
    given = ["enable_thinking=False", "effort=high", "budget=3", "date=", "tool=none"]
    assert chat_options(None, []) == {}
    assert chat_options("", given) == {
        "system": "",
        "enable_thinking": False,
        "effort": "high",
        "budget": 3,
        "date": "",
        "tool": None,
    }


def test_a_folder_of_someone_else_is_refused_before_anything_is_loaded(arguments, tmp_path, run, capsys):
    (tmp_path / "vectors/tiny/discover").mkdir(parents=True)
    (tmp_path / "vectors/tiny/discover/thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match="is no folder that save_folder wrote"):
        run(*arguments)
    assert "load" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name"), [("owner/Some-Model.1@0abc", "Some-Model.1"), ("models/laptop/refusal", "refusal")]
)
def test_options_of_the_command_line_are_those_of_the_model(monkeypatch, tmp_path, model, name):
    called = []

    class Enough(Exception):
        pass

    def record(options, paths):
        called.append((options, paths))
        raise Enough

    monkeypatch.setattr("dctlib.discovery.discover.discover", record)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("one\ntwo\n")
    options = ["--model", model, "--prompts", "mine.txt", "--max-damage", "0.25", "--num-factors", "16"]
    result = CliRunner().invoke(app, ["discover", *options])
    assert isinstance(result.exception, Enough), result.output
    ((given, paths),) = called
    expected = {"model": model, "prompts": str(tmp_path / "mine.txt"), "max_damage": 0.25, "num_factors": 16}
    assert given == DiscoverOptions(**expected)
    assert paths.shared == ROOT / "vectors" / name / "discover"


def test_help_says_what_every_option_does():
    done = CliRunner().invoke(app, ["discover", "--help"], env={"COLUMNS": "200"})
    for option, field in DiscoverOptions.model_fields.items():
        assert f"--{option.replace('_', '-')}" in done.output
        assert field.description


def test_the_command_line_starts_without_torch():
    program = "import sys, dctlib.cli\nprint(sorted({'torch', 'transformers', 'papermill'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
