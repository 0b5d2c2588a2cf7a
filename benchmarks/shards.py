"""One pass of a fit, divided among Ray actors of one thread each: ``python benchmarks/shards.py`` (needs dctlib[ray]).

Writes benchmarks/results/shards.json: wall times with 1 and 2 actors and without Ray, all on one thread a worker, and
their ratios.
"""

import torch
from bench import MODEL, PROMPTS, SOURCE, TARGET, seconds

from dctlib import CausalMap, format_chat, load_model
from dctlib._io import ROOT, write_json
from dctlib.fits.baselines import random_vectors
from dctlib.models.loading import silence_transformers
from dctlib.runs.sharded_map import ShardedMap

FACTORS = 64


def main() -> None:
    silence_transformers()
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, dtype="native")
    texts = format_chat(tokenizer, PROMPTS[:1])
    cmap = CausalMap.from_model(model, tokenizer, texts, source=SOURCE, target=TARGET)
    theta, cotangent = (random_vectors(FACTORS, cmap.d_source, norm=1.0, seed=seed) for seed in (0, 1))
    alone = seconds(lambda: cmap.value_and_vjp(theta, cotangent))
    expected, found = cmap(theta), {"no Ray": alone}
    for shards in (1, 2):
        where = {"source": SOURCE, "target": TARGET, "dtype": "native"}
        divided = ShardedMap(MODEL, texts, shards=shards, ray="local", **where)
        torch.testing.assert_close(divided(theta), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
        found[f"{shards} actors"] = seconds(lambda divided=divided: divided.value_and_vjp(theta, cotangent))
        divided.close()
    ratios = {name: alone / value for name, value in found.items()}
    for name, value in found.items():
        print(f"{name}: {value:.2f} s, {ratios[name]:.2f} times as fast as one process without Ray")
    result = {"factors": FACTORS, "model": MODEL, "torch": torch.__version__, "seconds": found, "speed": ratios}
    write_json(ROOT / "benchmarks" / "results" / "shards.json", result)


if __name__ == "__main__":
    main()
