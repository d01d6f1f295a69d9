"""The mask on a GPU as one kernel: log-sum-exp, disallowed tokens and allowed ones in one pass over the logits.

`mask.py` does the same with torch, in five passes, and waits for the GPU twice to learn how many
tokens are allowed. vLLM's sampler and its search for the K best read whole rows of logits, so the
kernel writes whole rows. It looks up the trie itself, so nothing is read back to the host.

B rows of a batch, R of them constrained, V vocabulary, N nodes, M names.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from gemel_engine.decoding.engines.mask import LOWEST_LOG_PROB, TrieTensors

_BLOCK = 4096  # logits that a program reads at a time
_NUM_WARPS = 8


def constrain_rows(
    logits: Tensor, output: Tensor, rows: Tensor, nodes: Tensor, trie: TrieTensors, terminator: int
) -> None:
    """Write log-probs under the full softmax, with disallowed tokens at minus infinity.

    Args:
        logits: Logits (B, V), float32, rows contiguous.
        output: Log-probs (B, V), float32, rows contiguous, in other memory than `logits`; rows that
            are not in `rows` are left as they are.
        rows: Rows (R,) to constrain, each once, int64.
        nodes: Their nodes (R,) in the trie, int64.
        trie: The trie, on the same device.
        terminator: Token allowed where a name ends.
    """
    assert logits.stride(1) == output.stride(1) == 1, "rows are not contiguous"
    _constrain_row[(len(rows),)](
        logits,
        output,
        logits.stride(0),
        output.stride(0),
        rows,
        nodes,
        trie.tokens,
        trie.first_child,
        trie.terminals,
        len(trie.terminals),
        terminator,
        logits.shape[1],
        LOWEST_LOG_PROB,
        TOKEN_BITS=8 * trie.tokens.element_size(),
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _constrain_row(  # type: ignore[no-untyped-def]
    logits,  # (B, V)
    output,  # (B, V)
    logits_stride,
    output_stride,
    rows,  # (R,)
    nodes,  # (R,)
    tokens,  # (N,), unsigned integers viewed as signed ones
    first_child,  # (N + 1,)
    terminals,  # (M,), ascending
    num_terminals,
    terminator,
    vocabulary,
    lowest,
    TOKEN_BITS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Constrain one row: fill it with minus infinity on the way to its log-sum-exp, then write what is allowed."""
    number = tl.program_id(0)
    row = tl.load(rows + number)
    node = tl.load(nodes + number)
    logits += row * logits_stride
    output += row * output_stride
    lanes = tl.arange(0, BLOCK)

    # Each lane keeps the largest of its logits and the sum of their exponentials relative to it.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        places = first + lanes
        is_inside = places < vocabulary
        values = tl.load(logits + places, mask=is_inside, other=float("-inf"))
        tl.store(output + places, tl.full((BLOCK,), float("-inf"), tl.float32), mask=is_inside)
        new = tl.maximum(largest, values)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.exp(values - base)
        largest = new
    peak = tl.max(largest, axis=0)
    log_sum = peak + tl.log(tl.sum(total * tl.exp(largest - peak), axis=0))
    tl.debug_barrier()  # other threads of this row have filled it

    start = tl.load(first_child + node)
    end = tl.load(first_child + node + 1)
    for first in range(start, end, BLOCK):
        places = first + lanes
        is_child = places < end
        token = tl.load(tokens + places, mask=is_child, other=0).to(tl.int64) & ((1 << TOKEN_BITS) - 1)
        values = tl.load(logits + token, mask=is_child, other=0.0) - log_sum
        tl.store(output + token, tl.where(values < lowest, lowest, values), mask=is_child)

    low, high = 0, num_terminals  # the first terminal that is not below the node
    while low < high:
        middle = (low + high) // 2
        is_below = tl.load(terminals + middle) < node
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_below, high, middle)
    if tl.load(terminals + low, mask=low < num_terminals, other=-1) == node:
        value = tl.load(logits + terminator) - log_sum
        tl.store(output + terminator, tl.where(value < lowest, lowest, value))
