"""Prompts in the form that vLLM takes, and the keys under which it caches their blocks.

vLLM takes a prompt with visual prefixes as token ids, a mask of which positions are token ids, and
a tensor of embeddings for all positions, of which it reads those of visual prefixes alone. The
tensor is made once for all rollouts of a prompt, and its other rows stay uninitialised. A picture
is cast to the model's data type once for all prompts. Requests get the mask when their blocks are
hashed: given earlier, vLLM would go through all positions to write zeros where ours are zeros.

vLLM's own key of a block covers all rows of that tensor and leaves the mask out. Ours has the
digests of visual prefixes instead, with their positions, as vLLM's keys have them for multimodal
models: the same text with another picture, without one, or with token ids in its place shares no
block, and blocks before the first picture are shared with prompts that have none. The keys of a
prompt's blocks are computed once for all its rollouts, the digest of a picture once for all prompts.

D language-model width, P prefix length, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from vllm.inputs.engine import EmbedsInput, TokensInput, embeds_input, tokens_input
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from gemel_engine.decoding.prompt import Prompt

BlockHasher = Callable[[Request], list[BlockHash]]
KEYS = "keys"  # of a request's `extra_args`


@dataclass(frozen=True, slots=True)
class PromptKeys:
    """What the blocks of a prompt are cached under, beside its token ids, and which of these are none.

    Attributes:
        num_tokens: T.
        pictures: Position and digest of each visual prefix, in order.
        is_token: False at the positions (T,) of visual prefixes; empty without them.
        blocks: Keys of the blocks that the prompt fills, once they are known.
    """

    num_tokens: int
    pictures: list[MultiModalFeatureSpec] = field(default_factory=list)
    is_token: list[bool] = field(default_factory=list)
    blocks: list[BlockHash] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt in vLLM's form.

    Attributes:
        keys: Keys of its blocks.
        embeddings: Embeddings (T + R, D) with room for a path of R tokens; only the rows of visual
            prefixes are initialised. None without visual prefixes.
    """

    keys: PromptKeys
    embeddings: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """A visual prefix in the model's data type.

    Attributes:
        rows: Bytes of its embeddings, a row for each of the P positions.
        digest: What they are told apart by.
    """

    rows: NDArray[np.uint8]
    digest: str


class VllmPrompts:
    """Makes what vLLM takes of prompts, once for all rollouts of a prompt.

    Args:
        width: D.
        dtype: Data type of the embeddings.
        longest_path: Maximum number of tokens that follow a prompt.
    """

    def __init__(self, width: int, dtype: torch.dtype, longest_path: int) -> None:
        self._width = width
        self._longest_path = longest_path
        self._dtype = dtype
        # Pinned memory is copied to a GPU as it is; vLLM would copy other memory twice.
        self._pin_memory = torch.cuda.is_available()
        self._prepared: WeakKeyDictionary[Prompt, PreparedPrompt] = WeakKeyDictionary()
        self._pictures = WeakIdKeyDictionary()  # of visual prefixes, which prompts share

    def input(self, prompt: Prompt, path: tuple[int, ...]) -> tuple[EmbedsInput | TokensInput, dict[str, Any]]:
        """Return the prompt followed by `path`, and what the request's `extra_args` say of it."""
        token_ids = [*prompt.token_ids, *path]
        prepared = self._prepared.get(prompt)
        if prepared is None:
            prepared = self._prepared[prompt] = self._prepare(prompt)
        arguments = {KEYS: prepared.keys}
        if prepared.embeddings is None:
            return tokens_input(token_ids), arguments
        return embeds_input(prepared.embeddings[: len(token_ids)], prompt_token_ids=token_ids), arguments

    def _prepare(self, prompt: Prompt) -> PreparedPrompt:
        keys = PromptKeys(len(prompt.token_ids))
        if not prompt.visual_prefixes:
            return PreparedPrompt(keys)
        shape = (len(prompt.token_ids) + self._longest_path, self._width)
        embeddings = torch.empty(shape, dtype=self._dtype, pin_memory=self._pin_memory)
        rows = _bytes(embeddings)  # NumPy copies few rows in a third of torch's time
        keys.is_token.extend([True] * len(prompt.token_ids))
        for start, prefix in prompt.visual_prefixes:
            picture = self._picture(prefix)
            place = PlaceholderRange(offset=start, length=len(picture.rows))
            end = start + place.length
            rows[start:end] = picture.rows
            keys.is_token[start:end] = [False] * place.length
            keys.pictures.append(MultiModalFeatureSpec(None, "prompt_embeds", picture.digest, place))
        return PreparedPrompt(keys, embeddings)

    def _picture(self, prefix: Tensor) -> Picture:
        picture: Picture | None = self._pictures.get(prefix)  # type: ignore[no-untyped-call]
        if picture is None:
            rows = _bytes(prefix.to("cpu", self._dtype).contiguous())
            picture = self._pictures[prefix] = Picture(rows, hashlib.sha256(rows.data).hexdigest())
        return picture


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Return a view of the memory of a tensor of embeddings, row by row."""
    return tensor.view(torch.uint8).numpy()


def with_prompt_keys(hasher: BlockHasher | None) -> BlockHasher:
    """Return vLLM's block hasher, None without a prefix cache, with what requests of `VllmPrompts` need."""
    return partial(_block_hashes, hasher)


def _block_hashes(hasher: BlockHasher | None, request: Request) -> list[BlockHash]:
    """Complete a new request; return the hashes of a request's blocks that are full and not hashed yet."""
    parameters = request.sampling_params
    keys: PromptKeys | None = None if parameters is None else (parameters.extra_args or {}).get(KEYS)
    if keys is not None and keys.is_token and request.prompt_is_token_ids is None:
        path_length = request.num_prompt_tokens - keys.num_tokens
        request.prompt_is_token_ids = keys.is_token + [True] * path_length
    if hasher is None:
        return []
    if keys is None:
        return hasher(request)
    as_multimodal: Any = SimpleNamespace(
        block_hashes=request.block_hashes,
        num_tokens=request.num_tokens,
        all_token_ids=request.all_token_ids,
        mm_features=keys.pictures,
        prompt_embeds=None,
        lora_request=None,
        cache_salt=None,
    )
    if request.block_hashes:
        return hasher(as_multimodal)
    if not keys.blocks:
        as_multimodal.num_tokens = keys.num_tokens
        keys.blocks.extend(hasher(as_multimodal))
        as_multimodal.num_tokens = request.num_tokens
    as_multimodal.block_hashes = keys.blocks
    return keys.blocks + hasher(as_multimodal)
