"""vLLM on Model Runner V2 as a whole engine on a CPU: its kernels run in Triton's interpreter.

vLLM has that runner for CPUs with a Triton that compiles for them, which PyPI does not have; it leaves Triton out
without. `test_engine_v2.py` runs this in a process of its own, since the interpreter must be chosen before Triton is
imported.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import torch
import triton  # type: ignore[import-untyped]
import triton.language  # type: ignore[import-untyped]
import vllm.triton_utils

vllm.triton_utils.triton, vllm.triton_utils.tl, vllm.triton_utils.HAS_TRITON = triton, triton.language, True

from gemel_engine.config.components import EngineSettings, PromptSettings, SearchSettings  # noqa: E402
from gemel_engine.decoding.engines.reference import TransformersEngine  # noqa: E402
from gemel_engine.decoding.engines.vllm import VllmEngine  # noqa: E402
from gemel_engine.decoding.language_model import FrozenLanguageModel  # noqa: E402
from gemel_engine.decoding.prompt import PromptBuilder  # noqa: E402
from gemel_engine.knowledge_base.trie import PrefixTrie  # noqa: E402
from gemel_engine.tokenizer import encode_text  # noqa: E402
from support.engines import NUM_CHILDREN, link, make_prompts  # noqa: E402
from support.models import save_tiny_model, tiny_tokenizer  # noqa: E402
from support.names import ENTITY_NAMES  # noqa: E402

SETTINGS = SearchSettings(ranking="objective", num_candidates=2, num_to_certify=1, num_children=NUM_CHILDREN)


def main(directory: Path) -> None:
    """Link four prompts, half of them with pictures, and compare with the reference."""
    tokenizer = tiny_tokenizer()
    model = str(save_tiny_model("llama", tokenizer, directory / "model"))
    terminator = PromptBuilder(tokenizer, PromptSettings()).terminator
    trie = PrefixTrie.from_sequences([encode_text(tokenizer, name) for name in ENTITY_NAMES])[0]
    trie.save(directory / "trie")
    prompts = make_prompts(tokenizer)[:4]
    settings = EngineSettings(name=model, dtype="float32", kv_cache_gib=1)
    engine = VllmEngine(settings, directory / "trie", terminator, NUM_CHILDREN, 512)
    assert engine.llm_engine.vllm_config.use_v2_model_runner
    reference = TransformersEngine(FrozenLanguageModel(model), trie, terminator, NUM_CHILDREN)
    found = link(engine, prompts, trie, terminator, 4, SETTINGS)
    expected = link(reference, prompts, trie, terminator, 1, SETTINGS)
    for result, wanted in zip(found, expected, strict=True):
        assert [name.name_index for name in result.names] == [name.name_index for name in wanted.names]
        log_probs = [torch.tensor([name.log_prob for name in side.names]) for side in (result, wanted)]
        torch.testing.assert_close(*log_probs, atol=1e-3, rtol=0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
