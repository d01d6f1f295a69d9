"""Prompts in the form that vLLM takes, and the keys under which it caches their blocks.

vLLM takes a prompt with visual prefixes as token ids, a mask of which positions are token ids, and
a tensor of embeddings for all positions, of which it reads those of visual prefixes alone. The
tensor is made once for all rollouts of a prompt, and its other rows stay uninitialised.

vLLM's own key of a block covers all rows of that tensor and leaves the mask out. Ours has the
digests of visual prefixes instead, with their positions, as vLLM's keys have them for multimodal
models: the same text with another picture, without one, or with token ids in its place shares no
block, and blocks before the first picture are shared with prompts that have none.

D language-model width, P prefix length, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from vllm.inputs.engine import EmbedsInput, TokensInput, embeds_input, tokens_input
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from gemel_engine.decoding.prompt import Prompt

BlockHasher = Callable[[Request], list[BlockHash]]
PICTURES = "pictures"  # key of a request's `extra_args`


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt with visual prefixes in vLLM's form.

    Attributes:
        embeddings: Embeddings (T + R, D) with room for a path of R tokens; only the rows of visual
            prefixes are initialised.
        is_token: False at the positions (T,) of visual prefixes.
        pictures: Position and digest of each visual prefix, in order.
    """

    embeddings: Tensor
    is_token: list[bool]
    pictures: list[MultiModalFeatureSpec]


class VllmPrompts:
    """Makes what vLLM takes of prompts, once for all rollouts of a prompt.

    Args:
        width: D.
        dtype: Data type of the embeddings.
        longest_path: Maximum number of tokens that follow a prompt.
    """

    def __init__(self, width: int, dtype: torch.dtype, longest_path: int) -> None:
        self._width = width
        self._dtype = dtype
        self._longest_path = longest_path
        self._prepared: WeakKeyDictionary[Prompt, PreparedPrompt] = WeakKeyDictionary()

    def input(self, prompt: Prompt, path: tuple[int, ...]) -> tuple[EmbedsInput | TokensInput, dict[str, Any]]:
        """Return the prompt followed by `path`, and what the request's `extra_args` say of it."""
        token_ids = [*prompt.token_ids, *path]
        if not prompt.visual_prefixes:
            return tokens_input(token_ids), {}
        prepared = self._prepared.get(prompt)
        if prepared is None:
            prepared = self._prepared[prompt] = self._prepare(prompt)
        embeds = embeds_input(
            prepared.embeddings[: len(token_ids)],
            prompt_token_ids=token_ids,
            is_token_ids=prepared.is_token + [True] * len(path),
        )
        return embeds, {PICTURES: prepared.pictures}

    def _prepare(self, prompt: Prompt) -> PreparedPrompt:
        shape = len(prompt.token_ids) + self._longest_path, self._width
        # Pinned memory is copied to a GPU as it is; vLLM would copy other memory twice.
        embeddings = torch.empty(shape, dtype=self._dtype, pin_memory=torch.cuda.is_available())
        is_token = [True] * len(prompt.token_ids)
        pictures = []
        for start, prefix in prompt.visual_prefixes:
            rows = embeddings[start : start + len(prefix)].copy_(prefix)
            is_token[start : start + len(prefix)] = [False] * len(prefix)
            digest = hashlib.sha256(rows.view(torch.uint8).numpy().data).hexdigest()
            place = PlaceholderRange(offset=start, length=len(prefix))
            pictures.append(MultiModalFeatureSpec(None, "prompt_embeds", digest, place))
        return PreparedPrompt(embeddings, is_token, pictures)


def with_picture_keys(hasher: BlockHasher) -> BlockHasher:
    """Return vLLM's block hasher, with our keys for requests of `VllmPrompts`."""
    return partial(_block_hashes, hasher)


def _block_hashes(hasher: BlockHasher, request: Request) -> list[BlockHash]:
    """Return the hashes of a request's blocks that are full and not hashed yet."""
    parameters = request.sampling_params
    arguments = None if parameters is None else parameters.extra_args
    pictures = (arguments or {}).get(PICTURES)
    if pictures is None:
        return hasher(request)
    as_multimodal: Any = SimpleNamespace(
        block_hashes=request.block_hashes,
        num_tokens=request.num_tokens,
        all_token_ids=request.all_token_ids,  # zeros at the positions of visual prefixes
        mm_features=pictures,
        prompt_embeds=None,
        lora_request=None,
        cache_salt=None,
    )
    return hasher(as_multimodal)
