"""The settings of all jobs, as frozen dataclasses that pydantic validates before any work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from gemel_engine.config.bounds import (
    Count,
    CountOrZero,
    Factor,
    Fraction,
    NumSteps,
    PositiveFraction,
    Seed,
)
from gemel_engine.config.columns import ColumnNames
from gemel_engine.config.components import (
    Address,
    EngineSettings,
    FeatureScaling,
    ImagePolicy,
    LanguageModelSettings,
    PromptSettings,
    RetrievalSettings,
    ScoreSettings,
    SearchSettings,
    VisionSettings,
)
from gemel_engine.config.finding import FinderSettings
from gemel_engine.config.resources import ResourceSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Settings shared by all jobs over a corpus of mentions.

    Attributes:
        output: Output directory of the job, local or s3://bucket/prefix.
        knowledge_base: Directory written by `gemel build-kb` or `gemel update-kb`, local or
            s3://bucket/prefix.
        demonstrations: Directory written by `gemel build-demonstrations`, local or
            s3://bucket/prefix; None: no demonstrations.
        language_model: The frozen language model.
        retrieval: Which demonstrations precede a question.
        vision: Image encoder and feature mapper, which turn pictures into visual prefixes.
        image_source: Which image addresses may be read, and within which limits.
        prompt: Layout of the prompts.
        search: Objective, ranking and budget of the search for names.
        resources: Actor pools of the stages.
        columns: Names of the columns of the input, where they differ from the engine's own.
        rows_per_shard: Maximum number of rows that are processed together, as a shard. None: by the
            number of rows, so that there are about 32 shards or more, of 64 to 1,024 rows.
        max_failed_fraction: Maximum share of rows with an `error` before the job fails. Training
            does not count rows whose entity the knowledge base lacks.
        verify_artifacts: Whether to verify, before any work, the checksums of the artifacts and
            that the weights of the language model are finite.
    """

    # Also applies to the settings within.
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    output: Address
    knowledge_base: Address
    demonstrations: Address | None = None
    language_model: LanguageModelSettings
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    vision: VisionSettings = field(default_factory=VisionSettings)
    image_source: ImagePolicy = field(default_factory=ImagePolicy)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)
    columns: ColumnNames = field(default_factory=ColumnNames)
    rows_per_shard: Count | None = None
    max_failed_fraction: Fraction = 0.01
    verify_artifacts: bool = True

    def __post_init__(self) -> None:
        if self.demonstrations is not None and self.retrieval.mention_encoder is None:
            raise ValueError(
                "demonstrations need retrieval.mention_encoder, the encoder that their index was built with"
            )
        device, share = self.vision.device, self.resources.images.num_gpus
        if self.vision.image_encoder is not None and (device == "cuda") != (share > 0):
            raise ValueError(
                f"vision.device is {device!r} and resources.images.num_gpus {share:g}: an image encoder on a GPU "
                "needs a share of one, such as 0.25, and one on a CPU needs none"
            )


CarriedColumn = Literal["text", "mention", "mention_start", "group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig(JobConfig):
    """Settings of a linking run.

    Each shard of `rows_per_shard` rows becomes one output file; a rerun links only the shards whose
    files are missing.

    Attributes:
        input: Mentions in Parquet, CSV, TSV or JSON Lines, a file or a directory, local or
            s3://bucket/prefix; with `find_mentions`, documents.
        find_mentions: Whether to find the mentions of the documents in `input` first, as `gemel
            find-mentions` does.
        finder: How mentions are found.
        language_model: The frozen language model and its engine.
        score: How entities are ranked.
        calibration: Directory written by `gemel calibrate`: weights of the score, and models of the
            columns `confidence`, `nil_probability` and `is_nil`. None: the weights that ship with
            the package, which were fitted on other corpora; `confidence` is not calibrated.
        output_columns: Columns of the input that the output has, too, beside `mention_id`. `gemel
            export` joins the others.
        previous: Output of a finished run over the same input with an older knowledge base or
            another calibration: only rows that the change can affect are linked again. None: all
            rows are linked.
        dry_run: Whether to only validate everything and report the number of rows to link.
    """

    input: Address
    find_mentions: bool = False
    finder: FinderSettings = field(default_factory=FinderSettings)
    language_model: EngineSettings
    score: ScoreSettings = field(default_factory=ScoreSettings)
    calibration: Address | None = None
    output_columns: tuple[CarriedColumn, ...] = ("text", "mention")
    previous: Address | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)  # super() fails in a dataclass with slots
        if len({*self.output_columns}) < len(self.output_columns):
            raise ValueError(f"output_columns is {list(self.output_columns)}: name each column once")
        if self.score.kind == "language_model" and self.score.risk:
            raise ValueError('score.risk needs score.kind = "combined": set it, or leave the risk out')
        ranks_by_mean = (self.search.ranking, self.search.objective) == ("mean", "sum")
        if self.previous is not None and ranks_by_mean and self.score.kind == "language_model":
            raise ValueError(
                "search.ranking is 'mean': whether added names change such a ranking shows only when everything is "
                'linked again; leave out `previous`, or set search.ranking = "objective" in both runs'
            )
        if self.previous is not None and self.find_mentions:
            raise ValueError(
                "find_mentions is set, but `previous` needs the mentions of that run: give these as `input`, and leave "
                "out find_mentions"
            )
        self._check_gpus(self.language_model, self.resources.generation.num_gpus)

    @staticmethod
    def _check_gpus(engine: EngineSettings, num_gpus: float) -> None:
        """Raise if the engine needs other GPUs, or more of a GPU, than its actor reserves.

        With `num_gpus` 0 the engine runs on CPUs.
        """
        if num_gpus and engine.engine == "transformers":
            raise ValueError(f"resources.generation.num_gpus is {num_gpus:g}, but the engine transformers uses no GPU")
        if num_gpus and max(1, num_gpus) != engine.tensor_parallel_size:
            raise ValueError(
                f"resources.generation.num_gpus is {num_gpus:g} and language_model.tensor_parallel_size "
                f"{engine.tensor_parallel_size}: an actor needs as many GPUs as its model is split over"
            )
        if 0 < num_gpus < engine.gpu_memory_utilization and num_gpus < 1:
            raise ValueError(
                f"language_model.gpu_memory_utilization is {engine.gpu_memory_utilization} and resources.generation."
                f"num_gpus {num_gpus:g}: an engine that shares a GPU may take no more of its memory than its share"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModelSettings(LanguageModelSettings):
    """The frozen language model that the feature mapper is trained through.

    Attributes:
        activation_checkpointing: Whether to recompute each layer in the backward pass instead of
            storing its activations: less memory, a third more computation.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # float16 would need gradient scaling
    activation_checkpointing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MapperSettings:
    """Initial feature mapper. All but `saved_dtype` is ignored if `vision.feature_mapper` is set.

    Attributes:
        prefix_length: Number P of embeddings that represent one picture in the prompt.
        initialisation: Initial weights: `random` as in GEMEL, or `ridge`, the ridge regression from
            image features to the token embeddings of entity names.
        scaling: Scaling of image features: `none`; `z_score`, to mean 0 and deviation 1 over the
            training pictures; `z_score_norm`, the same and then to norm √C for each picture, where
            C is the number of features.
        ridge_penalty: Penalty of the ridge regression, in units of the mean variance of a feature.
        ridge_gain: Factor by which the ridge regression multiplies deviations from the mean
            embedding.
        saved_dtype: Data type of the final mapper. Checkpoints and training steps use float32.
    """

    prefix_length: Count = 4
    initialisation: Literal["random", "ridge"] = "random"
    scaling: FeatureScaling = "none"
    ridge_penalty: Factor = 1.0
    ridge_gain: Factor = 1.0
    saved_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimisationSettings:
    """AdamW with a linear schedule, with GEMEL's values.

    Attributes:
        epochs: Number of passes over the training mentions; 0 keeps the initial mapper.
        learning_rate: Highest learning rate, reached after the warm-up.
        warmup_fraction: Share of all steps in which the rate rises from 0; then it falls to 0.
        weight_decay: Decoupled weight decay of weights; biases have none.
        adam_epsilon: Epsilon of AdamW, added to the denominator of each update.
        max_gradient_norm: Maximum norm of a gradient; a longer one is clipped to it.
        batch_size: Number of mentions of one step, over all workers.
        mentions_per_form: Maximum number of consecutive mentions of one surface form in the order
            of training. Demonstrations that they share in a batch are computed once; GEMEL uses 1.
        max_pack_tokens: Maximum number of tokens of one forward and backward pass; a batch takes as
            many passes as necessary.
        max_steps: Maximum number of steps, at which the schedule ends, too; None: all epochs.
        seed: Seed of the initial mapper and of the order of the mentions.
    """

    epochs: CountOrZero = 5
    learning_rate: PositiveFraction = 1e-6
    warmup_fraction: Fraction = 0.1
    weight_decay: Fraction = 0.01
    adam_epsilon: PositiveFraction = 1e-6
    max_gradient_norm: Factor = 1.0
    batch_size: Count = 16
    mentions_per_form: Count = 8
    max_pack_tokens: Count = 4096
    max_steps: NumSteps | None = None
    seed: Seed = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSettings:
    """Validation by constrained decoding of mentions of the dev split during training.

    Attributes:
        num_mentions: Number of mentions to decode, drawn with the seed of the training; 0 disables
            validation.
        every_steps: Number of steps between two validations; None: at the end of each epoch. The
            last step is always validated.
    """

    num_mentions: CountOrZero = 200
    every_steps: NumSteps | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Data-parallel training workers.

    Attributes:
        num_workers: Maximum number of workers.
        min_workers: Minimum number of workers with which training runs while the cluster has no
            room for more; None: num_workers.
        num_cpus: Number of logical CPUs of a worker.
        use_gpu: Whether each worker gets a GPU.
        num_threads: Number of CPU threads of a worker; None: Ray's default.
        max_failures: Maximum number of worker failures before the run fails; -1: no maximum.
        report_every: Number of steps between two reports of the loss.
        checkpoint_every: Number of steps between two checkpoints; each validation also writes one.
    """

    num_workers: Count = 1
    min_workers: Count | None = None
    num_cpus: Factor = 1.0
    use_gpu: bool = False
    num_threads: Count | None = None
    max_failures: Annotated[int, Field(strict=True, ge=-1, le=1_000_000)] = 3
    report_every: NumSteps = 10
    checkpoint_every: NumSteps = 100

    def __post_init__(self) -> None:
        if (self.min_workers or 1) > self.num_workers:
            raise ValueError(f"min_workers is {self.min_workers}: it must not be above num_workers {self.num_workers}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(JobConfig):
    """Settings of a training run.

    Link with the same `prompt` settings. A mention's own group is always excluded from its
    demonstrations.

    Attributes:
        train: Mentions with `entity_id` in Parquet, CSV, TSV or JSON Lines, a file or a directory,
            local or s3://bucket/prefix.
        dev: Mentions to validate on, like `train`; None: no validation.
        language_model: The frozen language model.
        vision: Image encoder (None: mentions must have image features), and the feature mapper to
            start from, if any.
        mapper: Initial feature mapper.
        optimisation: Optimiser and schedule.
        validation: Validation by decoding of dev mentions during training.
        workers: Data-parallel training workers.
        examples: Directory for the prepared training examples, which several runs can share, those
            of the same image encoder their image features; None: a directory in the output.
    """

    train: Address
    dev: Address | None = None
    language_model: TrainedModelSettings
    mapper: MapperSettings = field(default_factory=MapperSettings)
    optimisation: OptimisationSettings = field(default_factory=OptimisationSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    workers: WorkerSettings = field(default_factory=WorkerSettings)
    examples: Address | None = None
