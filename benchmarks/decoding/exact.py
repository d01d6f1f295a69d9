"""Certified answers against the scores of all names.

The names stand behind the prompt as a tree: a token sees the prompt and the tokens before it in its own name, at the
position that it has there. So the prompt is read once and every node of the trie once, in pieces of some hundred nodes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from benchmarks.decoding.systems import Systems
from gemel_engine.decoding.language_model import FrozenLanguageModel
from gemel_engine.knowledge_base.trie import PrefixTrie

_NODES_AT_ONCE = 256  # attention under a mask costs their square

logger = logging.getLogger("benchmarks")


def brute_force(data: Path, num_mentions: int) -> dict[str, tuple[Any, str]]:
    """Score all names for the first certified answers of a sample, and compare the best with the answer."""
    systems = Systems(data, ranking="objective")
    model = FrozenLanguageModel(systems.config.language_model.name, systems.config.language_model.dtype)
    trie = systems.artifacts.knowledge_base.trie
    terminator = systems.generator.terminator
    mentions = systems.sample(2 * num_mentions, seed=1)
    _, predictions = systems.ours(mentions)
    certified = [row for row, prediction in enumerate(predictions) if prediction.certified][:num_mentions]
    prompts = systems.prompts([mentions[row] for row in certified])
    num_equal, largest = 0, 0.0
    for row, prompt in zip(certified, prompts, strict=True):
        scores = score_all_names(model, prompt, trie, terminator)
        best, answer = int(scores.argmax()), predictions[row]
        name = systems.artifacts.knowledge_base.entity(systems.artifacts.knowledge_base.entities_of_name(best)[0]).name
        num_equal += name == answer.entity_name
        assert answer.log_prob is not None, "a certified answer has one"
        largest = max(largest, abs(float(scores[best]) - answer.log_prob))
        logger.info(
            "%s: %s %.4f, brute force %s %.4f",
            mentions[row].mention,
            answer.entity_name,
            answer.log_prob,
            name,
            scores[best],
        )
    what = f"{len(certified)} certified mentions of dev, all {trie.num_names} names scored by transformers, float32"
    return {
        "certified_answers_equal_to_brute_force": (f"{num_equal} of {len(certified)}", what),
        "largest_difference_of_log_probs": (largest, f"{what}; nats"),
    }


@torch.inference_mode()
def score_all_names(model: FrozenLanguageModel, prompt: Sequence[int], trie: PrefixTrie, terminator: int) -> np.ndarray:
    """Log-probability of every name with its terminator behind a prompt, in the order of the trie."""
    cache = DynamicCache()
    output = model.module(torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    after_prompt = output.logits[0, -1].float().log_softmax(-1)
    scores = np.full(trie.num_names, -math.inf)
    tokens, first_child = trie.children(0)
    of_root = [(int(token), first_child + place) for place, token in enumerate(tokens)]
    for piece in _pieces(trie, of_root):
        rows = {node: row for row, (node, _, _, _) in enumerate(piece)}
        ids = torch.tensor([[token for _, token, _, _ in piece]])
        positions = torch.tensor([[len(prompt) + depth for _, _, depth, _ in piece]])
        sees = torch.zeros(len(piece), len(piece), dtype=torch.bool)
        for row, (_, _, _, parent) in enumerate(piece):
            if parent in rows:
                sees[row] = sees[rows[parent]]
            sees[row, row] = True
        sees = torch.cat([torch.ones(len(piece), len(prompt), dtype=torch.bool), sees], dim=1)
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
        output = model.module(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache.crop(len(prompt) - cache.get_seq_length())  # minus the positions to remove
        log_probs = output.logits[0].float().log_softmax(-1)
        reached = np.empty(len(piece))
        for row, (node, token, _, parent) in enumerate(piece):
            before = (0.0, after_prompt) if parent == 0 else (reached[rows[parent]], log_probs[rows[parent]])
            reached[row] = before[0] + float(before[1][token])
            if trie.is_terminal(node):
                scores[trie.name_index(node)] = reached[row] + float(log_probs[row, terminator])
    return scores


def _pieces(trie: PrefixTrie, of_root: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int, int, int]]]:
    """Subtrees of the root's children together: (node, token, depth, parent), a parent before its children."""
    piece: list[tuple[int, int, int, int]] = []
    for token, child in of_root:
        subtree = [(child, token, 0, 0)]
        for node, _, depth, _ in subtree:  # grows as it is read
            tokens, first = trie.children(node)
            subtree += [(first + place, int(below), depth + 1, node) for place, below in enumerate(tokens)]
        if piece and len(piece) + len(subtree) > _NODES_AT_ONCE:
            yield piece
            piece = []
        piece += subtree
    yield piece
