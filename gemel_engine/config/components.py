"""Settings of the components of a job, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from gemel_engine.config.addresses import HTTP, canonical_address, local_path
from gemel_engine.config.bounds import (
    Count,
    CountOrZero,
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
    """Which image addresses may be read, and within which limits.

    Attributes:
        allowed_prefixes: Allowed prefixes of image addresses: absolute local directories,
            s3://bucket/prefix, https://host/path or http://host/path. A prefix matches whole path
            segments only. A relative address begins at the first. A host in a private network must
            be given as an IP address or as localhost; a host name that resolves to such an address
            is rejected.
        max_bytes: Maximum size of an image file in bytes.
        timeout_seconds: Maximum duration of one attempt over HTTP in seconds, including redirects.
            The name lookup has the timeout of the operating system instead.
        max_retries: Maximum number of further attempts after a timeout, a broken connection, or the
            HTTP statuses 429 and 5xx.
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
                raise ConfigurationError(
                    f"allowed_prefixes: cannot use {shown(prefix)}: {error}{_absolute_hint(prefix)}"
                ) from error


def _absolute_hint(prefix: str) -> str:
    """Return the absolute path of a directory that was given as a relative one, for a message."""
    path = Path(prefix)
    return f"; give {str(path.absolute())!r}" if prefix and not path.is_absolute() and path.is_dir() else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeBaseSettings:
    """How a knowledge base is built.

    Attributes:
        max_name_tokens: Maximum number of tokens of a name, without the terminator; a longer name
            is unusable.
        on_bad_name: What to do with an unusable name: `error` rejects the whole table, `skip`
            leaves its entity out.
    """

    max_name_tokens: int = 32
    on_bad_name: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.max_name_tokens < 1:
            raise ConfigurationError(f"max_name_tokens is {self.max_name_tokens}; give at least 1")


Terminator = Literal["newline", "eos"]

GEMEL_TEMPLATE = "[Text]{text}\n[Question]What does {mention} mentioned in the text refer to?\n[Answer]"


CardText = Literal["description", "name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """Layout of the prompts.

    Attributes:
        template: Layout of a question with the fields `{text}` and `{mention}`; the entity name
            follows directly.
        terminator: Token that ends a generated name: `newline`, the first token of the newline that
            ends each demonstration, or `eos`, the end-of-text token. Demonstrations end with a
            newline in both cases.
        max_prompt_tokens: Maximum number of tokens of a prompt, including its visual prefixes.
        query_reserve: Number of tokens reserved for the question. Demonstrations get the others:
            which ones fit depends on the surface form alone, so equal surface forms share a cached
            prefix.
        begin_with_bos: Whether a prompt begins with the tokenizer's BOS token; in GEMEL it does
            not. Gemma needs it, and a job without it stops: the predictions would be useless.
        demonstration_pictures: Whether demonstrations include the visual prefixes of their
            pictures, as in GEMEL. The same holds for cards and the pictures of their entities.
        card_text: Text of a card: the `description` of its entity, or its name if it has none; or
            always its `name`.
    """

    template: str = GEMEL_TEMPLATE
    terminator: Terminator = "newline"
    max_prompt_tokens: Count = 2048
    query_reserve: Count = 512
    begin_with_bos: bool = False
    demonstration_pictures: bool = True
    card_text: CardText = "description"


Objective = Literal["sum", "mean"]
Ranking = Literal["objective", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """Objective, ranking and budget of the search for names.

    A rollout is one greedy decoding from a prefix to the end of a name.

    Attributes:
        objective: Score of a name: the `sum` of the log-probs of its tokens and its terminator, or
            their `mean` (the default length penalty of Hugging Face's beam search, used by GEMEL).
        ranking: Order of the returned names. `objective`: by the objective. `mean`: to prove the
            best name, the search must follow every prefix whose bound exceeds the score of that
            name; the best name and the names that greedy decoding reaches from these prefixes come
            first, by the mean of their log-probs, and the others follow by the objective. This
            offsets the preference of a sum for short names. With the objective `mean` both orders
            are the same.
        num_candidates: Maximum number of names to return.
        num_to_certify: Number of best names to certify before the search stops; at most
            num_candidates.
        num_children: Number K of most probable allowed tokens whose log-probs are returned at each
            step of a rollout.
        width: Maximum number of rollouts of one mention in flight at once. Until that many are
            answered, the limit is the number of answered ones, at least 1.
        max_rollouts: Maximum number of rollouts of one mention. When it is reached, the best names
            found so far are returned, without a certificate for those not yet proved.
        max_tokens: Maximum number of tokens decoded for one mention, terminators included; reaching
            it has the effect of max_rollouts, after started rollouts are finished. None: no limit.
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


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _checked_address(uri: str) -> str:
    local_path(uri)
    return uri.rstrip("/") or uri  # in S3 `runs/` and `runs` would be different addresses


def _checked_name(name: str) -> str:
    if "://" in name or "\0" in name or not name:
        raise ConfigurationError(f"{shown(name)} names no model: give a local directory, or a name on the model hub")
    return name


Address = Annotated[str, AfterValidator(_checked_address)]
ModelName = Annotated[str, AfterValidator(_checked_name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """How entities are ranked.

    Attributes:
        kind: `combined`: by the language model and by the evidence for each candidate, where the
            knowledge base has an evidence index. `language_model`: by the language model alone, as
            in GEMEL.
        risk: Share of wrong answers that is accepted among the mentions that evidence decides
            alone, without the language model. 0: the language model is asked for every mention.
    """

    kind: Literal["combined", "language_model"] = "combined"
    risk: Fraction = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelSettings:
    """The frozen language model.

    Attributes:
        name: Local directory, or name on the model hub.
        dtype: Data type of the weights and of the key-value cache. `auto`: `bfloat16` on GPUs and
            on CPUs with AVX512-BF16 or AMX, `float32` on others.
    """

    name: ModelName
    dtype: Dtype = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings(LanguageModelSettings):
    """The frozen language model and the engine that runs it.

    Attributes:
        engine: Engine that decodes: `vllm`, or `transformers`, a slow reference.
        block_size: Number of tokens of a cache block; a follow-up rollout recomputes less than one
            block. None: 32 on a CPU, the minimum of its kernels, and vLLM's default on a GPU.
        kv_cache_gib: Size of the key-value cache on a CPU in GiB. On a GPU the cache takes what the
            model leaves of gpu_memory_utilization.
        gpu_memory_utilization: Maximum share of a GPU's memory that vLLM uses.
        tensor_parallel_size: Number of GPUs of one node that the model is split over, with one
            process for each.
        max_num_seqs: Maximum number of rollouts in one batch.
        max_num_batched_tokens: Maximum number of tokens in one engine step; None: vLLM's default.
        quantization: Name of a quantization method of vLLM; None: no method is passed to vLLM.
        enable_prefix_caching: Whether the keys and values of prompts are cached for other prompts
            with the same beginning.
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
    """Which demonstrations and entities precede a question.

    A card is an entity of the knowledge base in the form of a demonstration; see `prompt.card_text`.

    Attributes:
        num_demonstrations: Number K of demonstrations of a question; GEMEL uses 16.
        num_similar_pictures: Number of further demonstrations for a mention with a picture: those
            of the most similar surface form whose pictures are most similar to the mention's. They
            come last, nearest to the question, even if they are among the K. The first K depend on
            the surface form only, so the engine's cache can reuse them.
        policy: How the K are chosen: `similar` takes those with the most similar surface forms,
            `random` draws them, seeded by the surface form, as a baseline.
        exclude_group: Whether to exclude a mention's own group from its demonstrations; a mention
            without a group is its own group. Use it to link the corpus of the demonstrations.
        mention_encoder: Sentence encoder of surface forms: local directory, or name on the model
            hub.
        num_candidates: Maximum number of candidate entities that the evidence index of the
            knowledge base proposes for a mention; 0: none, and no cards.
        num_cards: Number of candidates that precede a question as cards, those that its surface
            form alone proposes. Mentions of a surface form share them in the engine's cache.
        num_own_cards: Number of further cards: the best candidates by text and picture too. They
            come last, nearest to the question, even if they are among the others.
        seed: Seed of the policy `random`.
    """

    num_demonstrations: CountOrZero = 4
    num_similar_pictures: CountOrZero = 0
    policy: Literal["similar", "random"] = "similar"
    exclude_group: bool = False
    mention_encoder: ModelName | None = None
    num_candidates: CountOrZero = 32
    num_cards: CountOrZero = 3
    num_own_cards: CountOrZero = 1
    seed: Seed = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSettings:
    """Image encoder and feature mapper, which turn pictures into visual prefixes.

    Attributes:
        image_encoder: open_clip architecture, or local directory in open_clip's layout. None:
            picture files are ignored, and only the column image_features of the mentions is used.
        pretrained: Name of open_clip's pretrained weights, if image_encoder is an architecture.
        feature_mapper: Directory of the feature mapper, which maps image features to embeddings of
            the language model. None: pictures are evidence alone, and the prompt shows none.
        batch_size: Number of pictures encoded at once.
        max_image_pixels: Maximum number of pixels of a decoded picture; a larger one is rejected.
        device: torch device of the image encoder.
    """

    image_encoder: ModelName | None = None
    pretrained: str | None = None
    feature_mapper: Address | None = None
    batch_size: Count = 32
    max_image_pixels: NumPixels = 50_000_000
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns that mentions must have: a mapper without an image encoder needs features."""
        return ("image_features",) if self.image_encoder is None and self.feature_mapper is not None else ()
