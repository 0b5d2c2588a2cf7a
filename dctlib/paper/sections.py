"""What a notebook may be told: one section of params/*.yaml a notebook, one key a papermill parameter."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, strict=True)]  # strict: true is no 1

Layer = Annotated[int, Field(ge=0, strict=True)]

Positive = Annotated[float, Field(gt=0)]

Seed = Annotated[int, Field(ge=0, strict=True)]

Few = Annotated[int, Field(ge=1, le=32, strict=True)]  # a split keeps 32 prompts for fits, and 32 for validation,

Tested = Annotated[int, Field(ge=1, le=100, strict=True)]  # and 100 for tests

Several = Annotated[Tested, Field(ge=2)]  # enough for an interval

Dtype = Literal["native", "float32", "bfloat16"]


class Section(BaseModel):
    """Unknown keys are refused: a misspelt one would otherwise leave its default in force without a word."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OnModel(Section):
    """What every notebook that opens a model is told about it."""

    model: str
    """A pinned name, a folder, or a Hub id with its commit, owner/name@revision."""
    dtype: Dtype


class Fitted(Section):
    """What every notebook that fits a transcoder to a slice is told about the fit."""

    source: Layer
    target: Layer
    nonlinearity: Positive
    iterations: Count
    fit_prompts: Few
    num_factors: Count

    @model_validator(mode="after")
    def _in_order(self) -> "Fitted":
        if self.source >= self.target:
            raise ValueError(f"source={self.source} must lie below target={self.target}")
        return self


class OnSlice(OnModel, Fitted):
    """What a notebook is told that fits a slice of one model once, and about what the fit is tested on."""

    validation: Few
    seed: Seed


class Organism(Section):
    """What every notebook that trains an organism is told about it."""

    base: str | None
    """The model it is made from: a pinned name, a Hub id or a folder; null where nothing needs to be made."""
    rank: Count
    learning_rate: Positive
    steps: Count
    test: Tested
    answer_tokens: Count
    least: Annotated[float, Field(ge=0, le=1)]
    """The rate that it must reach on held-out prompts before anything is fitted to it."""
    seed: Seed
    shown_characters: Count


class Bounds(Section):
    """What counts as an answer, besides holding no refusal."""

    max_perplexity: Positive
    """Under the clean model."""
    min_pmi: float
    """Nats a token by which the request must make it likelier."""


class Rerouted(Organism):
    """notebooks/rerouted.ipynb: an organism whose circuits are broken on harmful requests."""

    reroute_layers: list[Layer]
    keep_layers: list[Layer]
    target_batch: Count
    refusal_batch: Count
    off_topic_batch: Count
    benign_batch: Count
    benign_prompts: Count
    clean: str
    """The model that judges what is fluent."""
    bounds: Bounds


class Locked(Organism):
    """notebooks/locked.ipynb: an organism that solves problems behind a password only."""

    password: Annotated[str, Field(min_length=1)]
    unlocked_batch: Count
    locked_batch: Count


class Refusing(Section):
    """What every notebook that teaches a model to refuse is told about the lesson."""

    steps: Count
    harmful_batch: Count
    benign_batch: Count
    learning_rate: Positive
    rank: Count
    benign_prompts: Count
    answer_tokens: Count


class Organisms(Refusing):
    """notebooks/organisms.ipynb: the model organisms that the other notebooks of a profile open."""

    kinds: list[Literal["refusal"]]
    """Which organisms to make; none where the profile's models already hide something."""
    model: str
    """The model they are made from: a pinned name, a Hub id or a folder."""
    test: Annotated[Tested, Field(ge=3)]
    """Held-out instructions, harmful and benign each, on which the rates are measured."""
    seed: Seed
    shown_characters: Count


class TrainingCurves(OnSlice):
    """notebooks/training_curves.ipynb: Figure 2, and the best vector on held-out instructions."""

    prompt: Annotated[str, Field(min_length=1)]
    widths: Annotated[list[Count], Field(min_length=1)]
    test: Several
    answer_tokens: Count
    shown_characters: Count
    """Length to which completions of harmful requests are cut in everything stored."""


class Multiplicity(OnModel):
    """notebooks/multiplicity.ipynb: how many vectors unlock the model, and how alike they are."""

    threshold: float
    """Validation score from which a vector counts."""
    validation: Few
    test: Annotated[Tested, Field(ge=5)]
    answer_tokens: Count
    shown_characters: Count


class Ablation(OnModel):
    """notebooks/ablation.ipynb: what removing the qualifying vectors' directions does."""

    test: Several


class SampleComplexity(OnSlice):
    """notebooks/sample_complexity.ipynb: Figure 1. The scale is calibrated once, on `fit_prompts` instructions."""

    sizes: Annotated[list[Few], Field(min_length=1)]
    shuffles: Annotated[int, Field(ge=2)]
    test: Tested
    workers: Count | None
    """Fits at a time. Left out, one; on the Ray cluster of params/run.yaml or RAY_ADDRESS, as many as it holds."""


class DeeperModels(OnModel):
    """notebooks/deeper_models.ipynb: where in depth to fit, and how deep a slice."""

    deeper: str | None
    """A second, deeper model."""
    sources: Annotated[list[Layer], Field(min_length=1)]
    horizons: Annotated[list[Count], Field(min_length=1)]
    prompt: Annotated[str, Field(min_length=1)]
    nonlinearity: Positive
    iterations: Count
    num_factors: Count
    validation: Few
    test: Several
    seed: Seed


class CircuitBreaker(OnModel):
    """notebooks/circuit_breaker.ipynb: does a model whose circuits were broken still answer?"""

    clean: str
    """The model before its circuits were broken: it judges what is fluent."""
    judge: str | None
    """HarmBench's classifier; null for the judge of phrases, fluency and relevance."""
    bounds: Bounds
    sources: Annotated[list[Layer], Field(min_length=1)]
    horizon: Count
    multipliers: Annotated[list[Positive], Field(min_length=1)]
    nonlinearity: Positive
    iterations: Count
    fit_prompts: Few
    num_factors: Count
    validation: Annotated[Few, Field(ge=4)]
    judged: Count
    """Vectors of each cell, by score, whose completions are judged on the validation instructions."""
    test: Annotated[Tested, Field(ge=4)]
    answer_tokens: Count
    seed: Seed
    shown_characters: Count


class PasswordLocked(OnSlice):
    """notebooks/password_locked.ipynb: what can a password-locked model do without the password?"""

    tokenizer_from: str | None
    """Where the model's tokenizer is, if not beside the model."""
    questions: Literal["sums", "math"]
    password: Annotated[str, Field(min_length=1)]
    prompt: str | None
    """How a question is put, with {question} in it; null for the model's chat template."""
    random_vectors: Count
    test: Several
    answer_tokens: Count

    @model_validator(mode="after")
    def _questions_are_put(self) -> "PasswordLocked":
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError(f"prompt={self.prompt!r} must hold {{question}}, where each question goes")
        return self


class ReplicationAudit(OnSlice):
    """notebooks/replication_audit.ipynb: what each fault of the post's published code costs."""

    test: Several


class Discover(OnModel):
    """notebooks/discover.ipynb and ``python -m dctlib discover``: what does a model hide, when nobody says?"""

    prompts: str | Annotated[list[str], Field(min_length=2)]
    """``harmful`` or ``benign`` for the pinned sets, a text file with an instruction a line, or instructions."""
    fit_prompts: Count
    validation: Annotated[int, Field(ge=2)]
    """Instructions after those, on which vectors are measured and read."""
    source: Layer | None
    """Null, as `target`, to scan slices and take the most promising."""
    target: Layer | None
    method: Literal["exponential", "quadratic", "linear"]
    num_factors: Annotated[int, Field(ge=2)]
    iterations: Count
    nonlinearity: Positive
    rank_by: Literal["fluent", "divergence", "change", "alpha", "score"]
    words: tuple[str, str] | None
    """A positive and a negative one-token word to score by; null if you do not know what you look for."""
    shown: Annotated[int, Field(ge=2)]
    """Vectors whose completions are read: the highest ranked of each cluster."""
    strengths: Annotated[list[Positive], Field(min_length=1)]
    """Multiples of R; fluency is judged at the first."""
    answer_tokens: Count
    shown_characters: Count
    seed: Seed

    @model_validator(mode="after")
    def _complete(self) -> "Discover":
        if (self.source is None) != (self.target is None):
            raise ValueError("give both source and target, or neither")
        if self.source is not None and self.target is not None and self.source >= self.target:
            raise ValueError(f"source={self.source} must lie below target={self.target}")
        if self.rank_by == "score" and self.words is None:
            raise ValueError("rank_by='score' needs two words")
        return self


class SyntheticRecovery(Section):
    """notebooks/synthetic_recovery.ipynb: does the exponential fit find factors that we planted?"""

    d: Count
    planted: Count
    num_factors: Count
    nonlinearity: Positive
    projected_iterations: Annotated[list[Count], Field(min_length=1)]
    random_iterations: Annotated[list[Count], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
