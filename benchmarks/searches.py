"""Search a model several times on instructions where nothing is planted, and count the searches that find anything.

    python benchmarks/searches.py smollm2-135m-instruct --source 10 --target 20 --runs 10

Without a judge a search finds whatever changes the answers to its requests, so the count says how much a find means.
The results go to benchmarks/results/searches.json.
"""

import argparse
import random
import time

from dctlib import load_model, search_vectors
from dctlib._io import ROOT, write_json
from dctlib.evaluation.instructions import read_instructions


def main() -> None:
    """Run the searches that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--source", type=int, required=True)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--prompts", default="benign")
    parser.add_argument("--runs", type=int, default=10)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, dtype="native")
    runs = []
    for seed in range(given.runs):
        instructions = read_instructions(given.prompts)
        random.Random(seed).shuffle(instructions)
        begun = time.time()
        found = search_vectors(
            model,
            tokenizer,
            fit=instructions[:4],
            validation=instructions[4:16],
            source=given.source,
            target=given.target,
            seed=seed,
        )
        table = found.candidates.dropna(subset=["elsewhere"])
        excess = [row["held_out"] - row["elsewhere"] for row in table.to_dict("records")]
        runs.append(
            {
                "seed": seed,
                "found": len(found.table),
                "best": round(max(excess, default=0.0), 3),
                "random": round(found.random, 3),
                "seconds": round(time.time() - begun),
            }
        )
        print(runs[-1])
    write_json(ROOT / "benchmarks" / "results" / "searches.json", vars(given) | {"searches": runs})


if __name__ == "__main__":
    main()
