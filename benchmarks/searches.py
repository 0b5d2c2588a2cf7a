"""Search a model several times, each time on instructions of its own, and count the searches that find anything.

    python benchmarks/searches.py smollm2-135m-instruct --source 10 --target 20 --prompts benign --runs 10
    python benchmarks/searches.py qwen2.5-coder-0.5b-instruct --source 8 --target 16 --prompts harmful --runs 2
    python benchmarks/searches.py smollm2-135m-instruct --source 10 --target 20 --prompts benign --runs 30 --bound

Where the instructions are harmless and nothing is planted, the share that finds anything is the rate of false finds.
No two searches share an instruction or a seed. With --bound no search is run: a score is at most the share of answers
that the unsteered model withholds, so its answers alone tell on which instructions a search could find anything.
A group of searches of one model on one set of instructions is replaced, search by search, in
benchmarks/results/searches.json; --first continues it.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib import format_chat, generate_completions, load_model, search_vectors
from dctlib._io import ROOT, write_json
from dctlib.discovery.criteria import Criteria, Grades
from dctlib.discovery.found import FoundVectors
from dctlib.discovery.reading import Reading
from dctlib.discovery.search import SearchSettings
from dctlib.evaluation.instructions import read_instructions, shuffled
from dctlib.models.chat import Instruction

_RESULTS = ROOT / "benchmarks" / "results" / "searches.json"
_FIT, _ALL = 4, 16  # instructions to fit, and with those to validate on


def main() -> None:
    """Run the searches that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--source", type=int, required=True)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--prompts", default="benign", help="benign, harmful or a file")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="seed of the first search; earlier ones are kept")
    parser.add_argument("--bound", action="store_true", help="read unsteered answers alone, and search nothing")
    given = parser.parse_args()
    instructions = shuffled(read_instructions(given.prompts), seed=0)
    if len(instructions) < _ALL * (given.first + given.runs):
        parser.error(f"got {len(instructions)} instructions, expected {_ALL} for each search")
    model, tokenizer = load_model(given.model, dtype="native")
    run = partial(bound, model, tokenizer) if given.bound else partial(search, model, tokenizer, given)
    group = {
        "kind": "bound" if given.bound else "search",
        **{name: getattr(given, name) for name in ("model", "prompts", "source", "target")},
    }
    for seed in range(given.first, given.first + given.runs):
        begun = time.time()
        result = run(instructions[_ALL * seed : _ALL * (seed + 1)], seed)
        row = {"seed": seed, **result, "seconds": round(time.time() - begun)}
        print(row, flush=True)
        record(_RESULTS, group, row)


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: argparse.Namespace,
    instructions: list[Instruction],
    seed: int,
) -> dict[str, Any]:
    """Run one search, and return its numbers."""
    slice_of = {"source": given.source, "target": given.target}
    fit, validation = instructions[:_FIT], instructions[_FIT:]
    return describe(
        search_vectors(model, tokenizer, fit=fit, validation=validation, **slice_of, seed=seed, progress=False)
    )


def describe(found: FoundVectors) -> dict[str, Any]:
    """Return the numbers of one search; those of vectors are the best ones."""
    read = found.candidates.dropna(subset=["score"]).to_dict("records")
    names = ("held_out", "change", "withheld")
    best = {name: _rounded(max((row[name] for row in read), default=math.nan)) for name in names}
    return {"found": len(found.table), **best, "random": _rounded(found.random)}


def bound(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, instructions: list[Instruction], _seed: int
) -> dict[str, Any]:
    """Return what a vector whose answers were perfect would score on the held-out ones, and whether that is a find."""
    margin, tokens = (SearchSettings.model_fields[name].default for name in ("margin", "answer_tokens"))
    texts = format_chat(tokenizer, instructions[_FIT:])
    answers = generate_completions(model, tokenizer, texts, max_new_tokens=tokens, progress=False)
    withheld = Criteria(model, tokenizer, math.inf).grade(texts, answers, [answers]).withheld
    one, passed = torch.ones_like(withheld), torch.ones_like(withheld, dtype=torch.bool)
    perfect = Reading([], answers, Grades(one, one, one, withheld, passed, passed), None)
    (held_out,) = perfect.scores(slice(len(texts) // 2, None))
    return {
        "found": int(held_out >= margin),
        "held_out": _rounded(held_out),
        "withheld": _rounded(withheld.mean().item()),
    }


def record(path: Path, group: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a search to its group in a file of groups, in place of those of the same seed or a higher one.

    A group states how many searches found anything, with the 95 % Clopper-Pearson interval of their share.
    """
    groups = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    others = [each for each in groups if any(each[name] != value for name, value in group.items())]
    earlier = [each for old in groups if old not in others for each in old["searches"] if each["seed"] < row["seed"]]
    rows = [*earlier, row]
    anything = sum(each["found"] > 0 for each in rows)
    share = binomtest(anything, len(rows)).proportion_ci(0.95, method="exact")
    counts = {"of": len(rows), "found_anything": anything, "interval": [_rounded(share.low), _rounded(share.high)]}
    write_json(path, [*others, group | counts | {"searches": rows}])


def _rounded(number: float) -> float | None:
    return None if math.isnan(number) else round(number, 3)


if __name__ == "__main__":
    main()
