"""The reference engine: rollouts by a transformers model, one at a time.

It is slow and simple. It defines what the fast engine must return, and is enough for notebooks and
small jobs.

B batch (always 1), T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import deque

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from gemel_engine.decoding.engines.base import CacheStatistics, Rollout, RolloutRequest, allowed_next_tokens
from gemel_engine.decoding.language_model import FrozenLanguageModel
from gemel_engine.decoding.prompt import Prompt
from gemel_engine.knowledge_base.trie import PrefixTrie


class TransformersEngine:
    """Answers rollouts in the order of submission, one per step.

    Args:
        model: The language model.
        trie: Names allowed for requests without candidates.
        terminator: Token that ends a name.
        num_children: K, the number of log-probs reported at each step.

    Attributes:
        cache_statistics: Zeros: this engine does not count.
    """

    def __init__(self, model: FrozenLanguageModel, trie: PrefixTrie, terminator: int, num_children: int) -> None:
        self._model = model
        self._trie = trie
        self._terminator = terminator
        self._num_children = num_children
        self.cache_statistics = CacheStatistics()
        self._queue: deque[tuple[str, Prompt, RolloutRequest]] = deque()
        self._prefilled: tuple[Prompt, DynamicCache, Tensor] | None = None

    def submit(self, request_id: str, prompt: Prompt, request: RolloutRequest) -> None:
        """Queue a rollout."""
        self._queue.append((request_id, prompt, request))

    def step(self) -> list[tuple[str, Rollout]]:
        """Answer the oldest request; returns its rollout with its id."""
        request_id, prompt, request = self._queue.popleft()
        return [(request_id, self._rollout(prompt, request))]

    @torch.inference_mode()
    def _rollout(self, prompt: Prompt, request: RolloutRequest) -> Rollout:
        trie = request.candidates or self._trie
        cache, logits = self._prefill(prompt)
        if request.path:
            logits = self._advance(cache, list(request.path))
        node = trie.walk(request.path)
        excluded = request.excluded
        rollout = Rollout([], [])
        while True:
            allowed = allowed_next_tokens(trie, node, self._terminator, excluded)
            log_probs = logits.float().log_softmax(dim=-1)[torch.from_numpy(allowed).to(logits.device)]
            best = log_probs.topk(min(self._num_children, len(allowed)))
            rollout.tokens.append(allowed[best.indices.cpu().numpy()].tolist())
            rollout.log_probs.append(best.values.tolist())
            token = rollout.tokens[-1][0]
            if token == self._terminator and trie.is_terminal(node):
                return rollout
            child = trie.child(node, token)
            assert child is not None
            node, excluded = child, frozenset()
            logits = self._advance(cache, [token])

    def _prefill(self, prompt: Prompt) -> tuple[Cache, Tensor]:
        """Return a copy of the prompt's keys and values, and the logits (V,) after its last token.

        The beginning that the prompt shares with the previous one is not computed again.
        """
        if self._prefilled is None or self._prefilled[0] is not prompt:
            # An interruption leaves the cache's content unknown, so it is forgotten first.
            before, self._prefilled = self._prefilled, None
            # Without the model's configuration every layer keeps all positions, so any number of
            # them can be cut off.
            num_known, cache = 0, DynamicCache()
            if before is not None:
                num_known, cache = _common_length(before[0], prompt), before[1]
                cache.crop(num_known - cache.get_seq_length())  # minus the number to remove
            embeddings = self._model.embed_prompt(prompt)[num_known:].unsqueeze(0)  # (1, T - known, D)
            output = self._model.module(
                inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            self._prefilled = prompt, cache, output.logits[0, -1]
        _, cache, logits = self._prefilled
        return copy.deepcopy(cache), logits

    def _advance(self, cache: Cache, tokens: list[int]) -> Tensor:
        """Append tokens to the cache; returns the logits (V,) after the last one."""
        input_ids = torch.tensor([tokens], device=self._model.device)
        output = self._model.module(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1]
        return logits


def _common_length(first: Prompt, second: Prompt) -> int:
    """Return the length of the common beginning with visual prefixes, less than all of `second`."""
    longest = min(len(first.token_ids), len(second.token_ids) - 1)
    pairs = zip(first.token_ids, second.token_ids, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), longest)
    for (start, prefix), (other_start, other) in zip(first.visual_prefixes, second.visual_prefixes, strict=False):
        if start != other_start or not torch.equal(prefix, other):
            return min(common, start, other_start)
    num_both = min(len(first.visual_prefixes), len(second.visual_prefixes))
    rest = (*first.visual_prefixes[num_both:], *second.visual_prefixes[num_both:])
    return min([common, *(start for start, _ in rest)])
