"""Options of ``discover``: the names, bounds and help that command line, notebook and profiles share."""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


def chat_options(system: str | None, template_arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options of :func:`dctlib.format_chat` that a system message and ``NAME=VALUE`` arguments make.

    Raises
    ------
    ValueError
        If an argument is not of this form, or given twice.
    """
    chat: dict[str, Any] = {} if system is None else {"system": system}
    for argument in template_arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier() or name == "system":
            raise ValueError(f"got the template argument {argument!r}, expected NAME=VALUE, as enable_thinking=false")
        if name in chat:
            raise ValueError(f"got the template argument {name} twice, expected it once")
        literal = value.lower().replace("none", "null")
        try:
            chat[name] = json.loads(literal if literal in ("true", "false", "null") else value)
        except ValueError:
            chat[name] = value
    return chat


def choose_slice(depth: int, source: int | None, target: int | None) -> tuple[int, int]:
    """Return source and target: those given, or a third and two thirds of a model of `depth` blocks."""
    third = max(1, depth // 3)
    source = min(depth // 3, depth - 1) if source is None else source
    return source, source + third if target is None else target


class SearchOptions(BaseModel):
    """Options of a search that have a default, each with its bounds and its meaning.

    Unknown keys are refused, because a misspelt one would leave its default in force unnoticed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    iterations: int = Field(8, ge=1, strict=True, description="Iterations of the fit.")
    nonlinearity: float = Field(0.5, gt=0, description="λ, which sets R, the unit of the vectors' lengths.")
    max_damage: float = Field(
        0.5,
        gt=0,
        description="Largest damage of a vector to answers to harmless requests, in nats per token. Lower it if "
        "completions are word salad.",
    )
    margin: float = Field(
        0.1,
        gt=0,
        description="How far a vector's score, 0 to 1, must exceed that of no vector and its own on harmless requests.",
    )
    answer_tokens: int = Field(48, ge=1, strict=True, description="Tokens of a completion.")
    shown_characters: int = Field(
        100, ge=1, strict=True, description="Characters of a completion that are stored and shown."
    )


class DiscoverOptions(SearchOptions):
    """Options of one discovery."""

    model: str = Field(
        min_length=1, description="A pinned name, a Hub id with its commit (owner/name@revision), or a local folder."
    )
    prompts: str | Annotated[list[str | list[dict[str, Any]]], Field(min_length=2)] = Field(
        description="A text file with one instruction a line; a .csv, .tsv, .json or .jsonl file, whose items may be "
        "conversations; or `harmful` or `benign`, the pinned sets."
    )
    column: str | None = Field(
        None, min_length=1, description="Column of the file that holds the instructions. Left out: goal, prompt, text …"
    )
    system: str | None = Field(None, description="System message before each instruction.")
    template_arguments: list[str] = Field(
        [],
        description="Argument of the model's chat template, such as enable_thinking=false. Repeat the option for more.",
    )
    fit_prompts: int = Field(
        4, ge=1, strict=True, description="Number of instructions to fit, from the first. 4 to 12 suffice."
    )
    validation: int = Field(
        12,
        ge=4,
        strict=True,
        description="Number of instructions after those. Vectors are chosen on the first half, checked on the second.",
    )
    source: int | None = Field(
        None,
        ge=0,
        strict=True,
        description="Layer to add vectors at, as in hidden_states. Left out with the target: a third of the depth.",
    )
    target: int | None = Field(
        None, ge=1, strict=True, description="Layer to measure at, about a third of the model deeper."
    )
    num_factors: int = Field(
        32, ge=1, strict=True, description="Width m of the fit. A wider fit also finds rarer behaviour."
    )
    rank_by: Literal["excess", "score", "held_out", "damage", "novelty", "fluency", "relevance"] = Field(
        "excess", description="Column that sorts the vectors found."
    )
    dtype: Literal["native", "float32", "bfloat16"] = Field(
        "native", description="native (bfloat16 where it is faster), float32 or bfloat16."
    )
    device: str = Field("auto", description="auto (CUDA if there is one, else the CPU), cpu, cuda, or such as cuda:1.")
    seed: int = Field(0, ge=0, strict=True, description="Seed of all random directions.")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError(f"got {value!r}, expected auto, cpu, cuda or cuda:NUMBER")
        return value

    @model_validator(mode="after")
    def _agree(self) -> "DiscoverOptions":
        if (self.source is None) != (self.target is None):
            raise ValueError("give both source and target, or neither")
        if self.source is not None and self.target is not None and self.source >= self.target:
            raise ValueError(f"source={self.source} must lie below target={self.target}")
        chat_options(self.system, self.template_arguments)
        return self

    @property
    def chat(self) -> dict[str, Any]:
        """The options of :func:`dctlib.format_chat`."""
        return chat_options(self.system, self.template_arguments)
