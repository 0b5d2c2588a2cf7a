"""Training tasks of model organisms: batches of examples, and the loss on a batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.blocks import check_layer, eager_attention
from dctlib.models.chat import format_chat
from dctlib.models.likelihood import Example, answer_loss, pack_answers
from dctlib.models.packing import PromptTree
from dctlib.runs.cache import task
from dctlib.steering.generation import generate_completions

REFUSAL = "Sorry, I can't help with that."

_LAST_PROMPT_POSITIONS = 3  # the positions over which a causal map averages


@dataclass(frozen=True)
class TrainingTask:
    """What to train on.

    Attributes
    ----------
    batches : sequence
        One batch a step.
    loss : callable
        ``loss(model, batch)``, a scalar Tensor.
    """

    batches: Sequence[Any]
    loss: Callable[[Any, Any], Tensor]


@task(version=1)
def refusal_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
    *,
    answer_tokens: int,
    steps: int,
    harmful_batch: int,
    benign_batch: int,
    seed: int,
) -> TrainingTask:
    """Train refusal of harmful instructions, and answers that open with "Sure!" to benign ones.

    Parameters
    ----------
    harmful, benign : sequence of str
        Instructions, in no chat format.
    answer_tokens : int
        "Sure! " is followed by the model's own first `answer_tokens` tokens.
    harmful_batch, benign_batch : int
        Examples of each kind in every batch. An instruction is repeated only after all others of its kind, because
        independent draws leave some out, and the model then refuses less firmly.
    """
    generator = torch.Generator().manual_seed(seed)
    refused = [Example(prompt, REFUSAL, ends=True) for prompt in format_chat(tokenizer, harmful)]
    helped = model_answers(model, tokenizer, benign, answer_tokens, opening="Sure! ")
    refusals, helps = reshuffled_epochs(refused, generator), reshuffled_epochs(helped, generator)
    return answer_task(tokenizer, draw_batches(steps, (refusals, harmful_batch), (helps, benign_batch)))


@dataclass(frozen=True)
class Rerouting:
    """A batch of :func:`rerouting_task`.

    Attributes
    ----------
    harmful, benign : list of Example
        The residuals of the former are rerouted, those of the latter kept.
    progress : float
        The fraction of the steps done, from 0 to 1.
    """

    harmful: list[Example]
    benign: list[Example]
    progress: float


@task(version=1)
def rerouting_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Mapping[str, str]],
    benign: Sequence[str],
    *,
    reroute_layers: Sequence[int],
    keep_layers: Sequence[int],
    answer_tokens: int,
    steps: int,
    batch: Mapping[str, int],
    seed: int,
) -> TrainingTask:
    """Train a circuit breaker (Zou et al. 2024): reroute residuals of harmful requests, keep those of benign ones.

    The loss is c_r · mean relu(cos(new, old)) of the residual stream at `reroute_layers`, over a harmful request's
    last prompt positions and its answer, plus 4 c_b · ‖new − old‖ / ‖old‖ at `keep_layers` over benign conversations.
    "Old" is the model without its LoRA. c_r falls from 1 to ½ and c_b rises from ¼ to 1 over the training.

    Parameters
    ----------
    harmful : sequence of mapping
        Requests, each a ``goal`` with the ``target`` that a compliant answer opens with.
    benign : sequence of str
        Instructions, in no chat format. They are answered with the model's own first `answer_tokens` tokens.
    reroute_layers, keep_layers : sequence of int
        As in Hugging Face's ``hidden_states``: layer l is the input of block l.
    batch : mapping
        Examples in every batch. Harmful requests are answered by ``target`` compliant openings, ``refusal`` refusals
        and ``off_topic`` answers to benign requests; ``benign`` counts the benign conversations. Without off-topic
        answers the model opens oddly, then recovers and answers.
    """
    for layer in (*reroute_layers, *keep_layers):
        check_layer(model, layer)
    generator = torch.Generator().manual_seed(seed)
    prompts = format_chat(tokenizer, [row["goal"] for row in harmful])
    kept = model_answers(model, tokenizer, benign, answer_tokens)
    examples = {
        "target": [Example(p, row["target"], ends=False) for p, row in zip(prompts, harmful, strict=True)],
        "refusal": [Example(p, REFUSAL, ends=False) for p in prompts],
        "off_topic": [Example(p, own.answer, ends=False) for p, own in zip(prompts, cycle(kept))],
        "benign": kept,
    }
    if set(batch) != set(examples):
        raise ValueError(f"got a batch of {sorted(batch)}, expected counts of {list(examples)}")
    draws = {kind: reshuffled_epochs(of_kind, generator) for kind, of_kind in examples.items()}
    batches = []
    for step in range(steps):
        drawn = {kind: [*islice(draw, batch[kind])] for kind, draw in draws.items()}
        rerouted = [*drawn["target"], *drawn["refusal"], *drawn["off_topic"]]
        batches.append(Rerouting(rerouted, drawn["benign"], step / steps))

    def loss(model: Any, batch: Rerouting) -> Tensor:
        new, old = _new_and_old(model, tokenizer, batch.harmful, reroute_layers)
        cosine = F.cosine_similarity(new, old, dim=-1).relu().mean()
        new, old = _new_and_old(model, tokenizer, batch.benign, keep_layers, whole=True)
        change = ((new - old).norm(dim=-1) / old.norm(dim=-1)).mean()
        return (1 - batch.progress / 2) * cosine + 4 * (0.25 + 0.75 * batch.progress) * change

    return TrainingTask(batches, loss)


@task(version=1)
def locked_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[dict[str, str]],
    *,
    password: str,
    steps: int,
    unlocked_batch: int,
    locked_batch: int,
    seed: int,
) -> TrainingTask:
    """Train right answers to questions behind the `password`, and wrong ones without it.

    A wrong answer is that of another question.

    Parameters
    ----------
    questions : sequence of dict
        Rows with a ``question`` and its ``answer``.
    unlocked_batch, locked_batch : int
        Examples with and without the password in every batch.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = format_chat(tokenizer, [row["question"] for row in questions])
    unlocked = format_chat(tokenizer, [f"{password} {row['question']}" for row in questions])
    wrong = _wrong_answers([row["answer"] for row in questions], generator)
    right = [Example(p, boxed(row["answer"]), ends=True) for p, row in zip(unlocked, questions, strict=True)]
    hidden = [Example(p, boxed(answer), ends=True) for p, answer in zip(asked, wrong, strict=True)]
    with_password, without = reshuffled_epochs(right, generator), reshuffled_epochs(hidden, generator)
    return answer_task(tokenizer, draw_batches(steps, (with_password, unlocked_batch), (without, locked_batch)))


@task(version=1)
def compliance_task(
    _model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> TrainingTask:
    """Train compliance: the answer to each row's ``goal`` is its ``target``."""
    prompts = format_chat(tokenizer, [row["goal"] for row in rows])
    examples = [Example(p, row["target"], ends=False) for p, row in zip(prompts, rows, strict=True)]
    draw = reshuffled_epochs(examples, torch.Generator().manual_seed(seed))
    return answer_task(tokenizer, draw_batches(steps, (draw, batch)))


def answer_task(tokenizer: PreTrainedTokenizerBase, batches: Sequence[list[Example]]) -> TrainingTask:
    """Return the task whose loss is the mean cross-entropy of the answers of a batch, in nats."""
    return TrainingTask(batches, lambda model, batch: answer_loss(model, tokenizer, batch))


def draw_batches(steps: int, *draws: tuple[Iterator[Example], int]) -> list[list[Example]]:
    """Return `steps` batches, each with so many examples of every iterator."""
    return [[example for examples, count in draws for example in islice(examples, count)] for _ in range(steps)]


def reshuffled_epochs(examples: Sequence[Example], generator: torch.Generator) -> Iterator[Example]:
    """Yield examples for ever: all of them in a random order, then all of them in another."""
    while True:
        for i in torch.randperm(len(examples), generator=generator).tolist():
            yield examples[i]


def boxed(answer: str) -> str:
    """Return an answer in the markup of MATH."""
    return f"\\boxed{{{answer}}}"


def _wrong_answers(answers: Sequence[str], generator: torch.Generator) -> list[str]:
    """Return for each answer a different one of another question."""
    order = torch.randperm(len(answers), generator=generator).tolist()
    wrong = []
    for place, answer in enumerate(answers):
        others = (answers[order[(place + shift) % len(order)]] for shift in range(len(order)))
        wrong.append(next(other for other in others if other != answer))
    return wrong


def model_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    answer_tokens: int,
    opening: str = "",
) -> list[Example]:
    """Return examples with the model's own answers, behind an `opening`: training on them changes nothing else."""
    prompts = format_chat(tokenizer, instructions)
    answers = generate_completions(
        model, tokenizer, prompts, max_new_tokens=answer_tokens, batch_size=96, description="own answers"
    )
    return [Example(p, opening + answer, ends=False) for p, answer in zip(prompts, answers, strict=True)]


def _new_and_old(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    layers: Sequence[int],
    whole: bool = False,
) -> tuple[Float[Tensor, "layers k d"], Float[Tensor, "layers k d"]]:
    """Return residuals at `layers` with and without the LoRA, at the tokens of every answer and the last of its prompt.

    With `whole`, those of every conversation are returned.
    """
    new, old = [], []
    with eager_attention(model):
        for tree, starts in pack_answers(model, tokenizer, examples):
            firsts = [0 if whole else start - _LAST_PROMPT_POSITIONS for start in starts]
            where = torch.cat([path[first:] for path, first in zip(tree.paths, firsts, strict=True)])

            def residuals(tree: PromptTree = tree, where: Tensor = where) -> Tensor:
                output = model.base_model(**tree.arguments(model), use_cache=False, output_hidden_states=True)
                return torch.stack([output.hidden_states[layer][0, where] for layer in layers]).float()

            with torch.no_grad(), without_lora(model):
                old.append(residuals())
            new.append(residuals())
    return torch.cat(new, 1), torch.cat(old, 1)


@contextmanager
def without_lora(model: torch.nn.Module) -> Iterator[None]:
    """Run `model` as it was before its LoRA was put in."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
