"""Prompts to pack."""

from __future__ import annotations

import torch
from torch import Tensor

from gemel_engine.decoding.language_model import FrozenLanguageModel
from gemel_engine.training.packing import LabelledPrompt, Segment, SegmentKey

P, D = 3, 64

DEMONSTRATIONS = {
    SegmentKey(row): Segment((20 + row, 30, 31, 10 + row), picture=row if row % 2 else None) for row in range(6)
}


def labelled(rows: tuple[int, ...], question: Segment, target: tuple[int, ...]) -> LabelledPrompt:
    """A prompt with the demonstrations of these rows."""
    return LabelledPrompt(tuple(map(SegmentKey, rows)), question, target)


PROMPTS = [
    labelled((0, 1, 2), Segment((40, 41, 42), picture=6), (50, 51, 9)),
    labelled((0, 1, 2), Segment((43, 44), picture=None), (52, 9)),
    labelled((0, 1, 3), Segment((45,), picture=7), (53, 54, 55, 9)),
    labelled((), Segment((46, 47), picture=8), (9,)),
    labelled((2,), Segment((48, 49), picture=6), (50, 9)),
]


def plain_losses(model: FrozenLanguageModel, prompt: LabelledPrompt, prefixes: Tensor, beginning: int) -> Tensor:
    """What a loop over whole prompts computes: all embeddings in a row, all logits, the target's losses."""
    parts = [model.embed_tokens(torch.tensor([beginning]))]
    for segment in (*(DEMONSTRATIONS[row] for row in prompt.demonstrations), prompt.question):
        if segment.picture is not None:
            parts.append(prefixes[segment.picture])
        parts.append(model.embed_tokens(torch.tensor(segment.token_ids)))
    parts.append(model.embed_tokens(torch.tensor(prompt.target, dtype=torch.long)))
    logits = model.module(inputs_embeds=torch.cat(parts)[None]).logits[0]
    n = len(prompt.target)
    return torch.nn.functional.cross_entropy(logits[-n - 1 : -1], torch.tensor(prompt.target), reduction="none")
