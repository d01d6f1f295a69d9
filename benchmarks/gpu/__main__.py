"""What the engine does on a GPU: one figure after the other, each quick enough for a machine that is lent.

    python -m benchmarks.gpu PART [RESULT.json]
    DEVICE=cpu SHAPE=tiny python -m benchmarks.gpu PART [RESULT.json]

PART is one of `PARTS`, a minute or two each; give each a process of its own. Models and names are random; nothing is
downloaded. `DEVICE` (cuda, cpu), `SHAPE` (tiny, 1b, 8b), `NAMES` (in the large trie) and, for the part `vllm`, `EAGER`,
`ATTENTION`, `BARE` and vLLM's own `VLLM_USE_V2_MODEL_RUNNER` come from the environment. Figures go to RESULT.json if it
is given; else they are printed, and those of a GPU stored in `benchmarks/results/gpu.json`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
import torch

from benchmarks.gpu.models import (
    DEVICE,
    DTYPE,
    IS_TINY,
    NUM_CHILDREN,
    PREFIX_LENGTH,
    SHAPE,
    TERMINATOR,
    VOCABULARY,
    WIDTH,
    median_ms,
    random_prompts,
    random_trie,
    save_model,
    search,
    start_vllm,
)
from benchmarks.record import ResultFile

VARIABLES = (
    "DEVICE",
    "SHAPE",
    "NAMES",
    "EAGER",
    "ATTENTION",
    "BARE",
    "VLLM_USE_V2_MODEL_RUNNER",
)
Figures = dict[str, Any]


def main() -> None:
    """Measure one part."""
    part, *target = sys.argv[1:]
    found = PARTS[part]()
    if target:
        Path(target[0]).write_text(json.dumps(found))
        return
    print(json.dumps(found, indent=2))
    if DEVICE == "cpu":
        return  # a try
    what = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, shape {SHAPE}"
    ResultFile("gpu", variables=VARIABLES).note({f"{part}_{SHAPE}_{DEVICE}": found}, what)


def device() -> Figures:
    """What the device can do: a product of matrices, a copy, a copy from the host."""
    if DEVICE == "cpu":
        return {"device": "cpu", "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b)
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copied = median_ms(lambda: target.copy_(source), 10)
    host = torch.empty(1 << 28, dtype=torch.float32, pin_memory=True)
    moved = median_ms(lambda: target[: 1 << 28].copy_(host, non_blocking=True), 5)
    return {
        "device": properties.name,
        "GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "bf16_tflops": round(2 * 8192**3 / product / 1e9),
        "copy_tb_s": round(2 * 4 * (1 << 30) / copied / 1e9, 2),
        "host_to_device_gb_s": round(4 * (1 << 28) / moved / 1e6, 1),
    }


def kernels() -> Figures:
    """The compiled kernels of vLLM load and compute what PyTorch does; on a GPU alone."""
    import vllm._C_stable_libtorch  # type: ignore[import-not-found]  # noqa: F401
    import vllm.vllm_flash_attn.flash_attn_interface as flash

    x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    w, out = torch.randn_like(x[0]), torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, w, 1e-6)
    expected = torch.nn.functional.rms_norm(x.float(), (2048,), w.float(), 1e-6)
    q = torch.randn(70, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(70, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ends = torch.tensor([0, 70], device="cuda", dtype=torch.int32)
    lengths: dict[str, Any] = {"max_seqlen_q": 70, "cu_seqlens_q": ends, "max_seqlen_k": 70, "cu_seqlens_k": ends}
    attended = flash.flash_attn_varlen_func(q, k, v, **lengths, causal=True, fa_version=3)
    q, k, v = (t.transpose(0, 1)[None].float() for t in (q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)))
    reference = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    found = {
        "rms_norm_error": ((out.float() - expected).norm() / expected.norm()).item(),
        "attention_error": ((attended.float() - reference).norm() / reference.norm()).item(),
    }
    assert max(found.values()) < 1e-2, found
    return found


def hostcost() -> Figures:
    """What a rollout costs the host before the model runs, as `benchmarks/gpu/hostcost.py` has it."""
    from benchmarks.gpu import hostcost

    with tempfile.TemporaryDirectory() as directory:
        return hostcost.measure(*hostcost.start(Path(directory)))


def mask() -> Figures:
    """320 rows of a large trie: what may come next, and the logits constrained to it."""
    from gemel_engine.decoding.engines.mask import TrieTensors, constrain

    vocabulary = VOCABULARY if IS_TINY else 128256
    trie = random_trie(int(os.environ.get("NAMES", "20000" if IS_TINY else "5900000")), vocabulary)
    tensors, on_cpu = (TrieTensors.of(trie, torch.device(name)) for name in (DEVICE, "cpu"))
    found: Figures = {"names": trie.num_names, "nodes": trie.num_nodes}
    inner = np.random.default_rng(1).integers(1, trie.num_nodes, 320)
    half = np.where(np.arange(320) % 2, inner, 0)  # as when half of the rollouts begin: the root allows many tokens
    for name, nodes in (("inner", inner), ("half_at_root", half), ("all_at_root", np.zeros(320, np.int64))):
        places, logits = torch.from_numpy(nodes), torch.randn(320, vocabulary, device=DEVICE)
        there = places.to(DEVICE)

        def allowed(there: torch.Tensor = there) -> tuple[torch.Tensor, torch.Tensor]:
            return tensors.allowed(there, vocabulary - 1)

        def constrained(logits: torch.Tensor = logits, allowed: Any = allowed) -> torch.Tensor:
            return constrain(logits.clone(), *allowed())

        rows, tokens = allowed()
        expected = on_cpu.allowed(places, vocabulary - 1)
        assert torch.equal(expected[0], rows.cpu())
        assert torch.equal(expected[1], tokens.cpu()), name
        found |= {
            f"allowed_tokens_{name}": len(rows),
            f"allowed_ms_{name}": median_ms(allowed),
            f"whole_ms_{name}": median_ms(constrained),
            f"clone_ms_{name}": median_ms(logits.clone),
        }
        if DEVICE == "cuda":
            found[f"kernel_ms_{name}"] = kernel_ms(logits, there, tensors, constrained())
    return found


def kernel_ms(logits: torch.Tensor, nodes: torch.Tensor, tensors: Any, expected: torch.Tensor) -> float:
    """Milliseconds of the mask's kernel, which has to give what torch gives."""
    from gemel_engine.decoding.engines.mask_kernel import constrain_rows

    log_probs, rows = torch.empty_like(logits), torch.arange(len(logits), device=DEVICE)

    def constrained() -> None:
        constrain_rows(logits, log_probs, rows, nodes, tensors, logits.shape[1] - 1)

    found = median_ms(constrained)
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-5)
    return found


def training() -> Figures:
    """Steps through the frozen model on packed prompts, with and without kept activations."""
    from gemel_engine.training.attention import PackedLanguageModel
    from gemel_engine.training.packing import LabelledPrompt, Segment, SegmentKey, pack_prompts
    from gemel_engine.vision.mapper import FeatureMapper

    generator, size = np.random.default_rng(0), 40 if IS_TINY else 100

    def segment(picture: int) -> Segment:
        return Segment(tuple(generator.integers(1, VOCABULARY - 1, size).tolist()), picture)

    keys = tuple(map(SegmentKey, range(8)))
    demonstrations = {key: segment(number) for number, key in enumerate(keys)}
    prompts = [LabelledPrompt(keys, segment(8 + n), (5, 6, 7)) for n in range(4 if IS_TINY else 16)]
    packed = pack_prompts(prompts, demonstrations.__getitem__, PREFIX_LENGTH)
    features = torch.randn(len(packed.pictures), 768, device=DEVICE)
    found: Figures = {"tokens": len(packed.token_ids)}
    with tempfile.TemporaryDirectory() as directory:
        path = save_model(Path(directory) / "model")
        for name, is_checkpointed in (("plain", False), ("checkpointed", True)):
            model = PackedLanguageModel(str(path), DTYPE, DEVICE, activation_checkpointing=is_checkpointed)
            mapper = FeatureMapper.random(768, PREFIX_LENGTH, WIDTH, seed=0).to(DEVICE)
            optimiser = torch.optim.AdamW(mapper.parameters(), lr=1e-4)
            losses: list[float] = []

            def step(
                model: Any = model, mapper: Any = mapper, optimiser: Any = optimiser, losses: list[float] = losses
            ) -> None:
                optimiser.zero_grad()
                loss = model.label_losses(packed, mapper(features)).mean()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())

            milliseconds = median_ms(step, 3 if IS_TINY else 10)
            found |= {
                f"{name}_step_ms": milliseconds,
                f"{name}_tokens_s": round(len(packed.token_ids) / milliseconds * 1e3),
                f"{name}_loss": [round(losses[0], 3), round(losses[-1], 3)],
            }
            assert losses[-1] < losses[0], losses
    return found


def encoder() -> Figures:
    """Pictures a second of a random vision transformer of the size of ViT-L-14."""
    import open_clip
    from PIL import Image
    from safetensors.torch import save_file

    from gemel_engine.vision.encoder import ImageEncoder

    tower = {"image_size": 224, "patch_size": 14, "width": 1024, "head_width": 64, "layers": 24}
    if IS_TINY:
        tower = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 1}
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": tower, "text_cfg": text, "custom_text": True}
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(32)]
    found: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
        save_file(model.state_dict(), directory / "open_clip_model.safetensors")
        for dtype in (torch.float32, torch.bfloat16):
            made = ImageEncoder(str(directory), device=DEVICE, dtype=dtype)
            pixels = [made.preprocess(image) for image in images]
            milliseconds = median_ms(lambda made=made, pixels=pixels: made.encode_pixels(pixels), 3 if IS_TINY else 10)  # type: ignore[misc]
            found[f"{str(dtype)[6:]}_images_s"] = round(len(images) / milliseconds * 1e3)
    return found


def transformers_engine() -> Figures:
    """The reference engine, one rollout at a time."""
    from gemel_engine.decoding.engines.reference import TransformersEngine
    from gemel_engine.decoding.language_model import FrozenLanguageModel

    trie = random_trie(2000 if IS_TINY else 200_000)
    with tempfile.TemporaryDirectory() as directory:
        model = FrozenLanguageModel(str(save_model(Path(directory) / "model")), DTYPE, DEVICE)
    engine = TransformersEngine(model, trie, TERMINATOR, NUM_CHILDREN)
    prompts = random_prompts(4 if IS_TINY else 12, 120 if IS_TINY else 840, num_forms=2)
    search(engine, prompts[:1], trie, 1)
    num_rollouts, seconds = search(engine, prompts, trie, 1)
    return {"mentions_s": round(len(prompts) / seconds, 2), "rollouts_s": round(num_rollouts / seconds, 1)}


def vllm() -> Figures:
    """Prefill, and searches with 64 in flight, with pictures and without; at most 8 rollouts a mention."""
    trie = random_trie(2000 if IS_TINY else 200_000)
    length, number = (120, 16) if IS_TINY else (840, 256 if SHAPE == "1b" else 128)
    num_fresh = 4 if IS_TINY else 32
    has_weights = SHAPE != "8b"
    found: Figures = {"shape": SHAPE}
    with tempfile.TemporaryDirectory() as name:
        trie.save(Path(name) / "trie")
        path = save_model(Path(name) / "model", has_weights=has_weights)
        start = time.perf_counter()
        engine = start_vllm(path, Path(name) / "trie", 512 if IS_TINY else 2048, has_weights=has_weights)
        found["start_s"] = round(time.perf_counter() - start, 1)
        search(engine, random_prompts(2, length, num_forms=2), trie, 2)
        for kind, has_pictures in (("pictures", True), ("text", False)):
            fresh = random_prompts(num_fresh, length + 1, has_pictures=has_pictures, num_forms=num_fresh)
            _, seconds = search(engine, fresh, trie, 64, max_rollouts=1)
            found[f"{kind}_prefill_tokens_s"] = round(sum(len(prompt.token_ids) for prompt in fresh) / seconds)
            counts = engine.cache_statistics
            sent, cached, cpu = counts.num_prompt_tokens, counts.num_cached_tokens, time.process_time()
            num_rollouts, seconds = search(engine, random_prompts(number, length, has_pictures=has_pictures), trie, 64)
            found |= {
                f"{kind}_mentions_s": round(number / seconds, 2),
                f"{kind}_rollouts_s": round(num_rollouts / seconds, 1),
                f"{kind}_cpu_ms_a_rollout": round((time.process_time() - cpu) / num_rollouts * 1e3, 2),
                f"{kind}_cached": round(
                    (counts.num_cached_tokens - cached) / max(1, counts.num_prompt_tokens - sent), 3
                ),
            }
    return found


PARTS: dict[str, Callable[[], Figures]] = {
    part.__name__: part for part in (device, kernels, hostcost, mask, training, encoder, transformers_engine, vllm)
}

if __name__ == "__main__":
    main()
