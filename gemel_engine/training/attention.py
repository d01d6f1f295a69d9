"""The frozen language model on packed prompts: attention, losses, and the check of a model.

Shapes: T tokens, L label tokens, M pictures, P prefix length, D language-model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from gemel_engine.decoding.language_model import FrozenLanguageModel, load_model_config
from gemel_engine.errors import ConfigurationError
from gemel_engine.training.packing import PackedPrompts, Stretch

_PACKED_ATTENTION = "gemel_packed"


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
    """Compute PyTorch's attention; in packed prompts, each stretch over the few that it sees.

    Args:
        module: The attention layer.
        query: Queries, (1, heads, T, head width).
        key: Keys, shaped as `query`; may have fewer heads.
        value: Values, shaped as `key`.
        attention_mask: Mask added to scores, (1, 1, T, T).
        stretches: Stretches of the sequence; None if it has no packed prompts.
        **options: Options of `sdpa_attention_forward` of transformers.

    Returns:
        Output (1, T, heads, head width), and no attention weights.
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
        # PyTorch's kernel for masked attention makes a step in bfloat16 on a CPU 1.5 times as long.
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
    """Compute `sdpa_attention_forward` without dropout, by products over heads that share keys.

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


class PackedLanguageModel(FrozenLanguageModel):
    """The frozen language model that a feature mapper is trained through, on packed prompts.

    Args:
        name_or_path: Local directory, or name on the model hub, as for `FrozenLanguageModel`.
        dtype: Key of `DTYPES`.
        device: torch device.
        activation_checkpointing: Whether to recompute layers in the backward pass instead of
            keeping their activations.
    """

    def __init__(
        self, name_or_path: str, dtype: str = "float32", device: str = "cpu", *, activation_checkpointing: bool = False
    ) -> None:
        config = load_model_config(name_or_path)
        if activation_checkpointing:
            _remove_dropout(config)
        super().__init__(name_or_path, dtype, device, config=config)
        model = self.module
        if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
            model.set_attn_implementation(_PACKED_ATTENTION)
        self._checkpointed: list[nn.Module] = []
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            self._checkpointed = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]

    def label_losses(self, packed: PackedPrompts, visual_prefixes: Tensor) -> Tensor:
        """Return the cross-entropy of each label token, in nats, as float32 (L,).

        It is differentiable in the visual prefixes. Logits are computed for label positions only.

        Args:
            packed: Prompts with their labels.
            visual_prefixes: Visual prefixes of `packed.pictures`, (M, P, D).
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
        """Turn on activation checkpointing where set: transformers reads each layer's own flag."""
        for layer in self._checkpointed:
            layer.training = True
        try:
            yield
        finally:
            for layer in self._checkpointed:
                layer.training = False

    def _attention_mask(self, packed: PackedPrompts) -> Tensor | dict[str, Tensor]:
        """Return the mask added to scores, (1, 1, T, T); one for each kind of layer if several."""
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


def check_trainable(name_or_path: str, *, activation_checkpointing: bool = False) -> None:
    """Raise if a feature mapper can't be trained through a language model.

    Prompts are packed into one sequence, in which they must be independent of each other.

    Raises:
        ArtifactError: The model's configuration can't be loaded.
        ConfigurationError: Its layers are not plain attention, do not take positions from
            `position_ids`, or can't be recomputed in the backward pass.
    """
    config = load_model_config(name_or_path)
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


def _remove_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout to zero, since activation checkpointing puts layers in training mode."""
    text_config = config.get_text_config()
    for name, value in vars(text_config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(text_config, name, 0.0)
