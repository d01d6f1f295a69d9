"""Model Runner V2's own code for prompt embeddings, on tensors of a CPU: its kernel runs in Triton's interpreter.

`test_vllm_prompt.py` runs it in a process of its own, since the interpreter must be chosen before Triton is imported.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton  # type: ignore[import-untyped]
import triton.language  # type: ignore[import-untyped]
import vllm.triton_utils

# vLLM leaves Triton out where there is no GPU.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language

from vllm import SamplingParams  # noqa: E402
from vllm.v1.core.sched.output import NewRequestData  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.worker.gpu.model_states import prompt_embeds  # noqa: E402

from gemel_engine.decoding.engines.vllm_prompt import VllmPrompts, with_prompt_keys  # noqa: E402
from gemel_engine.decoding.prompt import Prompt  # noqa: E402

WIDTH, SLOTS = 8, 4
TOKEN = -1.0  # what the embedding of any token is


class Buffer:
    """A `UvaBackedTensor` in memory that a CPU can read."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.gpu = torch.zeros(size, dtype=dtype)
        self.np = self.gpu.numpy()

    def copy_to_uva(self) -> torch.Tensor:
        """Return the tensor, which needs no copy."""
        return self.gpu


def main() -> None:
    """Lay batches over token embeddings: a prompt in two pieces, one after cached blocks, one without pictures."""
    vars(prompt_embeds)["UvaBackedTensor"] = Buffer
    state = prompt_embeds.PromptEmbedsState(SLOTS, WIDTH, torch.float32, torch.device("cpu"))
    prompts = VllmPrompts(WIDTH, torch.float32, longest_path=4)
    first, second = torch.randn(2, 2, WIDTH), torch.randn(2, WIDTH)
    pictures = Prompt((5, 0, 0, 6, 0, 0, 7), ((1, first[0]), (4, first[1])))
    other = Prompt((5, 6, 7, 0, 0, 8), ((3, second),))
    text = Prompt((5, 6, 7), ())
    expected = {
        2: torch.full((8, WIDTH), TOKEN),
        0: torch.full((6, WIDTH), TOKEN),
        3: torch.full((3, WIDTH), TOKEN),
    }
    expected[2][1:3], expected[2][4:6], expected[0][3:5] = *first, second
    for slot, prompt, path in ((2, pictures, (9,)), (0, other, ()), (3, text, ())):
        add(state, prompts, slot, prompt, path)
    check(state, expected, {2: (0, 5), 3: (0, 3), 0: (2, 4)})  # by slot: number computed, number scheduled
    check(state, expected, {0: (4, 2), 2: (5, 3)})
    state.remove_request("2")
    add(state, prompts, 2, text, ())  # the slot is taken again, by a prompt without pictures
    check(state, expected | {2: expected[3]}, {2: (0, 3)})


def add(state: Any, prompts: VllmPrompts, slot: int, prompt: Prompt, path: tuple[int, ...]) -> None:
    given: Any
    given, arguments = prompts.input(prompt, path)
    request = Request(
        str(slot),
        given["prompt_token_ids"],
        SamplingParams(max_tokens=1, extra_args=arguments),
        None,
        prompt_embeds=given.get("prompt_embeds"),
        block_hasher=with_prompt_keys(None),
    )
    state.add_request(slot, NewRequestData.from_request(request, (), None))
    state.apply_staged_writes()


def check(state: Any, expected: dict[int, torch.Tensor], scheduled: dict[int, tuple[int, int]]) -> None:
    """Compare what the model would get with what each slot's prompt contains."""
    counts = np.array([count for _, count in scheduled.values()], dtype=np.int32)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    embeddings = torch.full((int(counts.sum()), WIDTH), TOKEN)
    batch = SimpleNamespace(
        num_reqs=len(scheduled),
        num_scheduled_tokens=counts,
        idx_mapping=torch.tensor([*scheduled], dtype=torch.int32),
        query_start_loc=starts,
    )
    computed = torch.zeros(SLOTS, dtype=torch.int32)
    for slot, (begin, _) in scheduled.items():
        computed[slot] = begin
    state.apply(batch, computed, embeddings)
    rows = [expected[slot][begin : begin + count] for slot, (begin, count) in scheduled.items()]
    assert torch.equal(embeddings, torch.cat(rows)), (embeddings, rows)


if __name__ == "__main__":
    main()
