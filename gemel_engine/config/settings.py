"""Every setting of every job, as frozen dataclasses that pydantic checks as a whole before any work."""

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
from gemel_engine.config.components import (
    Address,
    EngineSettings,
    FeatureScaling,
    ImagePolicy,
    LanguageModelSettings,
    PromptSettings,
    ResourceSettings,
    RetrievalSettings,
    SearchSettings,
    VisionSettings,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """What every job over a corpus of mentions is told.

    Attributes:
        output: Directory for what the job makes, local or `s3://`.
        knowledge_base: Directory made by `gemel build-kb`.
        demonstrations: Directory made by `gemel build-demonstrations`; None: no demonstrations.
        language_model: The frozen language model.
        retrieval: Which demonstrations precede a question.
        vision: How pictures become visual prefixes.
        image_source: Which image addresses may be read.
        prompt: How prompts are laid out.
        search: How far decoding searches.
        resources: The stages' actor pools.
        rows_per_shard: Rows that are worked on at a time.
        max_failed_fraction: The job fails when more rows than this end in an `error`; in training, an entity that the
            knowledge base lacks does not count.
        verify_artifacts: Check the artifacts' checksums, and that the language model's weights are finite, before
            starting.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # also for the settings within

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
    rows_per_shard: Count = 1024
    max_failed_fraction: Fraction = 0.01
    verify_artifacts: bool = True

    def __post_init__(self) -> None:
        if self.demonstrations is not None and self.retrieval.mention_encoder is None:
            raise ValueError(
                "demonstrations need retrieval.mention_encoder, the encoder that their index was built with"
            )
        device, share = self.vision.device, self.resources.images.num_gpus
        if self.vision.image_encoder is not None and device.startswith("cuda") != (share > 0):
            raise ValueError(
                f"vision.device is {device!r} and resources.images.num_gpus {share:g}: an image encoder on a GPU "
                "needs a share of one, such as 0.25, and one on a CPU needs none"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig(JobConfig):
    """One run of the linking job; a shard of `rows_per_shard` rows is one output file, which a rerun skips or repeats.

    Attributes:
        input: Parquet file or directory of mentions, local or `s3://`.
        language_model: The frozen language model and its engine.
        calibration: Directory made by `gemel calibrate`, for `confidence` and `is_nil`; None: without them.
        previous: Output of a finished run that this one repeats with a changed knowledge base: only what the change can
            touch is linked again; None: everything is linked.
        dry_run: Check everything, say how many rows are to be linked, and do nothing.
    """

    input: Address
    language_model: EngineSettings
    calibration: Address | None = None
    previous: Address | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)  # super() does not know a class with slots
        if self.vision.image_encoder is not None and self.vision.feature_mapper is None:
            raise ValueError("vision.image_encoder needs vision.feature_mapper: set both, or neither")
        if self.previous is not None and (self.search.ranking, self.search.objective) == ("mean", "sum"):
            raise ValueError(
                "search.ranking is 'mean': whether added names change such a ranking shows only when everything is "
                'linked again; leave out `previous`, or set search.ranking = "objective" in both runs'
            )
        self._check_gpus(self.language_model, self.resources.generation.num_gpus)

    @staticmethod
    def _check_gpus(engine: EngineSettings, num_gpus: float) -> None:
        """See that an engine finds its GPUs and their memory in what its actor claims; 0 is an engine on CPUs."""
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
        activation_checkpointing: Compute each layer again in the backward pass instead of keeping its activations:
            less memory, a third more work.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # float16 would need its gradients scaled
    activation_checkpointing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MapperSettings:
    """The feature mapper before its first step; not used where `vision.feature_mapper` names one to start from.

    Attributes:
        prefix_length: P, embeddings that stand for one picture.
        initialisation: `random` as in GEMEL, or `ridge`: the closed form from a picture's features to the token
            embeddings of its entity's name.
        scaling: What is done to image features first; see `MapperMetadata`.
        ridge_penalty: Of the closed form, in units of the mean variance of a feature.
        ridge_gain: Of the closed form: factor on what deviates from the mean embedding.
        saved_dtype: Of the mapper that the run ends with, wherever it started; checkpoints and steps are in float32.
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
        epochs: Passes over the training mentions; 0 leaves the mapper as it was initialised.
        learning_rate: Highest rate, after the warm-up.
        warmup_fraction: Share of all steps in which the rate rises from 0; it falls to 0 in the others.
        weight_decay: Decoupled, of weights but not of biases.
        adam_epsilon: Keeps small second moments from making large steps.
        max_gradient_norm: A longer gradient is shortened to it.
        batch_size: Mentions of one step, over all workers.
        mentions_per_form: At most so many mentions of one surface form stand together in a batch. Demonstrations that
            they share are computed once for all of them; GEMEL has 1.
        max_pack_tokens: Tokens of one forward and backward pass; a batch takes as many passes as it needs.
        max_steps: Stop after so many steps, as if the schedule ended there; None for all epochs.
        seed: Of the mapper's start and of the order of the mentions.
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
    """Constrained decoding of mentions of the dev split during training.

    Attributes:
        num_mentions: Size of the sample, drawn with the training's seed; 0 validates nothing.
        every_steps: Between two validations; None: at the end of each epoch. The last step always validates.
    """

    num_mentions: CountOrZero = 200
    every_steps: NumSteps | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Data-parallel training workers.

    Attributes:
        num_workers: At most so many.
        min_workers: Training goes on with so many while the cluster has no room for more; None: `num_workers`.
        num_cpus: Logical CPUs of a worker.
        use_gpu: Give each worker a GPU.
        num_threads: Threads of a worker on CPU; None leaves it to Ray.
        max_failures: Workers that may die before the run fails; -1 for any number.
        report_every: Steps between two reports of the loss.
        checkpoint_every: Steps between two checkpoints; a validation always makes one.
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
    """One run of the training job; `prompt` is to be the same in linking, and a mention's group never demonstrates it.

    Attributes:
        train: Parquet file or directory of mentions with `entity_id`, local or `s3://`.
        dev: The same, to validate on; None to do without.
        language_model: The frozen language model.
        vision: The image encoder, None for features that the mentions bring; a `feature_mapper` here is where
            training starts.
        mapper: The feature mapper before its first step.
        optimisation: Optimiser and schedule.
        validation: Decoding of dev mentions during training.
        workers: Training workers.
        examples: Directory for the prepared training examples, which runs with the same encoders and retrieval may
            share; None: in the output.
    """

    train: Address
    dev: Address | None = None
    language_model: TrainedModelSettings
    mapper: MapperSettings = field(default_factory=MapperSettings)
    optimisation: OptimisationSettings = field(default_factory=OptimisationSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    workers: WorkerSettings = field(default_factory=WorkerSettings)
    examples: Address | None = None
