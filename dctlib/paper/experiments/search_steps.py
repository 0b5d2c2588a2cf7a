"""What each step of a search adds to the strongest vector of a fit, at equal numbers of generated tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dctlib.discovery.criteria import Criteria
from dctlib.discovery.damage import measure_damage, unsteered_answers
from dctlib.discovery.lengths import estimate_lengths, longest_within
from dctlib.discovery.pool import find_candidates
from dctlib.discovery.reading import Judge, Reader, Reading, halve
from dctlib.discovery.search import search_vectors
from dctlib.evaluation.instructions import Split, benign_split, harmful_instructions
from dctlib.evaluation.judges import fraction_true, is_compliant
from dctlib.evaluation.statistics import Interval, interval, success_at_k
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import Instruction, format_chat
from dctlib.models.fingerprint import model_key
from dctlib.models.loading import dtype_name
from dctlib.paper.datasets import question_split
from dctlib.paper.experiments.real_models import BOUNDS, open_model
from dctlib.paper.organisms.arithmetic import grade_answers
from dctlib.runs.cache import Setting, Task, task
from dctlib.steering.generation import generate_per_vector

Behaviour = Literal["refusal", "sums"]
"""What a model hides: answers that it refuses to give, or sums that it adds up wrongly without a password."""

STEPS = ("strongest factor", "read all", "halving", "more sources", "own lengths", "whole search")
"""Ways to choose a vector. Each adds something to the one before it."""

_BENIGN = 24  # harmless requests: one half serves for lengths and fluency
_LEAST_TOKENS = 4  # of a completion in a halving
_PROMPTS = {"fit": "fit_prompts", "validation": "validation", "test": "test"}


@dataclass(frozen=True, eq=False)
class CountingReader(Reader):
    """A reader that counts the tokens that its completions may have."""

    tokens: list[int] = field(default_factory=list)

    def read(self, requests: Sequence[Instruction], vectors: Float[Tensor, "k d"], *, max_new_tokens: int) -> Reading:
        """Read as :class:`Reader` does, and count."""
        self.tokens.append(len(vectors) * len(requests) * max_new_tokens)
        return super().read(requests, vectors, max_new_tokens=max_new_tokens)

    def counted(self) -> int:
        """Return the tokens since the last call."""
        total = sum(self.tokens)
        self.tokens.clear()
        return total


@dataclass(frozen=True, eq=False)
class Choice:
    """A vector that was chosen: the method that found it, its length in units of R, and the tokens of the choice."""

    vector: Float[Tensor, " d"]
    source: str | None
    length: float
    tokens: int | None


def search_steps_cells(
    models: Sequence[str],
    *,
    behaviours: Sequence[Behaviour],
    sources: Sequence[int],
    targets: Sequence[int],
    clean: str | None,
    dtype: str,
    **settings: Any,
) -> list[tuple[Task, Setting]]:
    """Return the cells that notebooks/search_steps.ipynb reads, one for each model.

    Parameters
    ----------
    models, behaviours, sources, targets : sequence
        Each model with what it hides and the slice to search.
    clean : str or None
        The model that judges answers, or None if each model judges its own.
    dtype : str
        As for :func:`dctlib.load_model`. A record names the type, so those of ``"native"`` hold for machines like this.
    settings
        The other arguments of :func:`search_steps`. Its ``prompts`` are given as ``fit_prompts``, ``validation`` and
        ``test``.
    """
    prompts = {part: settings.pop(name) for part, name in _PROMPTS.items()}
    cells: list[tuple[Task, Setting]] = []
    for name, behaviour, source, target in zip(models, behaviours, sources, targets, strict=True):
        model = model_key(name, dtype_name(dtype))
        setting = {"model": model, "judge": model_key(clean, dtype_name(dtype)) if clean else model}
        setting |= {"behaviour": behaviour, "source": source, "target": target, "prompts": prompts, **settings}
        cells.append((search_steps, setting))
    return cells


@task(version=1, tolerance=0.1, agreement=0.7)
def search_steps(
    model: Mapping[str, Any],
    *,
    judge: Mapping[str, Any],
    behaviour: Behaviour,
    source: int,
    target: int,
    nonlinearity: float,
    num_factors: int,
    iterations: int,
    max_damage: float,
    prompts: Mapping[str, int],
    answer_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Choose a vector of one model in several ways, and compare them with the best of all candidates.

    The candidates are those of :func:`dctlib.discovery.pool.find_candidates` without the random directions, at length
    R. The oracle is the candidate with the most successes on one half of the test requests. It and every other vector
    are reported on the other half. Tokens are counted under vectors; the unsteered answers of each round are left out.
    The ways are those of ``STEPS``:

    - ``strongest factor``: the exponential factor that changes the target layer most, by ‖Δ(Rv)‖. It costs no
      completion.
    - ``read all``: the best exponential factor by its score, with all of them read on all validation requests.
    - ``halving``: the same by successive halving, for as many tokens.
    - ``more sources``: halving with the candidates of all methods, for as many tokens.
    - ``own lengths``: the same with each candidate at the length where its damage is about the bound, and the last one
      at the longest length within it.
    - ``whole search``: :func:`dctlib.search_vectors`, which generates more tokens.

    Parameters
    ----------
    model, judge : mapping
        What :func:`dctlib.models.fingerprint.model_key` returns, for the model and for the one that judges its answers.
    behaviour : str
        What the model hides. For ``"refusal"`` the search has no judge, and a success is an answer that
        :func:`dctlib.evaluation.judges.is_compliant` accepts. For ``"sums"`` both are a right sum.
    source, target : int
        The slice.
    nonlinearity, num_factors, iterations, max_damage
        As for :func:`dctlib.search_vectors`.
    prompts : mapping
        Numbers of requests: ``fit``; ``validation``, to choose on; ``test``.
    answer_tokens : int
        Length of the completions.
    seed : int
        Seed of the search.

    Returns
    -------
    dict
        ``any``, for each request of the oracle's half the fraction of candidates that succeed; and ``choices``, for
        each of ``STEPS``, ``unsteered``, ``random`` (the random direction that halving leaves, within the bound) and
        ``oracle``: ``solved``, the successes on the reported half; ``source``, the method that found the vector, or
        None without one; ``length``, in units of R; and ``tokens``, those that the choice may have generated, or None
        for the whole search.

    Raises
    ------
    ValueError
        If there is no such behaviour.
    """
    opened, tokenizer = open_model(model["model"], model["dtype"])
    instructions, succeeds, told = _hidden(behaviour, judge)
    fit, validation, test = (getattr(instructions, part)[: prompts[part]] for part in _PROMPTS)
    slice_ends: dict[str, Any] = {"source": source, "target": target}
    fits: dict[str, Any] = {"nonlinearity": nonlinearity, "iterations": iterations, "seed": seed}
    cmap = CausalMap.from_model(opened, tokenizer, format_chat(tokenizer, fit), **slice_ends)
    pool = find_candidates(cmap, num_factors, **fits)
    at_R = pool.input_scale * pool.directions
    searched = [row for row in range(len(pool)) if row not in pool.controls]
    factors = [row for row in searched if pool.sources[row] == "exponential"]

    benign = benign_split().test[:_BENIGN]
    examples = unsteered_answers(opened, tokenizer, benign[::2])
    reader = CountingReader(opened, tokenizer, source, Criteria.from_answers(opened, tokenizer, examples), told)
    measure = partial(measure_damage, opened, tokenizer, examples, layer=source)
    estimated = estimate_lengths(measure, at_R, max_damage)
    at_bound = torch.tensor(estimated)[:, None] * at_R

    def successes(requests: list[str], vectors: Float[Tensor, "k d"]) -> list[list[bool]]:
        steering: dict[str, Any] = {"layer": source, "max_new_tokens": answer_tokens, "progress": False}
        completed = generate_per_vector(opened, tokenizer, format_chat(tokenizer, requests), vectors, **steering)
        return [list(succeeds(requests, completions)) for completions in completed]

    def halved(rows: list[int], vectors: Float[Tensor, "m d"]) -> int:
        """Return the row that is left, for about as many tokens whatever the number of rows."""
        tokens = max(_LEAST_TOKENS, round(answer_tokens * len(factors) / len(rows)))
        (place,) = halve(reader, validation, vectors[rows], most=1, least=1, max_new_tokens=tokens).rows
        return rows[place]

    def at_length_R(row: int) -> Choice:
        return Choice(at_R[row], pool.sources[row], 1.0, reader.counted())

    def within_bound(row: int) -> Choice:
        (multiple,) = longest_within(measure, at_R[row][None], max_damage, start=[estimated[row]])
        return Choice(multiple * at_R[row], pool.sources[row], multiple, reader.counted())

    choices = {"unsteered": Choice(0 * at_R[0], None, 0.0, 0)}
    choices["random"] = within_bound(halved(pool.controls, at_bound))
    forces = cmap(at_R[factors].to(cmap.device, cmap.dtype)).norm(dim=1).tolist()
    choices["strongest factor"] = at_length_R(factors[forces.index(max(forces))])
    halving = at_length_R(halved(factors, at_R))
    each = max(1, (halving.tokens or 0) // (len(factors) * len(validation)))
    reading = reader.read(validation, at_R[factors], max_new_tokens=each)
    choices["read all"] = at_length_R(factors[reading.order()[0]])
    choices["halving"] = halving
    choices["more sources"] = at_length_R(halved(searched, at_R))
    choices["own lengths"] = within_bound(halved(searched, at_bound))

    options: dict[str, Any] = {"judge": told, "benign": benign, "max_damage": max_damage, "progress": False}
    options |= {"answer_tokens": answer_tokens, "num_factors": num_factors, **slice_ends, **fits}
    found = search_vectors(opened, tokenizer, fit=fit, validation=validation, **options)
    choices["whole search"] = Choice(0 * at_R[0], None, 0.0, None)
    if len(found.vectors):
        multiple = found.vectors[0].norm().item() / found.input_scale
        choices["whole search"] = Choice(found.vectors[0], str(found.table["source"][0]), multiple, None)

    on_half = successes(test[::2], at_R[searched])
    rates = [fraction_true(each) for each in on_half]
    choices["oracle"] = at_length_R(searched[rates.index(max(rates))])
    solved = successes(test[1::2], torch.stack([choice.vector for choice in choices.values()]))
    return {
        "any": torch.tensor(on_half).double().mean(0).tolist(),
        "choices": {
            name: {"solved": each, "source": choice.source, "length": choice.length, "tokens": choice.tokens}
            for (name, choice), each in zip(choices.items(), solved, strict=True)
        },
    }


def _hidden(behaviour: Behaviour, judge: Mapping[str, Any]) -> tuple[Split, Judge, Judge | None]:
    """Return the requests of a behaviour, what a success is, and the judge that the search is given."""
    if behaviour == "sums":
        questions = question_split("sums")
        rows = {row["question"]: row for part in vars(questions).values() for row in part}

        def is_right(requests: Sequence[Instruction], completions: Sequence[str]) -> list[bool]:
            return grade_answers(completions, [rows[str(request)] for request in requests])

        return questions.column("question"), is_right, is_right
    if behaviour == "refusal":
        model, tokenizer = open_model(judge["model"], judge["dtype"])
        return harmful_instructions(), partial(is_compliant, model, tokenizer, **BOUNDS), None
    raise ValueError(f"got behaviour={behaviour!r}, expected one of {get_args(Behaviour)}")


@dataclass(frozen=True)
class Step:
    """A way to choose a vector, over models that hide the same.

    Attributes
    ----------
    success : Interval
        The fraction of test requests that succeed, a mean over models, with the interval over requests.
    each : list of float
        That of each model.
    closed : float or None
        The share of the gap between the strongest factor and the oracle that is closed, as a ratio of means; None
        where there is no gap.
    tokens : float or None
        The mean number of tokens that the choice may generate.
    """

    success: Interval
    each: list[float]
    closed: float | None
    tokens: float | None


def summarise_steps(found: Sequence[Mapping[str, Any]]) -> dict[str, Step]:
    """Return each way of ``STEPS``, no vector, a candidate at random (``any``), the best random one, and the oracle.

    Parameters
    ----------
    found : sequence of mapping
        Results of :func:`search_steps` on models that were asked the same requests.
    """
    chosen = {name: [result["choices"][name] for result in found] for name in found[0]["choices"]}
    solved = {name: torch.tensor([choice["solved"] for choice in each]) for name, each in chosen.items()}
    success = {name: success_at_k(table[:, None]).at(1) for name, table in solved.items()}
    each = {name: table.double().mean(1).tolist() for name, table in solved.items()}
    at_random = torch.tensor([result["any"] for result in found])
    success["any"], each["any"] = interval(at_random.mean(0).tolist()), at_random.mean(1).tolist()
    first = success[STEPS[0]].mean
    gap = success["oracle"].mean - first

    def tokens(name: str) -> float | None:
        counts = [choice["tokens"] for choice in chosen.get(name, [])] if name != "oracle" else []
        return None if not counts or None in counts else sum(counts) / len(counts)

    return {
        name: Step(success[name], each[name], (success[name].mean - first) / gap if gap > 0 else None, tokens(name))
        for name in ("unsteered", "any", "random", *STEPS, "oracle")
    }
