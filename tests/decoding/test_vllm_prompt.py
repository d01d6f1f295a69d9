"""Prompts as vLLM takes them, and what their blocks are cached under, with vLLM's own requests and hashes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import BlockHash, get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from gemel_engine.decoding.engines.vllm_prompt import VllmPrompts, with_prompt_keys
from gemel_engine.decoding.prompt import VISUAL_PLACEHOLDER, Prompt

BLOCK_SIZE, WIDTH, LONGEST_PATH = 4, 8, 6
PICTURES = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()
PATHS = st.lists(st.integers(0, 1), max_size=LONGEST_PATH)
# A block of a prompt: a token, or the number of a picture.
LAYOUTS = st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=10)


@pytest.fixture(scope="module", autouse=True)
def first_hash() -> None:
    init_none_hash(sha256)


def prompt_of(layout: list[tuple[bool, int]]) -> tuple[Prompt, list[tuple[object, ...]]]:
    """A prompt, and what is at each of its positions."""
    token_ids: list[int] = []
    prefixes: list[tuple[int, torch.Tensor]] = []
    contents: list[tuple[object, ...]] = []
    for is_picture, number in layout:
        if is_picture:
            contents += [("picture", number, row) for row in range(len(PICTURES[number]))]
            prefixes.append((len(token_ids), PICTURES[number]))
            token_ids += [VISUAL_PLACEHOLDER] * len(PICTURES[number])
        else:
            contents.append(("token", number))
            token_ids.append(number)
    return Prompt(tuple(token_ids), tuple(prefixes)), contents


def request_of(prompts: VllmPrompts, prompt: Prompt, path: tuple[int, ...]) -> Request:
    """A request as vLLM's engine makes it."""
    given: Any
    given, arguments = prompts.input(prompt, path)
    return Request(
        "request",
        given["prompt_token_ids"],
        SamplingParams(max_tokens=4, extra_args={"path": path, **arguments}),
        None,
        prompt_embeds=given.get("prompt_embeds"),
        block_hasher=with_prompt_keys(get_request_block_hasher(BLOCK_SIZE, sha256)),
    )


def make_prompts() -> VllmPrompts:
    return VllmPrompts(WIDTH, torch.bfloat16, LONGEST_PATH)


@given(LAYOUTS, PATHS, LAYOUTS, PATHS)
def test_blocks_are_shared_by_equal_beginnings_alone(
    first: list[tuple[bool, int]], first_path: list[int], second: list[tuple[bool, int]], second_path: list[int]
) -> None:
    prompts, hashes, contents = make_prompts(), [], []
    for layout, path in ((first, first_path), (second, second_path)):
        prompt, content = prompt_of(layout)
        hashes.append(request_of(prompts, prompt, tuple(path)).block_hashes)
        contents.append([*content, *(("token", token) for token in path)])
    for block, (one, other) in enumerate(zip(*hashes, strict=False)):
        end = (block + 1) * BLOCK_SIZE
        assert (one == other) is (contents[0][:end] == contents[1][:end])


def test_the_same_text_with_another_picture_without_one_and_with_tokens_in_its_place() -> None:
    """Three blocks of text, then one with the picture, then text."""
    text = [(False, n % 3) for n in range(3 * BLOCK_SIZE)]
    ends: list[list[BlockHash]] = []
    for middle in ([(True, 0)], [(True, 1)], [], [(False, VISUAL_PLACEHOLDER)] * 2):
        prompt, _ = prompt_of([*text, (False, 1), *middle, (False, 2), *text])
        ends.append(request_of(make_prompts(), prompt, ()).block_hashes)
    assert len({tuple(hashes[:3]) for hashes in ends}) == 1, "blocks before a picture are shared with text"
    later = [block for hashes in ends for block in hashes[3:]]
    assert len(set(later)) == len(later)


def test_a_picture_at_another_place_of_a_block_or_moved_by_an_equal_token_is_another_beginning() -> None:
    placeholder = (False, VISUAL_PLACEHOLDER)
    layouts = ([(True, 0), placeholder, placeholder], [placeholder, (True, 0), placeholder])
    first, second = (request_of(make_prompts(), prompt_of(layout)[0], ()).block_hashes for layout in layouts)
    assert first[0] != second[0]


def test_generated_tokens_have_the_keys_of_a_longer_prompt() -> None:
    prompt, _ = prompt_of([(True, 0), (False, 1), (True, 2)])
    prompts = make_prompts()
    generated = request_of(prompts, prompt, ())
    for token in (1, 2, 1, 1):
        generated.append_output_token_ids(token)
    assert generated.block_hashes == request_of(prompts, prompt, (1, 2, 1, 1)).block_hashes
    assert len(generated.block_hashes) == 2


def test_rollouts_of_a_prompt_share_its_embeddings() -> None:
    prompt, _ = prompt_of([(False, 1), (True, 0), (False, 2), (True, 1)])
    prompts = make_prompts()
    first, second = (prompts.input(prompt, path)[0] for path in ((), (5, 6)))
    assert first["type"] == second["type"] == "embeds"
    assert first["prompt_embeds"].data_ptr() == second["prompt_embeds"].data_ptr()
    assert first["prompt_embeds"].shape == (6, WIDTH)
    assert second["prompt_embeds"].shape == (8, WIDTH)
    request = request_of(prompts, prompt, (5, 6))
    assert request.prompt_is_token_ids == [True, False, False, True, False, False, True, True]
    for start, number in ((1, 0), (4, 1)):
        assert torch.equal(second["prompt_embeds"][start : start + 2], PICTURES[number].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_kept_of_a_prompt_goes_with_it(dtype: torch.dtype) -> None:
    prompts = VllmPrompts(WIDTH, dtype, LONGEST_PATH)
    prompt = Prompt((0, 0, 1), ((0, torch.randn(2, WIDTH)),))
    prompts.input(prompt, ())
    assert (len(prompts._prepared), len(prompts._pictures)) == (1, 1)
    del prompt
    gc.collect()
    assert (len(prompts._prepared), len(prompts._pictures)) == (0, 0)


@pytest.mark.heavy
def test_model_runner_v2_puts_embeddings_at_the_positions_of_pictures() -> None:
    """vLLM's own kernel, in a process of its own because Triton's interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    script = Path(support.__path__[0]) / "prompt_embeds_v2.py"
    result = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
