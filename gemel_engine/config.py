"""Every setting of a job: a TOML file, then command-line overrides, checked as a whole before any work.

A misspelt key fails by its full name. Settings that belong to one component stand beside it and are gathered here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from gemel_engine import storage
from gemel_engine.bounds import (
    Amount,
    Count,
    CountOrZero,
    Factor,
    Fraction,
    NumPixels,
    NumSteps,
    PositiveFraction,
    Seed,
)
from gemel_engine.errors import ConfigurationError, shown
from gemel_engine.image_source import ImagePolicy
from gemel_engine.prompt import PromptSettings
from gemel_engine.search import SearchSettings
from gemel_engine.types import FeatureScaling

Dtype = Literal["float32", "bfloat16", "float16"]
Config = TypeVar("Config")


def _checked_address(uri: str) -> str:
    storage.local_path(uri)
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
        calibration: Directory made by `jobs/calibrate.py`, for `confidence` and `is_nil`; None: without them.
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


def load_config(
    config_type: type[Config], path: Path, overrides: Sequence[str] = (), *, program: str | None = None
) -> Config:
    """Read a TOML file and apply overrides such as `--search.objective mean`.

    An override that is unknown or malformed ends the process with code 2 and its reason, as command lines do, and so
    does `--help` with code 0.

    Args:
        config_type: The configuration.
        path: The file.
        overrides: Arguments of a command line.
        program: What stands before them, for the texts that name it; None: the name of the process.

    Raises:
        ConfigurationError: The file can't be read, a key is unknown, or a value is malformed or out of its bounds.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise ConfigurationError(f"the configuration {path} can't be read: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"the configuration {path} is not TOML: {error}") from error
    except RecursionError:
        raise ConfigurationError(f"the configuration {path} is nested too deeply: settings have three levels") from None
    try:
        config = TypeAdapter(config_type).validate_python(values)
    except ValidationError as error:
        raise ConfigurationError(f"the configuration {path} is wrong: {_describe(error, config_type)}") from None
    return validated(tyro.cli(config_type, prog=program, default=config, args=list(overrides))) if overrides else config


def validated(config: Config) -> Config:
    """Check a configuration that was made in Python, or changed: its parts are not checked when they are made.

    Raises:
        ConfigurationError: A value is malformed or out of its bounds.
    """
    adapter = TypeAdapter(type(config))
    try:
        return adapter.validate_python(adapter.dump_python(config, warnings=False))
    except ValidationError as error:
        raise ConfigurationError(f"the configuration is wrong: {_describe(error, type(config))}") from None


def config_json(config: object) -> str:
    """The resolved settings as canonical JSON: what is saved with an output."""
    return json.dumps(TypeAdapter(type(config)).dump_python(config, mode="json"), indent=2, sort_keys=True)


def _describe(error: ValidationError, config_type: type[Any]) -> str:
    """All faults, each by the full name of its key."""
    faults = []
    for fault in error.errors(include_url=False):
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "unexpected_keyword_argument":
            known = _field_names(config_type, fault["loc"][:-1])
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
            faults.append(f"unknown key {key!r}; {hint}")
        elif fault["type"] == "missing":  # what was found is all of its group
            faults.append(f"{key}: {fault['msg']}")
        else:
            faults.append(f"{key}: {fault['msg']} (got {_found(fault['input'])})" if key else fault["msg"])
    return "; ".join(faults)


def _found(value: object) -> str:
    """Describe a wrong value in a few words, without what may be secret."""
    if isinstance(value, str):
        return shown(value)
    is_short = isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
    return repr(value) if is_short else f"a value of type {type(value).__name__}"


def _field_names(config_type: type[Any], location: Sequence[int | str]) -> list[str]:
    """Names of the settings in the group that `location` leads to."""
    for name in location:
        config_type = get_type_hints(config_type)[str(name)]
    return [item.name for item in dataclasses.fields(config_type)]
