"""Surface forms to embeddings, by a frozen sentence encoder.

Shapes: B surface forms, E width of the mention encoder, T tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from gemel_engine.checkpoint import (
    check_finite,
    check_whole,
    checkpoint_directory,
    copy_weights,
    load_model,
    tensor_names,
    weight_files,
)
from gemel_engine.errors import ConfigurationError, not_loadable
from gemel_engine.knowledge_base import tokenizer_fingerprint


class MentionEncoder:
    """Embeds surface forms with a frozen sentence encoder: the mean over its tokens, scaled to length one.

    A surface form's embedding does not depend on what else is in the batch: forms of equal token counts go together, in
    batches filled up to one size, so that every matrix product has the same shape whenever a form takes part in it.
    The bits do depend on that size, on the device and on the number of threads.

    Args:
        name_or_path: Local directory, or name on the model hub; weights must be safetensors.
        device: torch device.
        batch_size: Surface forms in one forward pass.

    Attributes:
        width: E.
        fingerprint: SHA-256 over weights and tokenizer.

    Raises:
        ArtifactError: There is no such model, a file of it is damaged, or it lacks tensors or has other ones.
        ConfigurationError: Its tokenizer has no fast implementation.
    """

    def __init__(self, name_or_path: str, device: str = "cpu", batch_size: int = 16) -> None:
        directory = checkpoint_directory("mention encoder", name_or_path)
        if os.path.isdir(name_or_path):  # one on the hub may not have been downloaded yet
            weight_files(directory)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        except Exception as error:  # the tokenizers' library raises nothing narrower for a damaged file
            raise not_loadable("mention encoder", name_or_path, error) from error
        model: Any = _load_model(name_or_path)  # transformers' types take `to` for another function
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigurationError(f"the tokenizer of {name_or_path!r} has no fast implementation, which is needed")
        self.width: int = model.config.hidden_size
        self.fingerprint = _fingerprint(model, tokenizer_fingerprint(tokenizer))
        self._tokenizer = tokenizer
        self._max_tokens = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        self._model = model.to(device).eval().requires_grad_(False)
        self._batch_size = batch_size

    def encode(self, surface_forms: Sequence[str]) -> NDArray[np.float32]:
        """Embed surface forms, each distinct one once; nothing in them becomes a special token.

        Returns:
            Shape (B, E), rows of length one; a zero row for a form without tokens.
        """
        row_of_form = {form: row for row, form in enumerate(dict.fromkeys(surface_forms))}
        embeddings = np.zeros((len(row_of_form), self.width), np.float32)
        with tqdm(total=len(embeddings), desc="embed surface forms", unit=" forms", delay=5) as progress:
            for rows, token_ids in self._batches(list(row_of_form)):
                filled = token_ids + token_ids[-1:] * (self._batch_size - len(token_ids))
                embeddings[rows] = self._embed(torch.tensor(filled))[: len(rows)]
                progress.update(len(rows))
        return embeddings[np.array([row_of_form[form] for form in surface_forms], dtype=np.intp)]

    def _batches(self, forms: list[str]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yield row numbers and token ids, of equal length within a batch."""
        if not forms:
            return
        token_ids = self._tokenizer(forms, split_special_tokens=True, truncation=True, max_length=self._max_tokens)
        rows_of_length = defaultdict(list)
        for row, ids in enumerate(token_ids["input_ids"]):
            rows_of_length[len(ids)].append(row)
        rows_of_length.pop(0, None)
        for rows in rows_of_length.values():
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                yield batch, [token_ids["input_ids"][row] for row in batch]

    @torch.inference_mode()
    def _embed(self, token_ids: torch.Tensor) -> NDArray[np.float32]:
        token_ids = token_ids.to(self._model.device)  # (B, T)
        hidden = self._model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).last_hidden_state
        embeddings: NDArray[np.float32] = torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1).cpu().numpy()
        return embeddings


def _load_model(name_or_path: str) -> PreTrainedModel:
    """Load an encoder all of whose tensors are in its checkpoint.

    The checkpoint may be of another task: a head on top of the encoder takes no part in embeddings and is left out, and
    so is a pooler without tensors.
    """
    model: PreTrainedModel
    model, loaded = load_model("mention encoder", AutoModel, name_or_path, dtype=torch.float32, use_safetensors=True)
    pooler = getattr(model, "pooler", None)
    if pooler is not None and {*pooler.state_dict(prefix="pooler.")} <= loaded["missing_keys"]:
        model.register_module("pooler", None)
        loaded["missing_keys"] -= {*pooler.state_dict(prefix="pooler.")}
    names = tensor_names(weight_files(checkpoint_directory("mention encoder", name_or_path)))
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in names):
        loaded["unexpected_keys"] -= {name for name in names if not name.startswith(prefix)}
    check_whole("mention encoder", name_or_path, loaded)
    check_finite("mention encoder", name_or_path, model.state_dict())
    copy_weights(model)
    return model


def _fingerprint(model: torch.nn.Module, tokenizer: str) -> str:
    digest = hashlib.sha256(tokenizer.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
