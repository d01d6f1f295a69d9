"""Both engines on tiny random models: the same names and log-probs, and those of Hugging Face's own beam search."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from support.engines import (
    EXHAUSTIVE,
    NUM_CHILDREN,
    PREFIX_LENGTH,
    WEIGHT,
    WIDTH,
    link,
    make_prompts,
    name_log_prob,
    random_pools,
    search_entities,
)
from support.names import ENTITY_NAMES
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gemel_engine.config.components import EngineSettings, PromptSettings, Terminator
from gemel_engine.decoding.engines.base import RolloutEngine
from gemel_engine.decoding.engines.reference import TransformersEngine
from gemel_engine.decoding.engines.vllm import VllmEngine
from gemel_engine.decoding.language_model import FrozenLanguageModel
from gemel_engine.decoding.prompt import Prompt, PromptBuilder
from gemel_engine.decoding.scheduler import run_searches
from gemel_engine.decoding.search import NameSearch, SearchResult
from gemel_engine.knowledge_base.trie import PrefixTrie, SavedTrie
from gemel_engine.tokenizer import encode_text
from gemel_engine.training.attention import PackedLanguageModel


@pytest.fixture(scope="module")
def trie(tokenizer: PreTrainedTokenizerFast) -> PrefixTrie:
    return PrefixTrie.from_sequences([encode_text(tokenizer, name) for name in ENTITY_NAMES])[0]


def assert_equal_results(results: list[SearchResult], expected: list[SearchResult]) -> None:
    for result, reference in zip(results, expected, strict=True):
        assert [name.name_index for name in result.names] == [name.name_index for name in reference.names]
        assert [name.log_prob for name in result.names] == pytest.approx(
            [name.log_prob for name in reference.names], abs=1e-3
        )
        assert result.num_certified == reference.num_certified == 5


def engine_settings(path: Path) -> EngineSettings:
    """Little memory, so that several engines fit on one GPU; float32, so that they can be compared."""
    return EngineSettings(name=str(path), dtype="float32", kv_cache_gib=1, gpu_memory_utilization=0.15)


@pytest.fixture(scope="module")
def common_candidates(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> SavedTrie:
    names = ("bear", "moon cake", "dog", "sun", "star")
    few, _ = PrefixTrie.from_sequences([encode_text(tokenizer, name) for name in names])
    return SavedTrie(few, tmp_path_factory.mktemp("candidates"))


@pytest.fixture(scope="module", params=["llama", "opt"])
def vllm_engines(
    request: pytest.FixtureRequest,
    language_models: dict[str, Path],
    trie: PrefixTrie,
    common_candidates: SavedTrie,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, VllmEngine, VllmEngine]:
    """A model, and vLLM running it with and without prefix caching."""
    directory = tmp_path_factory.mktemp("trie")
    trie.save(directory)
    path = language_models[request.param]
    terminator = PromptBuilder(tokenizer, PromptSettings()).terminator
    settings = engine_settings(path)
    common_candidates.trie.save(common_candidates.directory)
    engines = [
        VllmEngine(
            replace(settings, enable_prefix_caching=caching),
            directory,
            terminator,
            NUM_CHILDREN,
            512,
            common_candidates,
        )
        for caching in (True, False)
    ]
    return path, engines[0], engines[1]


@pytest.mark.gpu
def test_vllm_equals_transformers(
    vllm_engines: tuple[Path, VllmEngine, VllmEngine],
    trie: PrefixTrie,
    tokenizer: PreTrainedTokenizerFast,
    device: str,
) -> None:
    path, cached, uncached = vllm_engines
    prompts = make_prompts(tokenizer)
    terminator = PromptBuilder(tokenizer, PromptSettings()).terminator
    reference = TransformersEngine(FrozenLanguageModel(str(path), device=device), trie, terminator, NUM_CHILDREN)
    expected = link(reference, prompts, trie, terminator, max_in_flight=1)
    assert len({result.names[0] for result in expected}) > 6, "pictures and texts should matter to a random model"
    for engine in (cached, uncached):
        assert_equal_results(link(engine, prompts[:4], trie, terminator, max_in_flight=1), expected[:4])
        assert_equal_results(link(engine, prompts, trie, terminator, max_in_flight=12), expected)
    assert cached.cache_statistics.num_cached_tokens > 0
    assert uncached.cache_statistics.num_cached_tokens == 0


@pytest.mark.gpu
def test_tokens_that_are_equally_probable(
    language_models: dict[str, Path], trie: PrefixTrie, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A model to which all tokens are the same: then a step's best one and the first of its K best may be two."""
    model = AutoModelForCausalLM.from_pretrained(language_models["llama"])
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    trie.save(tmp_path / "trie")
    terminator = PromptBuilder(tokenizer, PromptSettings()).terminator
    engine = VllmEngine(engine_settings(tmp_path / "model"), tmp_path / "trie", terminator, NUM_CHILDREN, 512)
    (result,) = link(engine, make_prompts(tokenizer)[:1], trie, terminator, max_in_flight=1)
    lengths = [len(trie.name_tokens(name.name_index)) for name in result.names]
    assert result.num_certified == 5
    assert lengths == sorted(len(trie.name_tokens(name)) for name in range(trie.num_names))[:5]
    of_one_token = -math.log(model.config.vocab_size)
    assert [name.log_prob for name in result.names] == pytest.approx(
        [(n + 1) * of_one_token for n in lengths], abs=1e-4
    )


@pytest.mark.gpu
@pytest.mark.heavy
def test_a_model_split_over_two_processes_gives_the_same_names(
    language_models: dict[str, Path], trie: PrefixTrie, tokenizer: PreTrainedTokenizerFast, device: str, tmp_path: Path
) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("a model is split over GPUs, and there is one")
    trie.save(tmp_path / "trie")
    settings = replace(engine_settings(language_models["llama"]), tensor_parallel_size=2)
    prompts, terminator = make_prompts(tokenizer)[1:2], PromptBuilder(tokenizer, PromptSettings()).terminator
    engine = VllmEngine(settings, tmp_path / "trie", terminator, NUM_CHILDREN, 512)
    model = FrozenLanguageModel(settings.name, device=device)
    expected = link(TransformersEngine(model, trie, terminator, NUM_CHILDREN), prompts, trie, terminator, 1)
    assert_equal_results(link(engine, prompts, trie, terminator, max_in_flight=4), expected)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_the_reference_forgets_what_two_prompts_do_not_share(
    language_models: dict[str, Path],
    trie: PrefixTrie,
    tokenizer: PreTrainedTokenizerFast,
    activation_checkpointing: bool,
) -> None:
    builder = PromptBuilder(tokenizer, PromptSettings())
    pictures = [torch.randn(PREFIX_LENGTH, WIDTH, generator=torch.Generator().manual_seed(n)) * 0.3 for n in range(3)]
    prompts = [
        builder.build(
            [builder.demonstration("A bear.", "bear", "brown bear", first)],
            builder.question(f"They drew a {name}.", name, second),
        )
        for first, second, name in [
            (pictures[0], pictures[1], "bear"),
            (pictures[0], pictures[2], "bear"),
            (pictures[1], pictures[2], "train"),  # another picture at the very beginning
            (None, None, "train"),
            (pictures[1], None, "train"),
        ]
    ]
    model = PackedLanguageModel(str(language_models["llama"]), activation_checkpointing=activation_checkpointing)
    kept = TransformersEngine(model, trie, builder.terminator, NUM_CHILDREN)
    plain = FrozenLanguageModel(str(language_models["llama"]))
    for prompt in prompts:
        fresh = TransformersEngine(plain, trie, builder.terminator, NUM_CHILDREN)
        (expected,) = link(fresh, [prompt], trie, builder.terminator, max_in_flight=1)
        assert_equal_results(link(kept, [prompt], trie, builder.terminator, max_in_flight=1), [expected])


@pytest.mark.parametrize(("dtype", "is_supported"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_a_dtype_that_the_cpu_is_slow_in_is_told(
    language_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    is_supported: bool,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    FrozenLanguageModel(str(language_models["llama"]), dtype)
    assert ("set language_model.dtype to float32" in caplog.text) is (dtype == "bfloat16" and not is_supported)


def test_the_reference_forgets_a_prompt_in_which_it_was_interrupted(
    language_models: dict[str, Path],
    trie: PrefixTrie,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, terminator = make_prompts(tokenizer)[:2], PromptBuilder(tokenizer, PromptSettings()).terminator
    model = FrozenLanguageModel(str(language_models["llama"]))
    engine = TransformersEngine(model, trie, terminator, NUM_CHILDREN)
    expected = link(engine, prompts[:1], trie, terminator, max_in_flight=1)
    with monkeypatch.context() as patch:
        patch.setattr(model, "embed_prompt", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            link(engine, prompts[1:], trie, terminator, max_in_flight=1)
    assert_equal_results(link(engine, prompts[:1], trie, terminator, max_in_flight=1), expected)


@pytest.mark.gpu
def test_pictures_never_share_a_cached_block(
    vllm_engines: tuple[Path, VllmEngine, VllmEngine],
    trie: PrefixTrie,
    tokenizer: PreTrainedTokenizerFast,
    device: str,
) -> None:
    """The same tokens with a picture, with another one, and with plain tokens in its place are three prompts."""
    path, cached, _ = vllm_engines
    terminator = PromptBuilder(tokenizer, PromptSettings()).terminator
    with_picture = make_prompts(tokenizer)[1]
    other = Prompt(with_picture.token_ids, tuple((at, -prefix) for at, prefix in with_picture.visual_prefixes))
    zero = Prompt(with_picture.token_ids, tuple((at, prefix * 0) for at, prefix in with_picture.visual_prefixes))
    prompts = [with_picture, other, zero, Prompt(with_picture.token_ids, ()), with_picture]
    reference = TransformersEngine(FrozenLanguageModel(str(path), device=device), trie, terminator, NUM_CHILDREN)
    expected = link(reference, prompts, trie, terminator, max_in_flight=1)
    assert_equal_results(link(cached, prompts, trie, terminator, max_in_flight=1), expected)


@pytest.mark.gpu
def test_candidates_restrict_one_request(
    vllm_engines: tuple[Path, VllmEngine, VllmEngine],
    trie: PrefixTrie,
    common_candidates: SavedTrie,
    tokenizer: PreTrainedTokenizerFast,
    device: str,
) -> None:
    """Every second request, either with candidates that are sent with it or with those that the workers have."""
    path, cached, _ = vllm_engines
    terminator = PromptBuilder(tokenizer, PromptSettings()).terminator
    sent, _ = PrefixTrie.from_sequences(
        [common_candidates.trie.name_tokens(name) for name in range(common_candidates.trie.num_names)]
    )
    reference = TransformersEngine(FrozenLanguageModel(str(path), device=device), trie, terminator, NUM_CHILDREN)
    prompts = make_prompts(tokenizer)[:4]

    def link_with_candidates(engine: RolloutEngine, few: PrefixTrie) -> list[SearchResult]:
        searches = [
            (i, prompt, NameSearch(few if i % 2 else trie, terminator, EXHAUSTIVE, are_candidates=bool(i % 2)))
            for i, prompt in enumerate(prompts)
        ]
        results = dict(run_searches(engine, searches, max_in_flight=4))
        return [results[i] for i in range(len(prompts))]

    expected = link_with_candidates(reference, sent)
    assert_equal_results(link_with_candidates(cached, sent), expected)
    assert_equal_results(link_with_candidates(cached, common_candidates.trie), expected)


@torch.inference_mode()
def test_entities_equal_brute_force(
    language_models: dict[str, Path], trie: PrefixTrie, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Thirty answers: six prompts, each with five pools."""
    model = FrozenLanguageModel(str(language_models["llama"]))
    terminator = PromptBuilder(tokenizer, PromptSettings()).terminator
    prompts, pools = make_prompts(tokenizer)[:6], random_pools(30, trie.num_names)
    log_probs = [
        [name_log_prob(model, prompt, trie, n, terminator) for n in range(trie.num_names)] for prompt in prompts
    ]
    engine = TransformersEngine(model, trie, terminator, NUM_CHILDREN)
    results = search_entities(engine, prompts * 5, pools, trie, terminator, replace(EXHAUSTIVE, num_to_certify=1))
    num_in_pool = 0  # winners
    for i, result in enumerate(results):
        bonuses = {entity.row: entity.bonus for entity in pools[i]}
        scores = [WEIGHT * log_prob + bonuses.get(row, 0.0) for row, log_prob in enumerate(log_probs[i % 6])]
        expected = sorted(range(trie.num_names), key=lambda row: -scores[row])[: result.num_certified]
        assert result.num_certified >= 1
        assert [found.row for found in result.entities[: len(expected)]] == expected
        for found in result.entities[: len(expected)]:
            assert found.score == pytest.approx(scores[found.row], abs=1e-3)
        num_in_pool += expected[0] in bonuses
    assert 0 < num_in_pool < 30


@pytest.mark.gpu
def test_entities_by_vllm_equal_those_by_transformers(
    vllm_engines: tuple[Path, VllmEngine, VllmEngine],
    trie: PrefixTrie,
    tokenizer: PreTrainedTokenizerFast,
    device: str,
) -> None:
    """Rollouts over all names and in the pools of several mentions, in one batch."""
    path, cached, _ = vllm_engines
    terminator = PromptBuilder(tokenizer, PromptSettings()).terminator
    prompts, pools = make_prompts(tokenizer)[:6], random_pools(6, trie.num_names)
    reference = TransformersEngine(FrozenLanguageModel(str(path), device=device), trie, terminator, NUM_CHILDREN)
    expected = search_entities(reference, prompts, pools, trie, terminator, EXHAUSTIVE)
    results = search_entities(cached, prompts, pools, trie, terminator, EXHAUSTIVE)
    for result, by_reference in zip(results, expected, strict=True):
        assert [found.row for found in result.entities] == [found.row for found in by_reference.entities]
        assert [found.score for found in result.entities] == pytest.approx(
            [found.score for found in by_reference.entities], abs=1e-3
        )
        assert result.num_certified == by_reference.num_certified == 5


@pytest.mark.parametrize("model", ["llama", "opt"])
@pytest.mark.parametrize("terminator", ["newline", "eos"])
def test_scores_equal_hugging_face_beam_search(
    model: str,
    terminator: Terminator,
    language_models: dict[str, Path],
    trie: PrefixTrie,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """With as many beams as names, beam search finds the argmax; the search must give its name and its score."""
    language_model = FrozenLanguageModel(str(language_models[model]))
    end = PromptBuilder(tokenizer, PromptSettings(terminator=terminator)).terminator
    engine = TransformersEngine(language_model, trie, end, NUM_CHILDREN)
    for prompt in make_prompts(tokenizer, terminator)[:3]:
        for settings, length_penalty in ((EXHAUSTIVE, 0.0), (replace(EXHAUSTIVE, objective="mean"), 1.0)):
            (result,) = link(engine, [prompt], trie, end, 1, settings)
            output = language_model.module.generate(
                inputs_embeds=language_model.embed_prompt(prompt).unsqueeze(0),
                attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.long),
                num_beams=len(ENTITY_NAMES),
                do_sample=False,
                max_new_tokens=trie.longest(0) + 1,
                length_penalty=length_penalty,
                early_stopping=False,
                eos_token_id=end,
                pad_token_id=0,
                prefix_allowed_tokens_fn=lambda _, tokens: _allowed(trie, tokens.tolist(), end),
                return_dict_in_generate=True,
                output_scores=True,
            )
            tokens = output.sequences[0].tolist()
            name = tokens[: tokens.index(end)]
            assert trie.name_tokens(result.names[0].name_index) == name
            assert result.names[0].score == pytest.approx(output.sequences_scores[0].item(), abs=1e-3)


def _allowed(trie: PrefixTrie, tokens: list[int], end: int) -> list[int]:
    if end in tokens:
        return [0]
    node = trie.walk(tokens)
    return [*trie.children(node)[0].tolist(), *([end] if trie.is_terminal(node) else [])]
