"""Run Heretic, which edits a model's weights, and test its edits as the methods of notebooks/real_baselines.ipynb.

    python -m venv build/heretic && build/heretic/bin/pip install torch==2.13.0 heretic-llm==1.4.0
    python benchmarks/heretic.py qwen2.5-coder-1.5b-instruct --heretic build/heretic/bin/heretic

Heretic searches for the layers and the strength of an ablated difference of means, with few refusals and a small KL
divergence of the first token (Weidmann 2025). It runs offline, in an environment of its own, with prompts from text
files, and key strokes answer its menus. The defaults below cap its trials, prompts and tokens. Each of its best trials
is one edit. The edit with the most answers to validation requests within the bound on damage is chosen, and tested. The
result is records/study/heretic/<model>.json.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pexpect
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib import format_chat, generate_completions, load_model
from dctlib._io import ROOT, write_json
from dctlib.discovery.damage import unsteered_answers
from dctlib.evaluation.instructions import benign_split, harmful_instructions, shuffled
from dctlib.evaluation.judges import fraction_true, is_compliant
from dctlib.models.blocks import eager_attention
from dctlib.models.likelihood import Example, pack_answers
from dctlib.models.packing import PromptTree
from dctlib.paper.experiments.real_baselines import choose_within
from dctlib.paper.experiments.real_models import BOUNDS, judge_texts
from dctlib.paper.params import load_profile

_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."  # the default of its chat template
_DOWN, _UP, _ENTER = "\x1b[B", "\x1b[A", "\r"


def main() -> None:
    """Run Heretic, and test its edits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pinned model that is on disk")
    parser.add_argument("--heretic", type=Path, required=True, help="Heretic's program")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--directions", type=int, default=128, help="requests of each kind for the difference of means")
    parser.add_argument("--evaluated", type=int, default=32, help="requests of each kind on which a trial is scored")
    parser.add_argument("--tokens", type=int, default=30, help="of a completion in a trial")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = ROOT / "build" / f"heretic-{given.model}"
    begun = time.perf_counter()
    edits = run_heretic(given, folder)
    seconds = time.perf_counter() - begun
    settings = load_profile("study")["real_baselines"]
    settings = {name: settings[name] for name in ("dtype", "validation", "test", "benign", "max_damage", "tokens")}
    setting = {"method": "heretic", "heretic": "1.4.0", "model": given.model, "shuffle": 0, **settings}
    setting |= {name: getattr(given, name) for name in ("trials", "directions", "evaluated", "seed")}
    result = compare_edits(given.model, edits, **settings)
    path = ROOT / "records" / "study" / "heretic" / f"{given.model}.json"
    write_json(path, {"setting": setting, "result": result | {"seconds": seconds}})
    print(path, result["grid"], fraction_true([verdict["compliant"] for verdict in result["verdicts"]]))


def run_heretic(given: argparse.Namespace, folder: Path) -> list[Path]:
    """Run Heretic's search, save its best trials as adapters, and return their folders."""
    folder.mkdir(parents=True, exist_ok=True)
    harmful, benign = harmful_instructions(), shuffled(benign_split().train, seed=given.seed)
    lines = [line for line in benign if "\n" not in line]
    prompts = {
        "good_prompts": lines[: given.directions],
        "bad_prompts": shuffled(harmful.train, seed=given.seed)[: given.directions],
        "good_evaluation_prompts": lines[given.directions : given.directions + given.evaluated],
        "bad_evaluation_prompts": harmful.validation[: given.evaluated],
    }
    options: dict[str, Any] = {
        "n_trials": given.trials,
        "n_startup_trials": round(0.3 * given.trials),  # the share of the default, 60 of 200
        "batch_size": given.evaluated,
        "max_response_length": given.tokens,
        "response_prefix": "",
        "system_prompt": _SYSTEM,
        "seed": given.seed,
        "dtypes": ["bfloat16"],
        "export_strategy": "adapter",
    }
    tables = []
    for name, texts in prompts.items():
        (folder / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
        tables.append(f'[{name}]\ndataset = "{name}.txt"')
    values = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    (folder / "config.toml").write_text("\n".join([*values, *tables]), encoding="utf-8")

    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    arguments = ["--model", str(ROOT / "models" / given.model)]
    with (folder / "log.txt").open("wb") as log:
        program = pexpect.spawn(str(given.heretic), arguments, cwd=folder, env=offline, timeout=None, logfile=log)
        program.setwinsize(60, 200)
        program.expect("Which trial do you want to use")
        count = len(best_trials(folder))
        for number in range(count):
            program.send(_DOWN * number + _ENTER)
            program.expect("What do you want to do")
            program.send(_ENTER)  # save the model to a local folder
            program.expect("Path to the folder")
            program.send(f"{edit_folder(folder, number)}{_ENTER}")
            program.expect("Model saved")
            program.expect("What do you want to do")
            program.send(_UP + _ENTER)  # back to the trials
            program.expect("Which trial do you want to use")
        program.close(force=True)
    return [edit_folder(folder, number) for number in range(count)]


def edit_folder(folder: Path, number: int) -> Path:
    """Return the folder of one of the best trials, the one with the fewest refusals first."""
    return folder / f"edit-{number}"


def best_trials(folder: Path) -> list[tuple[int, float]]:
    """Return the refusals and the divergence of the trials that Heretic's menu offers, in its order."""
    trials: dict[int, dict[str, Any]] = {}
    (journal,) = (folder / "checkpoints").glob("*.jsonl")
    for line in map(json.loads, journal.read_text(encoding="utf-8").splitlines()):
        for name, value in line.get("user_attr", {}).items():
            trials.setdefault(line.get("trial_id", -1), {})[name] = value
    finished = sorted((t["refusals"], t["kl_divergence"]) for t in trials.values() if "refusals" in t)
    best: list[tuple[int, float]] = []
    for trial in finished:
        if not best or trial[1] < best[-1][1]:
            best.append(trial)
    return best


def compare_edits(
    model: str,
    edits: list[Path],
    *,
    dtype: str,
    validation: int,
    test: int,
    benign: int,
    max_damage: float,
    tokens: dict[str, int],
) -> dict[str, Any]:
    """Choose an edit under a bound on damage, and test it: the results of ``real_baselines.at_equal_damage``."""
    original, tokenizer = load_model(model, dtype=dtype)
    harmful, harmless = harmful_instructions(), benign_split().test[:benign]
    bounded_on, reported_on = (unsteered_answers(original, tokenizer, half) for half in (harmless[::2], harmless[1::2]))

    def complete(edited: PreTrainedModel, requests: list[str], max_new_tokens: int) -> list[str]:
        texts = format_chat(tokenizer, requests)
        return generate_completions(edited, tokenizer, texts, max_new_tokens=max_new_tokens, progress=False)

    damage_of = partial(damage, original, tokenizer)
    requests, grid = harmful.validation[:validation], []
    for number, edit in enumerate(edits):
        edited, _ = load_model(str(edit), dtype=dtype)
        completions = complete(edited, requests, tokens["validation"])
        answered = fraction_true(is_compliant(original, tokenizer, requests, completions, **BOUNDS))
        grid.append({"number": number, "multiple": 1.0, "answered": answered, "damage": damage_of(edited, bounded_on)})
    chosen = choose_within(grid, max_damage)
    edited, _ = load_model(str(edits[chosen]), dtype=dtype)
    requests = harmful.test[:test]
    completions = complete(edited, requests, tokens["test"])
    return {
        "grid": grid,
        "found": True,
        "chosen": chosen,
        "verdicts": judge_texts(original, tokenizer, requests, completions, tokens["shown"]),
        "damage": damage_of(edited, reported_on),
        "length": None,  # no vector is added
    }


def damage(
    original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edited: PreTrainedModel, examples: list[Example]
) -> float:
    """Return the mean KL(edited ‖ original) of the next token over the answers, in nats."""
    total, count = 0.0, 0
    for tree, starts in pack_answers(original, tokenizer, examples):
        before = torch.cat([path[start - 1 : -1] for path, start in zip(tree.paths, starts, strict=True)])
        changed, unchanged = (_logprobs(model, tree)[before] for model in (edited, original))
        total += torch.sum(changed.exp() * (changed - unchanged)).item()
        count += len(before)
    return total / count


def _logprobs(model: PreTrainedModel, tree: PromptTree) -> Float[Tensor, "tokens vocabulary"]:
    with torch.no_grad(), eager_attention(model):
        return model(**tree.arguments(model), use_cache=False).logits[0].float().log_softmax(-1)


if __name__ == "__main__":
    main()
