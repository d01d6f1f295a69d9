"""Settings of the parts that jobs are made of, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from gemel_engine.config.addresses import HTTP, canonical_address, local_path
from gemel_engine.config.bounds import (
    Amount,
    Count,
    CountOrZero,
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
