"""What supervision knows: directions between kinds of text, where and how long they work, and a LoRA."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.evaluation.selection import Candidate
from dctlib.fits.baselines import difference_of_means
from dctlib.models.chat import format_chat
from dctlib.paper.organisms.tasks import REFUSAL, compliance_task
from dctlib.paper.organisms.training import Training, make_organism


def contrastive_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    benign: Sequence[str],
    *,
    layers: Iterable[int],
) -> dict[str, list[Candidate]]:
    """What only a supervised method can know, at each of `layers`: it is told which texts are of which kind.

    Parameters
    ----------
    rows : sequence of mapping
        Harmful requests, each a ``goal`` with the ``target`` that a compliant answer opens with.
    benign : sequence of str
        Other instructions.

    Returns
    -------
    dict
        ``means``: of benign less harmful requests (Arditi et al. 2024); ``CAA``: of the same requests with the
        compliant answer less those with a refusal, at the answer's last token (Rimsky et al. 2024).
    """
    asked = format_chat(tokenizer, [row["goal"] for row in rows])
    complied = [text + row["target"] for text, row in zip(asked, rows, strict=True)]
    contrasts = {
        "means": (format_chat(tokenizer, benign), asked),
        "CAA": (complied, [text + REFUSAL for text in asked]),
    }
    return {
        name: [Candidate(at, difference_of_means(model, tokenizer, *sides, layer=at)) for at in layers]
        for name, sides in contrasts.items()
    }


def train_compliance_lora(
    folder: Path, base: str, rows: Sequence[Mapping[str, str]], *, steps: int, seed: int
) -> Training:
    """Train a LoRA on AdvBench's compliant openings: what supervision unlocks. The model is saved in `folder`."""
    settings = {"rows": [dict(row) for row in rows], "steps": steps, "batch": 16, "seed": seed}
    return make_organism(folder, base, compliance_task, settings, rank=16, learning_rate=5e-4, seed=seed)
