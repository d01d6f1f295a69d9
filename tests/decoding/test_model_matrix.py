"""Any language model: one training step, and linking through both engines, for tiny random models of six families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import link, make_prompts
from support.models import save_tiny_model
from support.names import ENTITY_NAMES
from support.prompts import DEMONSTRATIONS, PROMPTS, D, P, plain_losses
from torch import Tensor, nn
from transformers import BloomConfig, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gemel_engine.config.components import EngineSettings, PromptSettings
from gemel_engine.decoding.engines.reference import TransformersEngine
from gemel_engine.decoding.engines.vllm import VllmEngine
from gemel_engine.decoding.language_model import FrozenLanguageModel
from gemel_engine.decoding.prompt import PromptBuilder
from gemel_engine.errors import ConfigurationError
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.tokenizer import encode_text
from gemel_engine.training.attention import PackedLanguageModel, attention_by_products, check_trainable
from gemel_engine.training.packing import pack_prompts


@pytest.fixture(scope="module", params=["opt", "llama", "mistral", "qwen3", "gemma3", "gpt2"])
def model_directory(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return save_tiny_model(request.param, tokenizer, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("of_one", [sdpa_attention_forward, attention_by_products], ids=["sdpa", "products"])
def test_packed_prompts_are_independent(of_one: Any, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trainable(str(model_directory))
    model = PackedLanguageModel(str(model_directory))
    prefixes = torch.randn(9, P, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = torch.cat([plain_losses(model, prompt, prefixes, beginning=1) for prompt in PROMPTS])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), prefixes)
    packed = pack_prompts(PROMPTS, DEMONSTRATIONS.__getitem__, P, beginning=(1,))
    lengths = []

    def attention(module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
        lengths.append(query.shape[2])
        return of_one(module, query, *rest, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr("gemel_engine.training.attention.attention_by_products", attention)
    losses = model.label_losses(packed, prefixes[torch.from_numpy(packed.pictures)])
    (gradient,) = torch.autograd.grad(losses.sum(), prefixes)
    assert lengths == model.module.config.num_hidden_layers * [stretch.length for stretch in packed.stretches()]
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.heavy
def test_both_engines_agree(model_directory: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trie = PrefixTrie.from_sequences([encode_text(tokenizer, name) for name in ENTITY_NAMES])[0]
    trie.save(tmp_path / "trie")
    builder = PromptBuilder(tokenizer, PromptSettings())
    prompts = make_prompts(tokenizer)[:4]
    reference = TransformersEngine(FrozenLanguageModel(str(model_directory)), trie, builder.terminator, 4)
    settings = EngineSettings(name=str(model_directory), dtype="float32", kv_cache_gib=1)
    engine = VllmEngine(settings, tmp_path / "trie", builder.terminator, 4, 900)
    expected = link(reference, prompts, trie, builder.terminator, 1)
    for a, b in zip(expected, link(engine, prompts, trie, builder.terminator, 4), strict=True):
        assert [name.name_index for name in a.names] == [name.name_index for name in b.names]
        assert [name.log_prob for name in a.names] == pytest.approx([name.log_prob for name in b.names], abs=1e-3)


def test_a_model_without_position_ids_is_refused(tmp_path: Path) -> None:
    BloomConfig(hidden_size=64, n_layer=1, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="BloomForCausalLM, takes no position_ids"):
        check_trainable(str(tmp_path))
