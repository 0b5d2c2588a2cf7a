"""Every family of transformers: each capability is right, to float64, or refused with a ValueError."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, WIDTH, family_model
from tiny import tiny_tokenizer, unit_rows

from dctlib import CausalMap, ablate, fit_exponential, score_vectors, steer
from dctlib.models.blocks import eager_attention, get_blocks, output_residual, split_residual
from dctlib.steering.hooks import ablated_copy

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
SOURCE, TARGET = 1, 3
TEXT = "w1 w2 w3 w4 w5"


class FullModel:
    """References by hooks on the whole model and reverse-mode differentiation; no code of dctlib's maps."""

    def __init__(self, model):
        self.model, self.blocks = model, list(get_blocks(model))
        self.tokens = tiny_tokenizer()(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]

    def run(self, theta=None, *, target=TARGET):
        """Return h_target and the logits, with `theta` added to h_source."""
        found = []

        def add(_block, args, kwargs):
            hidden, args, kwargs = split_residual(args, kwargs)
            return (hidden + (0 if theta is None else theta), *args), kwargs

        hooks = [
            self.blocks[SOURCE].register_forward_pre_hook(add, with_kwargs=True),
            self.blocks[target - 1].register_forward_hook(lambda _b, _a, out: found.append(output_residual(out))),
        ]
        try:
            with eager_attention(self.model):
                logits = self.model(input_ids=self.tokens, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return found[0], logits

    def change(self, theta):
        return (self.run(theta)[0] - self.run()[0])[0, -3:].mean(0)

    def gradients(self, theta, u, v):
        """Return J(θ)ᵀ u and the derivative of ⟨J(θ)ᵀ u, v⟩."""
        theta = theta.clone().requires_grad_()
        first = torch.autograd.grad(self.change(theta), theta, u, create_graph=True)[0]
        return first.detach(), torch.autograd.grad(first, theta, v)[0]

    def residuals(self):
        """Return every block's input and output in one run."""
        seen = []
        hooks = []
        for block in self.blocks:
            hooks.append(
                block.register_forward_pre_hook(
                    lambda _b, a, k: seen.append(split_residual(a, k)[0].clone()), with_kwargs=True
                )
            )
            hooks.append(block.register_forward_hook(lambda _b, _a, out: seen.append(output_residual(out).clone())))
        logits = self.run()[1]
        for hook in hooks:
            hook.remove()
        return seen, logits


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def check_map(model, full):
    cmap = CausalMap.from_model(model, tiny_tokenizer(), [TEXT], source=SOURCE, target=TARGET)
    theta = 3 * unit_rows(2, WIDTH)
    return distance(cmap(theta), torch.stack([full.change(row) for row in theta]))


def check_derivatives(model, full):
    cmap = CausalMap.from_model(model, tiny_tokenizer(), [TEXT], source=SOURCE, target=TARGET)
    u, v = unit_rows(2, 1, WIDTH, seed=4)
    first, second = full.gradients(0 * v[0], u[0], v[0])
    errors = [distance(cmap.vjp(0 * v, u)[0], first), distance(cmap.vjp_at_zero(u)[0], first)]
    errors.append(abs((u[0] @ cmap.jvp(0 * v, v)[0] - first @ v[0]).item()) / first.norm().item())
    errors.append(distance(cmap.second_derivative_vjp(u, v)[0], second))
    errors.append(abs((u[0] @ cmap.second_derivative(v, v)[0] - second @ v[0]).item()) / second.norm().item())
    return max(errors)


def check_fit(model, full):
    cmap = CausalMap.from_model(model, tiny_tokenizer(), [TEXT], source=SOURCE, target=TARGET)
    dct = fit_exponential(cmap, num_factors=2, input_scale=3.0, iterations=1, progress=False)
    return 0.0 if dct.V.isfinite().all() else 1.0


def check_scores(model, full):
    vectors = 3 * unit_rows(2, WIDTH)
    found = score_vectors(model, tiny_tokenizer(), [TEXT], vectors, layer=SOURCE, progress=False)
    logits = torch.stack([full.run(row)[1][0, -1].float() for row in vectors])
    return distance(found, logits[:, 4] - logits[:, 5])


def check_steer(model, full):
    vector = 3 * unit_rows(1, WIDTH)[0]
    with eager_attention(model), steer(model, layer=SOURCE, vector=vector):
        found = model(input_ids=full.tokens, use_cache=False).logits
    return distance(found, full.run(vector)[1])


def check_ablate(model, full):
    direction = unit_rows(1, WIDTH, seed=9)[0]
    clean = full.run()[1]
    with ablate(model, direction):
        residuals, logits = full.residuals()
    assert distance(logits, clean) > 1e-4
    return max((hidden @ direction).norm().item() / hidden.norm().item() for hidden in residuals)


def check_export(model, full):
    direction = unit_rows(1, WIDTH, seed=9)[0]
    edited = ablated_copy(model, direction)
    with ablate(model, direction):
        expected = full.run()[1]
    return distance(FullModel(edited).run()[1], expected)


CHECKS = {
    "map": check_map,
    "derivatives": check_derivatives,
    "fit": check_fit,
    "score": check_scores,
    "steer": check_steer,
    "ablate": check_ablate,
    "export": check_export,
}


def capabilities(family):
    """Return, for each capability, None where it is right, or the words of its refusal."""
    model = family_model(family)
    full = FullModel(model)
    found = {}
    for name, check in CHECKS.items():
        with torch.set_grad_enabled(name in ("derivatives", "fit")):
            try:
                error = check(model, full)
            except ValueError as refusal:
                found[name] = re.sub(r"\b[\w]+(ForCausalLM|LMHeadModel|LMHead)\b", "the model", str(refusal))
            else:
                assert error < 1e-4, f"{family}: {name} is wrong by {error:.1e} without a word"
                found[name] = None
    return found


def table_row(family, found):
    """Return a family's row of the table in docs/families.md."""
    return f"| {family} | " + " | ".join("right" if found[name] is None else "refused" for name in CHECKS) + " |"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_or_refused_as_the_table_says(family):
    assert table_row(family, capabilities(family)) in TABLE.read_text(encoding="utf-8").splitlines()


def test_the_table_covers_many_families_and_few_refusals():
    rows = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if "right" in line]
    whole = [row for row in rows if all(cell == "right" for cell in row[1 : 1 + len(CHECKS) - 1])]
    assert len(rows) >= 60
    assert len(whole) >= 55  # in all but export, which norms and experts rule out


def write_table():
    """Write docs/families.md: python tests/test_families.py."""
    results = {family: capabilities(family) for family in FAMILIES}
    reasons = {}
    for family, found in results.items():
        for name, words in found.items():
            if words is not None:
                reasons.setdefault(re.sub(r"[\d.%(), -]+", " ", words), (words, []))[1].append(f"{family} ({name})")
    lines = [
        _HEADING,
        "| family | " + " | ".join(CHECKS) + " |",
        "|" + "---|" * (1 + len(CHECKS)),
        *(table_row(family, found) for family, found in results.items()),
        "",
        "## Messages of the refusals",
        "",
        *(f"- *{words}*: {', '.join(cases)}" for words, cases in reasons.values()),
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


_HEADING = f"""# What works with which family

Each row is a small random model of one family of transformers {transformers.__version__}, computed in float64.
*right* means that the result equals a reference, made by hooks on the whole model, to a relative error of 1e-4.
*refused* means a ValueError that [says why](#messages-of-the-refusals). A search needs all columns from *map* to
*steer*. The column *export* is about `ablated_copy` alone: steering vectors of any family can be
[written for other tools](export.md). A test checks this table, and `python tests/test_families.py` writes it again.

| column | what was compared |
|---|---|
| map | Δ(θ) of {SOURCE}→{TARGET} with the change of the hooked model |
| derivatives | vjp, jvp and both second derivatives with reverse mode on the whole model |
| fit | an exponential fit runs to its end and is finite |
| score | logit differences of `score_vectors` with the steered model's own logits |
| steer | logits under `steer` with those of the hooked model |
| ablate | what `ablate` leaves of the direction at the input and output of every block |
| export | logits of `ablated_copy` with those under `ablate` |

## How a layout is found

dctlib holds no list of families. When a model is first used, dctlib runs it on six tokens and finds these parts:

| what | where | how it is found, and verified |
|---|---|---|
| blocks | `models/blocks.py`: `get_blocks` | the outermost list of modules as long as the configuration says |
| replay | `maps/replay.py`: `verify_replay` | with random vectors: the slice alone equals a hook on the whole model |
| logits | `models/logits.py`: `compute_logits` | the modules behind the last block must give the model's own logits |
| writers | `models/writers.py`: `residual_writers` | modules whose outputs sum to what a block adds |
| derivatives | `maps/autograd.py` | forward mode is compared with reverse mode, which is used where they differ |

`python -m dctlib check MODEL` prints what works on a model. To add a layout that is refused, change the one function
that the table names, and add the family to `tests/families.py`. Leave the verification as it is.

## The table
"""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write_table()
