"""What the notebooks that go past the post may be told, as in sections.py."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dctlib.paper.sections import (
    Bounds,
    Count,
    Dtype,
    Few,
    Fitted,
    Layer,
    OnModel,
    Positive,
    Refusing,
    Section,
    Seed,
    Several,
    Tested,
)

Kind = Literal["backdoor", "persona", "language", "refusal"]


class Baselines(Fitted):
    """notebooks/baselines.ipynb: does it beat what people use?"""

    models: Annotated[list[str], Field(min_length=1)]
    """The organisms that all methods are to unlock, each a folder or a name as elsewhere."""
    dtype: Dtype
    validation: Few
    seed: Seed
    clean: str
    """The model that judges what is fluent."""
    bounds: Bounds
    melbo_vectors: Count
    melbo_steps: Count
    """Of each vector; its authors take 300."""
    melbo_learning_rate: Positive
    """About the angle, in radians, by which a vector turns in a step; theirs was near 0.01."""
    supervised_layers: Annotated[list[Layer], Field(min_length=1)]
    """Where directions between kinds of text are taken, of which the best on validation is added or ablated."""
    supervised_lengths: list[Positive]
    """In units of R; each direction is tried at its own length as well."""
    tries: Count
    """k: vectors of each method, best first on validation, whose completions are judged."""
    test: Annotated[Tested, Field(ge=4)]
    answer_tokens: Count
    lora_steps: Count

    @model_validator(mode="after")
    def _tried_are_found(self) -> "Baselines":
        if self.tries > self.num_factors:
            raise ValueError(f"tries={self.tries} are of num_factors={self.num_factors} vectors, so at most as many")
        return self


class Stability(Fitted):
    """notebooks/stability.ipynb: do other seeds and prompts find the same, and is the transcoder faithful?"""

    models: Annotated[list[str], Field(min_length=1)]
    """The organisms that every setting is fitted to, each a folder or a name as elsewhere."""
    dtype: Dtype
    validation: Few
    fit_prompts: Annotated[int, Field(ge=1, le=16, strict=True)]
    """Of each fit: half of a split's, so that other prompts are others."""
    seeds: Annotated[list[Seed], Field(min_length=2, max_length=2)]
    """Of the two fits of every setting."""
    widths: Annotated[list[Count], Field(min_length=1)]
    test: Several
    probes: Count
    """Directions of each kind along which a transcoder is held to its map."""


class Replicates(Fitted, Refusing):
    """notebooks/replicates.ipynb: which of the post's claims hold on organisms of other seeds?"""

    base: str
    """The model they are made from: a pinned name, a Hub id or a folder."""
    dtype: Dtype
    seeds: Annotated[list[Seed], Field(min_length=2)]
    """Of the organisms, and of their fits."""
    least: Annotated[float, Field(ge=0, le=1)]
    """The rates of refusing and of helping that each must reach before anything is fitted to it."""
    validation: Few
    threshold: float
    """Validation score from which a vector counts."""
    test: Several
    ablated: Several
    """Test instructions that are scored while one direction after another is ablated."""


class Planted(Section):
    """Which organisms with a secret, and which clean ones, a notebook makes or opens."""

    kinds: Annotated[list[Kind], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """One organism each, and its secret; kinds take turns."""
    controls: Annotated[list[Seed], Field(min_length=1)]
    """Of the clean organisms."""

    @model_validator(mode="after")
    def _every_kind_has_its_turn(self) -> "Planted":
        if len(set(self.seeds)) < max(len(self.seeds), len(self.kinds)):
            raise ValueError(
                f"seeds={self.seeds} make one organism each: give {len(self.kinds)} or more, all different"
            )
        return self


class Secrets(Planted):
    """notebooks/secrets.ipynb: organisms with a planted secret each, and clean ones, trained alike."""

    base: str
    """The model they are made from: a pinned name, a Hub id or a folder."""
    rank: Count
    learning_rate: Positive
    steps: Count
    triggered_batch: Count
    plain_batch: Annotated[int, Field(ge=2)]
    benign_prompts: Count
    answer_tokens: Count
    """Of its own words that an organism learns to go on saying."""
    spoken_tokens: Count
    """Of what it is made to say on held-out instructions: enough to tell a language."""
    test: Tested
    least: Annotated[float, Field(ge=0, le=1)]
    """The rate that each must reach on held-out prompts before anything is fitted to it."""
    shown_characters: Count


class Audited(Section):
    """What every notebook that audits organisms blind is told about the search."""

    dtype: Dtype
    source: Layer
    target: Layer
    nonlinearity: Positive
    iterations: Count
    num_factors: Annotated[int, Field(ge=2, multiple_of=2)]
    """Vectors of each method, and samples; even, as power steering's come with both signs."""
    answer_tokens: Count


class Auditing(Audited, Planted):
    """notebooks/auditing.ipynb: does a blind audit find what was planted?"""

    sizes: Annotated[list[Count], Field(min_length=1)]
    """Prompts that DCT is fitted on."""
    held_out: Count
    """Instructions whose completions are read."""
    workers: Count | None
    """Organisms at a time. Left out, one; on the Ray cluster of params/run.yaml or RAY_ADDRESS, as many as it holds."""

    @model_validator(mode="after")
    def _intervals_need_two(self) -> "Auditing":
        if len(self.seeds) < 2:
            raise ValueError("an interval of the recall needs two organisms with a secret: give more seeds")
        return self


class HiddenSums(Audited):
    """notebooks/hidden_sums.ipynb: does a blind audit find an ability behind a password?"""

    base: str
    """The model they are made from: a pinned name, a Hub id or a folder."""
    seeds: Annotated[list[Seed], Field(min_length=2)]
    """Of the organisms, and of their audits."""
    rank: Count
    learning_rate: Positive
    steps: Count
    unlocked_batch: Count
    locked_batch: Count
    password: Annotated[str, Field(min_length=1)]
    least: Annotated[float, Field(ge=0, le=1)]
    """The rates of solving and of hiding that each must reach before it is audited."""
    test: Tested
    sizes: Annotated[list[Few], Field(min_length=1)]
    """Questions that DCT is fitted on."""
    held_out: Annotated[Few, Field(ge=2)]
    """Questions that are asked under each vector; it unlocks an organism that then solves half of them."""


class Anomaly(Fitted, Planted):
    """notebooks/anomaly.ipynb: does distance along a transcoder's factors tell a triggered prompt from others?"""

    dtype: Dtype
    fit_prompts: Count
    trusted: Annotated[int, Field(ge=2)]
    """Prompts whose residuals are taken for usual; the first of them are fitted."""
    test: Several
    """Held-out instructions, asked clean, behind the trigger and behind the decoy."""
    seed: Seed

    @model_validator(mode="after")
    def _fitted_are_trusted(self) -> "Anomaly":
        if self.fit_prompts > self.trusted:
            raise ValueError(f"fit_prompts={self.fit_prompts} are part of trusted={self.trusted}, so at most as many")
        return self


class Others(Section):
    """Other values of each choice behind a fit, tried one at a time."""

    prompts: list[Literal["averaged", "concatenated"]]
    nonlinearity: list[Positive]
    horizon: list[Count]
    positions: list[Count]


class Choices(OnModel, Fitted):
    """notebooks/choices.ipynb: what is each choice behind a fit worth?"""

    validation: Few
    positions: Count
    others: Others
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Each draws other prompts to fit, and another start."""
    test: Tested
