"""The frozen language model in transformers, and the fingerprint that artifacts keep of it.

D language-model width, P prefix length, T tokens, M pictures, L labels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.auto_factory import _get_model_class

from gemel_engine.checkpoint import (
    check_files,
    check_finite_files,
    check_only_weights,
    check_tensors,
    check_whole,
    checkpoint_directory,
    copy_weights,
    load_model,
    weight_files,
)
from gemel_engine.decoding.prompt import Prompt
from gemel_engine.errors import ArtifactError, not_loadable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLED_BYTES = 1 << 20

logger = logging.getLogger(__name__)


def language_model_width(name_or_path: str) -> int:
    """Return D, the width of the language model's token embeddings.

    Raises:
        ArtifactError: The model's configuration can't be loaded.
    """
    config = load_model_config(name_or_path).get_text_config()
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def max_positions(name_or_path: str) -> int | None:
    """Return the maximum number of tokens read and written; None if the configuration has none.

    Raises:
        ArtifactError: The model's configuration can't be loaded.
    """
    return getattr(load_model_config(name_or_path).get_text_config(), "max_position_embeddings", None)


def needs_bos(name_or_path: str) -> bool:
    """Return whether the model's predictions are useless for prompts that begin without its BOS token.

    Raises:
        ArtifactError: The model's configuration can't be loaded.
    """
    return str(load_model_config(name_or_path).model_type).startswith("gemma")


def vocabulary_size(name_or_path: str) -> int:
    """Return the number of token embeddings, which may differ from the tokenizer's vocabulary.

    Raises:
        ArtifactError: The model's configuration can't be loaded.
    """
    return int(load_model_config(name_or_path).get_text_config().vocab_size)


def language_model_fingerprint(name_or_path: str) -> str | None:
    """Return a hash that identifies a language model, without reading all of its weights.

    It covers the configuration, and the size and the first and last MiB of each weight file. It
    detects artifacts mixed up by accident, not forgery. It is None if the model is on the hub and
    its weights are not on this machine.

    Raises:
        ArtifactError: There is no such model.
    """
    directory = checkpoint_directory("language model", name_or_path)
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    if not files and not os.path.isdir(name_or_path):
        return None
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def check_language_model(name_or_path: str, *, verify: bool = False) -> None:
    """Validate that a language model's files exist and contain the tensors of its configuration.

    The model is not loaded, so the check holds for any engine and machine. Tensors are not compared
    if the model is on the hub and its weights are not on this machine, or if it is quantised.

    Args:
        name_or_path: Local directory, or name on the model hub.
        verify: Also read all weights, and validate that they are finite.

    Raises:
        ArtifactError: A file is missing or damaged, or a tensor is missing, unexpected, of another
            shape or not finite.
    """
    config, directory = load_model_config(name_or_path), checkpoint_directory("language model", name_or_path)
    if not os.path.isdir(name_or_path) and not [*directory.glob("*.safetensors"), *directory.glob("*.bin")]:
        return
    if getattr(config, "transformers_weights", None) is not None:
        raise ArtifactError(
            f"{directory / 'config.json'} names its weights itself (transformers_weights), and engines would read "
            "different ones: remove that line"
        )
    files = weight_files(directory)
    check_only_weights(directory, files)
    architectures = AutoModelForCausalLM._model_mapping
    if type(config) in architectures and getattr(config, "quantization_config", None) is None:
        architecture: Any = _get_model_class(config, architectures)  # type: ignore[no-untyped-call]
        check_tensors("language model", directory, files, architecture, config)
    if verify:
        check_finite_files("language model", directory, files)


def warn_if_slow(dtype: str, device: torch.device) -> None:
    """Log a warning if a language model would be up to a hundred times slower than in float32.

    Args:
        dtype: Key of `DTYPES`.
        device: Device of the model.
    """
    if device.type == "cpu" and dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "this CPU has no instructions for bfloat16, in which it multiplies matrices up to a hundred times slower "
            "than in float32: set language_model.dtype to float32"
        )


class FrozenLanguageModel:
    """A causal language model that accepts embeddings; none of its parameters requires a gradient.

    Args:
        name_or_path: Local directory, or name on the model hub.
        dtype: Key of `DTYPES`.
        device: torch device.
        config: Changed configuration of the model; None loads the model's own.

    Raises:
        ArtifactError: There is no such model.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: str = "float32",
        device: str = "cpu",
        *,
        config: PreTrainedConfig | None = None,
    ) -> None:
        warn_if_slow(dtype, torch.device(device))
        config = config or load_model_config(name_or_path)
        model, loaded = load_model(
            "language model", AutoModelForCausalLM, name_or_path, config=config, dtype=DTYPES[dtype]
        )
        check_whole("language model", name_or_path, loaded)
        copy_weights(model)
        self.module = model.eval().requires_grad_(False)
        self.module.to(torch.device(device))
        self._embedding = model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return torch.device(self.module.device)

    @property
    def width(self) -> int:
        """D, the width of the input embeddings."""
        return self.embed_tokens(torch.zeros(1, dtype=torch.long)).shape[1]

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Return the input embeddings of tokens (...): (..., D), in the model's dtype."""
        embeddings: Tensor = self._embedding(token_ids.to(self.device))
        return embeddings

    def embed_prompt(self, prompt: Prompt) -> Tensor:
        """Return a prompt's embeddings, visual prefixes included: (T, D), in the model's dtype."""
        embeddings = self.embed_tokens(torch.tensor(prompt.token_ids))
        for start, prefix in prompt.visual_prefixes:
            embeddings[start : start + len(prefix)] = prefix.to(embeddings)
        return embeddings


def load_model_config(name_or_path: str) -> PreTrainedConfig:
    """Load the configuration of a language model.

    Raises:
        ArtifactError: There is no such model.
    """
    check_files(name_or_path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # the file may contain anything, and so any error may be raised
        raise not_loadable("language model", name_or_path, error) from error
    return config
