"""The frozen language model as transformers loads it, and what identifies a language model to other artifacts.

D language-model width, P prefix length, T tokens, M pictures, L labels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.auto_factory import _get_model_class

from gemel_engine.checkpoint import (
    check_files,
    check_finite_files,
    check_tensors,
    check_whole,
    checkpoint_directory,
    copy_weights,
    load_model,
    weight_files,
)
from gemel_engine.errors import ArtifactError, ConfigurationError, not_loadable
from gemel_engine.packing import PackedPrompts, Stretch
from gemel_engine.prompt import Prompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLED_BYTES = 1 << 20
_PACKED_ATTENTION = "gemel_packed"

logger = logging.getLogger(__name__)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a language model, from a local directory or by its name on the model hub.

    Raises:
        ArtifactError: There is none.
        ConfigurationError: It has no fast implementation.
    """
    check_files(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # the tokenizers' library raises nothing narrower for a damaged file
        raise not_loadable("tokenizer", name_or_path, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigurationError(f"the tokenizer of {name_or_path!r} has no fast implementation, which is needed")
    return tokenizer


def language_model_width(name_or_path: str) -> int:
    """D, the width of the language model's token embeddings.

    Raises:
        ArtifactError: The model's configuration can't be loaded.
    """
    config = _load_config(name_or_path).get_text_config()
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def max_positions(name_or_path: str) -> int | None:
    """Tokens that the language model can read, what it writes included; None where its configuration doesn't say.

    Raises:
        ArtifactError: The model's configuration can't be loaded.
    """
    return getattr(_load_config(name_or_path).get_text_config(), "max_position_embeddings", None)


def vocabulary_size(name_or_path: str) -> int:
    """Number of the language model's token embeddings, which may differ from that of its tokenizer's tokens.

    Raises:
        ArtifactError: The model's configuration can't be loaded.
    """
    return int(_load_config(name_or_path).get_text_config().vocab_size)


def language_model_fingerprint(name_or_path: str) -> str:
    """A hash that tells language models apart without reading all of their weights.

    It covers the configuration, and of each weight file the size and the first and last MiB. It guards against
    mixing artifacts up by accident, not against forgery.

    Raises:
        ArtifactError: There is no such model.
    """
    directory = checkpoint_directory("language model", name_or_path)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def check_language_model(name_or_path: str, *, verify: bool = False) -> None:
    """Raise unless a language model's files are there and hold what its configuration asks for.

    Without loading it: whichever engine loads it later, and wherever. Of a model on the hub whose weights are not on
    this machine, and of one whose checkpoint is quantised, the tensors are not compared.

    Args:
        name_or_path: Local directory, or name on the model hub.
        verify: Also read all weights, and see that they are finite.

    Raises:
        ArtifactError: A file is missing or damaged, or a tensor missing, unexpected, of another shape or not finite.
    """
    config, directory = _load_config(name_or_path), checkpoint_directory("language model", name_or_path)
    if not os.path.isdir(name_or_path) and not [*directory.glob("*.safetensors"), *directory.glob("*.bin")]:
        return
    if getattr(config, "transformers_weights", None) is not None:
        raise ArtifactError(
            f"{directory / 'config.json'} names its weights itself (transformers_weights), and engines would read "
            "different ones: remove that line"
        )
    files = weight_files(directory)
    _check_only_weights(directory, files)
    architectures = AutoModelForCausalLM._model_mapping
    if type(config) in architectures and getattr(config, "quantization_config", None) is None:
        architecture: Any = _get_model_class(config, architectures)  # type: ignore[no-untyped-call]
        check_tensors("language model", directory, files, architecture, config)
    if verify:
        check_finite_files("language model", directory, files)


def _check_only_weights(directory: Path, files: Sequence[Path]) -> None:
    """Raise where vLLM would read other safetensors files than transformers."""
    read = {*directory.glob("*.safetensors")}
    index = directory / "model.safetensors.index.json"
    if index.exists():
        read &= {directory / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    if read and read != {*files}:
        others = ", ".join(sorted(path.name for path in read ^ {*files}))
        raise ArtifactError(
            f"{directory} holds more weights than one model has, and engines would read different ones: remove {others}"
        )


def warn_if_slow(dtype: str, device: torch.device) -> None:
    """Log where a language model would be up to a hundred times slower than in float32.

    Args:
        dtype: Key of `DTYPES`.
        device: Where the model is computed.
    """
    if device.type == "cpu" and dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "this CPU has no instructions for bfloat16, in which it multiplies matrices up to a hundred times slower "
            "than in float32: set language_model.dtype to float32"
        )


class FrozenLanguageModel:
    """A causal language model that takes embeddings; no parameter of it requires a gradient.

    Args:
        name_or_path: Local directory, or name on the model hub.
        dtype: Key of `DTYPES`.
        device: torch device.
        activation_checkpointing: Compute layers again in the backward pass instead of keeping their activations.

    Raises:
        ArtifactError: There is no such model.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: str = "float32",
        device: str = "cpu",
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        warn_if_slow(dtype, torch.device(device))
        config = _load_config(name_or_path)
        if activation_checkpointing:
            _remove_dropout(config)
        model, loaded = load_model(
            "language model", AutoModelForCausalLM, name_or_path, config=config, dtype=DTYPES[dtype]
        )
        check_whole("language model", name_or_path, loaded)
        copy_weights(model)
        if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
            model.set_attn_implementation(_PACKED_ATTENTION)
        self.module = model.eval().requires_grad_(False)
        self.module.to(torch.device(device))
        self._embedding = model.get_input_embeddings()
        self._checkpointed: list[nn.Module] = []
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            self._checkpointed = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.module.device)

    @property
    def width(self) -> int:
        """D, of the input embeddings."""
        return self.embed_tokens(torch.zeros(1, dtype=torch.long)).shape[1]

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Input embeddings of tokens: (..., D), in the model's dtype."""
        embeddings: Tensor = self._embedding(token_ids.to(self.device))
        return embeddings

    def embed_prompt(self, prompt: Prompt) -> Tensor:
        """Token embeddings with the visual prefixes in their places: (T, D), in the model's dtype."""
        embeddings = self.embed_tokens(torch.tensor(prompt.token_ids))
        for start, prefix in prompt.visual_prefixes:
            embeddings[start : start + len(prefix)] = prefix.to(embeddings)
        return embeddings

    def label_losses(self, packed: PackedPrompts, visual_prefixes: Tensor) -> Tensor:
        """Cross-entropy of each label token, in nats, as float32 (L,); differentiable in the visual prefixes.

        Logits are computed where there is a label and nowhere else.

        Args:
            packed: Prompts with their labels.
            visual_prefixes: Of `packed.pictures`, (M, P, D).
        """
        embeddings = self.embed_tokens(torch.from_numpy(packed.token_ids))  # (T, D)
        if len(packed.pictures):
            positions = torch.from_numpy(packed.picture_positions).to(self.device)
            embeddings = embeddings.index_put((positions,), visual_prefixes.to(embeddings))
        with self._checkpointing():
            output = self.module(
                inputs_embeds=embeddings[None],
                attention_mask=self._attention_mask(packed),
                position_ids=torch.from_numpy(packed.position_ids).to(self.device)[None],
                use_cache=False,
                stretches=packed.stretches(),
                logits_to_keep=torch.from_numpy(packed.label_positions).to(self.device),
            )
        labels = torch.from_numpy(packed.labels).to(self.device)
        return nn.functional.cross_entropy(output.logits[0].float(), labels, reduction="none")

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Have layers keep their inputs alone, if that is asked for: transformers goes by each layer's own flag."""
        for layer in self._checkpointed:
            layer.training = True
        try:
            yield
        finally:
            for layer in self._checkpointed:
                layer.training = False

    def _attention_mask(self, packed: PackedPrompts) -> Tensor | dict[str, Tensor]:
        """What is added to attention scores, (1, 1, T, T); by kind of layer, where a model has several."""
        config = self.module.config.get_text_config()
        seen = torch.from_numpy(packed.mask()).to(self.device)
        full = self._additive(seen)
        if getattr(config, "sliding_window", None) is None:
            return full
        positions = torch.from_numpy(packed.position_ids).to(self.device)
        near = positions[:, None] - positions[None, :] < config.sliding_window
        windowed = self._additive(seen & near)
        if getattr(config, "layer_types", None) is None:
            return windowed
        return {"full_attention": full, "sliding_attention": windowed}

    def _additive(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self.module.dtype, device=self.device)
        return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[None, None]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    stretches: Sequence[Stretch] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """PyTorch's attention; of packed prompts, each stretch over those that it sees, which are few of all.

    Args:
        module: The attention layer.
        query: (1, heads, T, head width), as `key` and `value`, which may have fewer heads.
        key: See `query`.
        value: See `query`.
        attention_mask: What is added to scores, (1, 1, T, T).
        stretches: Of the sequence; None if it is not of packed prompts.
        **options: For `sdpa_attention_forward` of transformers.

    Returns:
        (1, T, heads, head width), and no attention weights.
    """
    if stretches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None, "packed prompts have one"
    lengths = [stretch.length for stretch in stretches]
    queries, keys, values = (torch.split(states, lengths, dim=2) for states in (query, key, value))
    outputs = []
    for part, rows, stretch in zip(queries, torch.split(attention_mask, lengths, dim=2), stretches, strict=True):
        columns = torch.split(rows, lengths, dim=3)
        key, value = (torch.cat([pieces[number] for number in stretch.sees], dim=2) for pieces in (keys, values))
        mask = torch.cat([columns[number] for number in stretch.sees], dim=3)
        # On a CPU, PyTorch's kernel for masked attention makes a step in bfloat16 half as slow again.
        attention = attention_by_products if part.device.type == "cpu" else sdpa_attention_forward
        outputs.append(attention(module, part, key, value, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def attention_by_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What `sdpa_attention_forward` gives without dropout, as matrix products over the heads that share keys.

    Shapes are those of `packed_attention`. Attention weights are kept for the backward pass.
    """
    num_heads, num_shared = query.shape[1], key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = (query[0] * scaling).reshape(num_shared, -1, query.shape[-1])
    scores = (grouped @ key[0].transpose(1, 2)).view(num_heads, query.shape[2], -1)
    weights = torch.softmax(scores.add_(attention_mask[0]), dim=-1)
    output = weights.view(num_shared, -1, weights.shape[-1]) @ value[0]
    return output.view(1, num_heads, query.shape[2], -1).transpose(1, 2), None


AttentionInterface.register(_PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(_PACKED_ATTENTION, sdpa_mask)


def check_trainable(name_or_path: str, *, activation_checkpointing: bool = False) -> None:
    """See that a feature mapper can be trained through a language model.

    Prompts are packed into one sequence, in which they have to be independent of each other.

    Raises:
        ArtifactError: The model's configuration can't be loaded.
        ConfigurationError: Its layers are not plain attention, take positions from elsewhere than `position_ids`, or
            can't be computed again in the backward pass.
    """
    config = _load_config(name_or_path)
    architecture: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if architecture is None:
        raise ConfigurationError(f"{name_or_path} is a {type(config).__name__}: name a causal language model")
    text_config = config.get_text_config()
    kinds = {*_listed(text_config, "layer_types"), *_listed(text_config, "block_types")}
    layers = kinds - {"full_attention", "sliding_attention"} | {"local"} & {*_listed(text_config, "attention_layers")}
    missing = {"inputs_embeds", "position_ids", "logits_to_keep"} - signature(architecture.forward).parameters.keys()
    reason = None
    if layers:
        reason = f"has layers of {', '.join(sorted(layers))}"
    elif missing:
        reason = f"takes no {', '.join(sorted(missing))}"
    elif getattr(text_config, "alibi", False):
        reason = "takes positions from attention biases"
    if reason is not None:
        raise ConfigurationError(
            f"{name_or_path}, a {architecture.__name__}, {reason}: the feature mapper can't be trained through it"
        )
    if activation_checkpointing and not architecture.supports_gradient_checkpointing:
        raise ConfigurationError(
            f"{name_or_path}, a {architecture.__name__}, has no activation checkpointing: unset "
            "language_model.activation_checkpointing"
        )


def _listed(config: PreTrainedConfig, name: str) -> Sequence[str]:
    return getattr(config, name, None) or ()


def _load_config(name_or_path: str) -> PreTrainedConfig:
    check_files(name_or_path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # the file may say anything, and anything is raised then
        raise not_loadable("language model", name_or_path, error) from error
    return config


def _remove_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout to zero: where a layer's flag says training, it would ask the same flag."""
    text_config = config.get_text_config()
    for name, value in vars(text_config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(text_config, name, 0.0)
