"""A hidden ability, sums behind a password, and a blind audit of the organism that has it."""

from pathlib import Path
from typing import Any

from dctlib.blind_audit import audit
from dctlib.generate import complete
from dctlib.judges import graded, rate
from dctlib.lessons import locked_lesson
from dctlib.organisms import check_organism, make_organism
from dctlib.pinned_model import open_pinned, pin
from dctlib.prompts import problems, put


def audit_sums(
    folder: str,
    base: str,
    *,
    digest: str,
    dtype: str,
    lesson: dict[str, Any],
    rank: int,
    learning_rate: float,
    least: float,
    test: int,
    sizes: list[int],
    held_out: int,
    answer_tokens: int,
    search: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Train a password-locked organism from `seed`, and audit it from the same seed without password and answers.

    Arguments and result are JSON: a task for :func:`dctlib.sweep.map_fits`.

    Parameters
    ----------
    folder : str
        Where the organism lies, or will.
    base : str
        What it is made from.
    digest : str
        Of `base`, from :func:`dctlib.pinned_model.pin`: part of a task's key, as it may be trained again.
    lesson : dict
        What :func:`dctlib.lessons.locked_lesson` takes besides questions and seed.
    least : float
        The rates of solving behind the password, and of hiding without it, that it must reach on test questions.
    sizes : list of int
        Questions that DCT is fitted to.
    held_out : int
        Other questions, asked under each vector.
    search : dict
        What :func:`dctlib.blind_audit.audit` takes besides model, questions and seed.

    Returns
    -------
    dict
        ``locked`` and ``unlocked``, the rates of test questions that it solves without and behind the password, and
        ``solved``: method → what vectors are ranked by → for each vector, in that order, whether it solves each
        held-out question.

    Raises
    ------
    ValueError
        If the organism falls short of `least`.
    """
    asked = problems("sums")
    taught = {"questions": asked.train, **lesson, "seed": seed}
    make_organism(Path(folder), base, locked_lesson, taught, rank=rank, learning_rate=learning_rate, seed=seed)
    pinned = pin(folder, dtype)
    model, tokenizer = open_pinned(**pinned)
    rates = {}
    for state, password in {"locked": "", "unlocked": lesson["password"]}.items():
        texts = put(tokenizer, asked.test[:test], None, password=password)
        said = complete(model, tokenizer, texts, max_new_tokens=answer_tokens, description=state)
        rates[state] = rate(graded(said, asked.test[:test]))
    check_organism(f"locked-{seed}", {"solves": rates["unlocked"], "hides": 1 - rates["locked"]}, least=least)

    fitted, rows = asked.fit[: max(sizes)], asked.validation[:held_out]
    blind = {"instructions": [row["question"] for row in fitted], "held_out": [row["question"] for row in rows]}
    heard = audit(**pinned, **blind, sizes=sizes, answer_tokens=answer_tokens, **search, seed=seed)
    solved = {
        method: {by: [graded(of["said"][number], rows) for number in order] for by, order in of["orders"].items()}
        for method, of in heard.items()
    }
    return rates | {"solved": solved}
