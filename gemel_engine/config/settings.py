"""Every setting of every job, as frozen dataclasses that pydantic checks as a whole before any work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from gemel_engine.config.addresses import HTTP, canonical_address, local_path
from gemel_engine.config.bounds import (
    Amount,
    Count,
    CountOrZero,
    Factor,
    Fraction,
    NumBytes,
    NumPixels,
    NumRetries,
    NumSteps,
    PositiveFraction,
    Seconds,
    Seed,
)
from gemel_engine.errors import ConfigurationError, shown


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """Which images may be read, and at what cost.

    Attributes:
        allowed_prefixes: Absolute local directories, `s3://bucket/prefix`, `https://host/path` or `http://host/path`. A
            prefix ends where a path segment ends. A host in a private network must be given here as an IP address or as
            `localhost`; a name that leads there is refused.
        max_bytes: Largest image file.
        timeout_seconds: Time for one attempt over HTTP, redirects included, however slowly the server sends; only the
            lookup of a name is the system's own.
        max_retries: Further attempts after a timeout, a broken connection, or the HTTP statuses 429 and 5xx.
    """

    allowed_prefixes: tuple[str, ...] = ()
    max_bytes: NumBytes = 20_000_000
    timeout_seconds: Seconds = 10.0
    max_retries: NumRetries = 2

    def __post_init__(self) -> None:
        for prefix in self.allowed_prefixes:
            try:
                canonical_address(prefix)
                if prefix.startswith(HTTP) and {"?", "#"} & set(prefix):
                    raise ValueError("it has a query, and a prefix is compared with addresses up to theirs")
            except ValueError as error:
                raise ConfigurationError(f"allowed_prefixes: cannot use {shown(prefix)}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeBaseSettings:
    """How a knowledge base is built.

    Attributes:
        max_name_tokens: Longer names are unusable; the terminator is not counted.
        on_bad_name: What to do with unusable names: refuse the table, or leave their entities out.
    """

    max_name_tokens: int = 32
    on_bad_name: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.max_name_tokens < 1:
            raise ConfigurationError(f"max_name_tokens is {self.max_name_tokens}; give at least 1")


Terminator = Literal["newline", "eos"]

GEMEL_TEMPLATE = "[Text]{text}\n[Question]What does {mention} mentioned in the text refer to?\n[Answer]"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """How prompts are laid out.

    Attributes:
        template: Question layout with the fields `{text}` and `{mention}`; the name follows it directly.
        terminator: What ends a generated name: the first token of the newline with which demonstrations
            end, or the end-of-text token. Demonstrations end with a newline in either case.
        max_prompt_tokens: Upper limit of T.
        query_reserve: Tokens kept free for the question. Demonstrations get the rest, so that which ones fit depends on
            the surface form alone and equal surface forms share their prefix.
        begin_with_bos: Put the tokenizer's BOS token first (GEMEL puts none).
        demonstration_pictures: Give demonstrations the visual prefixes of their own pictures, as GEMEL does.
    """

    template: str = GEMEL_TEMPLATE
    terminator: Terminator = "newline"
    max_prompt_tokens: Count = 2048
    query_reserve: Count = 512
    begin_with_bos: bool = False
    demonstration_pictures: bool = True


Objective = Literal["sum", "mean"]
Ranking = Literal["objective", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How far to search.

    Attributes:
        objective: `sum` of the log-probs of a name's tokens and its terminator, or their `mean` (the default length
            penalty of Hugging Face's beam search, which GEMEL uses).
        ranking: `mean`: first come, by the mean of their log-probs, the names that no proof of the best by the
            objective can do without: each ends, greedily, a prefix whose bound is above the score of that best name. A
            sum prefers short names; beam search ranks like this. `objective`: the best by the objective comes first.
            For the objective `mean` it is the same.
        num_candidates: Names to return.
        num_to_certify: Stop once this many of the best names are proved. At most `num_candidates`.
        num_children: K, the log-probs asked for at each step of a rollout.
        width: Rollouts of one mention that may be in flight at once; no more than were answered before.
        max_rollouts: Budget; when it is spent the best name found so far is returned, uncertified.
        max_tokens: The same in tokens that a mention's rollouts have decoded, terminators included; a rollout that has
            begun is finished. None: no such limit.
    """

    objective: Objective = "sum"
    ranking: Ranking = "mean"
    num_candidates: Count = 5
    num_to_certify: Count = 1
    num_children: Count = 10
    width: Count = 4
    max_rollouts: Count = 64
    max_tokens: NumSteps | None = None

    def __post_init__(self) -> None:
        if self.num_to_certify > self.num_candidates:
            raise ValueError(
                f"num_to_certify is {self.num_to_certify}: it must not be above num_candidates {self.num_candidates}"
            )


FeatureScaling = Literal["none", "z_score", "z_score_norm"]


Dtype = Literal["float32", "bfloat16", "float16"]


def _checked_address(uri: str) -> str:
    local_path(uri)
    return uri.rstrip("/") or uri  # in S3 `runs/` and `runs` would be two places


def _checked_name(name: str) -> str:
    if "://" in name or "\0" in name or not name:
        raise ConfigurationError(f"{shown(name)} names no model: give a local directory, or a name on the model hub")
    return name


Address = Annotated[str, AfterValidator(_checked_address)]
ModelName = Annotated[str, AfterValidator(_checked_name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelSettings:
    """The frozen language model.

    Attributes:
        name: Local directory, or name on the model hub.
        dtype: Of the weights, and of the cache of keys and values.
    """

    name: ModelName
    dtype: Dtype = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings(LanguageModelSettings):
    """The frozen language model and the engine that runs it.

    Attributes:
        engine: `vllm`, or `transformers`: the slow reference.
        block_size: Tokens of a cache block; a follow-up rollout recomputes less than one block. None: 32 on CPU, the
            smallest that its kernels take, and vLLM's default elsewhere.
        kv_cache_gib: Size of the cache on CPU. On a GPU the cache takes what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: Share of a GPU's memory that vLLM may take.
        tensor_parallel_size: GPUs of one node over which the model is split, each with a process of its own.
        max_num_seqs: Rollouts in one batch.
        max_num_batched_tokens: Tokens in one engine step; None leaves it to vLLM.
        quantization: A method that vLLM knows, or None.
        enable_prefix_caching: Keep the keys and values of prompts that other prompts may begin with.
    """

    engine: Literal["vllm", "transformers"] = "vllm"
    block_size: Count | None = None
    kv_cache_gib: Count = 2
    gpu_memory_utilization: PositiveFraction = 0.9
    tensor_parallel_size: Count = 1
    max_num_seqs: Count = 64
    max_num_batched_tokens: Count | None = None
    quantization: str | None = None
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSettings:
    """Which demonstrations precede a question.

    Attributes:
        num_demonstrations: K; GEMEL uses 16.
        num_similar_pictures: For a mention with a picture, so many demonstrations stand behind the K, where they weigh
            most, even if they are among the K: those of the most similar surface form whose pictures are most like its
            own. The K before them stay the same for all mentions of a surface form, and so in the engine's cache.
        policy: `similar` takes those whose surface form is most similar, `random` draws them, seeded by the surface
            form: a baseline.
        exclude_group: Leave a mention's own group, which may be it alone, out of its demonstrations; for linking the
            demonstrations' own corpus.
        mention_encoder: Sentence encoder of surface forms; local directory, or name on the model hub.
        seed: Of the policy `random`.
    """

    num_demonstrations: CountOrZero = 8
    num_similar_pictures: CountOrZero = 0
    policy: Literal["similar", "random"] = "similar"
    exclude_group: bool = False
    mention_encoder: ModelName | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.num_similar_pictures and (self.policy == "random" or not self.num_demonstrations):
            raise ValueError(
                f"num_similar_pictures is {self.num_similar_pictures}: it needs the policy similar and at least one of "
                "num_demonstrations; set it to 0, or change these"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSettings:
    """How pictures become visual prefixes.

    Attributes:
        image_encoder: An open_clip architecture, or a local directory in open_clip's layout; None ignores pictures,
            and takes only image features that the mentions bring.
        pretrained: open_clip's tag of the weights, for an architecture by name.
        feature_mapper: Directory of the feature mapper between the two models.
        batch_size: Pictures encoded at once.
        max_image_pixels: A picture that decodes to more is refused.
        device: torch device of the image encoder.
    """

    image_encoder: ModelName | None = None
    pretrained: str | None = None
    feature_mapper: Address | None = None
    batch_size: Count = 32
    max_image_pixels: NumPixels = 50_000_000
    device: str = "cpu"

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns that mentions must have: without an image encoder, a feature mapper takes the features they bring."""
        return ("image_features",) if self.image_encoder is None and self.feature_mapper is not None else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """A stage's actors and what each of them claims from the cluster.

    Attributes:
        min_actors: Started at once.
        max_actors: Upper limit as the stage falls behind.
        num_cpus: Logical CPUs of one actor.
        num_gpus: GPUs of one actor, a whole number; or a fraction, for actors that share one.
        memory_gib: Memory that Ray sets aside for one actor; 0 asks for none. `gemel plan` and `report.json` tell how
            much one held.
        num_threads: Threads of one actor's models on CPU; None leaves it to Ray, which gives one below two CPUs.
    """

    min_actors: Count = 1
    max_actors: Count = 1
    num_cpus: Amount = 0.5
    num_gpus: Amount = 0.0
    memory_gib: Amount = 0.0
    num_threads: Count | None = None

    def __post_init__(self) -> None:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors is {self.min_actors}: it must not be above max_actors {self.max_actors}")
        if self.num_gpus > 1 and not float(self.num_gpus).is_integer():
            raise ValueError(f"num_gpus is {self.num_gpus}: give an actor a share of one GPU, or whole ones")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSettings:
    """The stages' actor pools."""

    images: PoolSettings = PoolSettings()
    retrieval: PoolSettings = PoolSettings(num_cpus=0.25)
    generation: PoolSettings = PoolSettings()


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
