"""Embeds surface forms with a frozen sentence encoder.

Shapes: B surface forms, E width of the mention encoder, T tokens.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, get_num_threads, set_num_threads  # vLLM replaces the attribute of `torch` on a CPU
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gemel_engine.checkpoint import (
    check_finite,
    check_whole,
    checkpoint_directory,
    copy_weights,
    load_model,
    tensor_names,
    weight_files,
)
from gemel_engine.errors import ArtifactError, ConfigurationError, not_loadable
from gemel_engine.retrieval.window import window
from gemel_engine.tokenizer import check_embedded, tokenizer_fingerprint
from gemel_engine.verbosity import bar_interval

TokenIds = tuple[int, ...]

_MAX_TOKENS = 512  # largest number of tokens of a surface form; the rest is cut off
_LEAST_FORMS_SHOWN = 2048  # more than a shard of a run has: its progress is that of the run
_TOKENS_PER_PASS = {"cpu": 256, "cuda": 16_384}  # enough to be limited by arithmetic alone


class MentionEncoder:
    """Embeds surface forms: the mean of a frozen encoder's token states, scaled to length 1.

    A surface form's embedding has the same bits in any batch. Forms with equal token counts go
    through the model together, without padding, and the number of forms in a pass depends on their
    token count alone: a pass with fewer is filled up with copies. On a CPU one thread computes each
    pass, and several passes run at once, so that the number of threads does not matter and no
    thread waits for another. The bits depend on the device.

    Args:
        name_or_path: Local directory, or name on the model hub; weights must be safetensors.
        device: torch device.
        tokens_per_pass: Number of tokens that one pass computes, at least those of one form; None:
            the device's default.

    Attributes:
        width: E, the width of an embedding.
        max_tokens: Number of tokens of a form that the model reads, special tokens included.
        fingerprint: SHA-256 over weights and tokenizer.

    Raises:
        ArtifactError: There is no such model, a file of it is damaged, it lacks tensors or has
            unknown ones, it does not encode text, or it lacks embeddings of its tokenizer's tokens.
        ConfigurationError: Its tokenizer has no fast implementation.
    """

    def __init__(self, name_or_path: str, device: str = "cpu", tokens_per_pass: int | None = None) -> None:
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
        self.fingerprint = _fingerprint(model, tokenizer_fingerprint(tokenizer))
        self._tokenizer = tokenizer
        self._model = model.eval().requires_grad_(False)
        self.max_tokens, self.width = self._measure(name_or_path)
        num_embeddings = model.get_input_embeddings().weight.shape[0]
        check_embedded(tokenizer, num_embeddings, name_or_path, added=tokenizer("")["input_ids"])
        self._model = model.to(device)
        self._tokens_per_pass = tokens_per_pass or _TOKENS_PER_PASS.get(torch.device(device).type, 256)

    def encode(self, surface_forms: Sequence[str]) -> NDArray[np.float32]:
        """Embed surface forms, equal ones once; text never becomes a special token.

        Returns:
            Embeddings (B, E), rows of length 1; a zero row for a form without tokens.
        """
        token_ids = self._token_ids(surface_forms)
        row_of = {ids: row for row, ids in enumerate(dict.fromkeys(token_ids.values()))}
        embeddings = np.zeros((len(row_of), self.width), np.float32)
        passes = list(self._passes(row_of))
        num_threads = get_num_threads()
        num_workers = num_threads if self._model.device.type == "cpu" else 1
        try:
            with (
                tqdm(
                    total=len(embeddings),
                    desc="embed surface forms",
                    unit=" forms",
                    delay=5,
                    mininterval=bar_interval(),
                    disable=len(embeddings) < _LEAST_FORMS_SHOWN,
                ) as progress,
                ThreadPoolExecutor(num_workers, initializer=set_num_threads, initargs=(1,)) as workers,
            ):
                for forms, embedded in zip(passes, workers.map(self._embed, passes), strict=True):
                    embeddings[[row_of[ids] for ids in forms]] = embedded
                    progress.update(len(forms))
        finally:
            set_num_threads(num_threads)  # else other new threads would start with the workers' number
        return embeddings[np.array([row_of[token_ids[form]] for form in surface_forms], dtype=np.intp)]

    def readable(self, text: str, start: int, end: int) -> str:
        """Return a text, or of one with too many tokens about as much around `text[start:end]` as the model reads."""
        if len(text) <= self.max_tokens:
            return text
        num_tokens = len(self._tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
        if num_tokens <= self.max_tokens:
            return text
        return window(text, start, end, len(text) * self.max_tokens // num_tokens)

    def _token_ids(self, surface_forms: Sequence[str]) -> dict[str, TokenIds]:
        """Return the token ids of each distinct form, special tokens included."""
        forms = list(dict.fromkeys(surface_forms))
        if not forms:
            return {}
        encoded = self._tokenizer(forms, split_special_tokens=True, truncation=True, max_length=self.max_tokens)
        return dict(zip(forms, map(tuple, encoded["input_ids"]), strict=True))

    def _passes(self, token_ids: Iterable[TokenIds]) -> Iterator[list[TokenIds]]:
        """Yield the forms of each pass, all of one length; the longest forms first."""
        forms_of_length = defaultdict(list)
        for ids in token_ids:
            forms_of_length[len(ids)].append(ids)
        forms_of_length.pop(0, None)
        for length, forms in sorted(forms_of_length.items(), reverse=True):
            size = self._forms_per_pass(length)
            for start in range(0, len(forms), size):
                yield forms[start : start + size]

    def _forms_per_pass(self, num_tokens: int) -> int:
        return max(1, self._tokens_per_pass // num_tokens)

    def _embed(self, forms: list[TokenIds]) -> NDArray[np.float32]:
        """Return the embeddings of a pass, (B, E)."""
        num_missing = self._forms_per_pass(len(forms[0])) - len(forms)
        hidden = self._hidden(torch.tensor(forms + forms[-1:] * num_missing))
        normalised = torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1)
        embeddings: NDArray[np.float32] = normalised[: len(forms)].cpu().numpy()
        return embeddings

    @torch.inference_mode()
    def _hidden(self, token_ids: Tensor) -> Tensor:
        """Return the last hidden states (B, T, E) of token ids (B, T)."""
        token_ids = token_ids.to(self._model.device)
        output = self._model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids))
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _measure(self, name: str) -> tuple[int, int]:
        """Return the number of tokens that the model reads, found by trying, and its output width.

        Configurations can't be trusted: some count positions reserved for padding, some give no
        limit.

        Raises:
            ArtifactError: The model reads no text.
        """
        longest = min(
            self._tokenizer.model_max_length,
            getattr(self._model.config, "max_position_embeddings", None) or _MAX_TOKENS,
            _MAX_TOKENS,
        )
        example = self._tokenizer("a", add_special_tokens=False)["input_ids"][:1] or [0]
        last_error: Exception | None = None
        widths = {}

        def fails(num_tokens: int) -> bool:
            nonlocal last_error
            try:
                widths[num_tokens] = self._hidden(torch.tensor([example * num_tokens])).shape[-1]
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                last_error = error
            return num_tokens not in widths

        limit = longest if not fails(longest) else bisect_left(range(1, longest), True, key=fails)
        if not limit:
            raise ArtifactError(
                f"{name} can't be used as a mention encoder ({last_error}): name a model that encodes text"
            ) from last_error
        return limit, widths[limit]


def _load_model(name_or_path: str) -> PreTrainedModel:
    """Load the text encoder of a checkpoint, which must contain all of its tensors.

    The checkpoint may be of another task: a head on top of the encoder is not used for embeddings
    and is left out, and so are a pooler without tensors and a decoder.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise not_loadable("mention encoder", name_or_path, error) from error
    auto_class = AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel
    model, loaded = load_model("mention encoder", auto_class, name_or_path, dtype=torch.float32, use_safetensors=True)
    pooler = getattr(model, "pooler", None)
    if pooler is not None and {*pooler.state_dict(prefix="pooler.")} <= loaded["missing_keys"]:
        model.register_module("pooler", None)
        loaded["missing_keys"] -= {*pooler.state_dict(prefix="pooler.")}
    names = tensor_names(weight_files(checkpoint_directory("mention encoder", name_or_path)))
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in names):
        loaded["unexpected_keys"] -= {name for name in names if not name.startswith(prefix)}
    if config.is_encoder_decoder:
        loaded["unexpected_keys"] -= {name for name in names if name.startswith(("decoder.", "lm_head."))}
    check_whole("mention encoder", name_or_path, loaded)
    encoder: PreTrainedModel = model.get_encoder() if config.is_encoder_decoder else model
    check_finite("mention encoder", name_or_path, encoder.state_dict())
    copy_weights(encoder)
    return encoder


def _fingerprint(model: torch.nn.Module, tokenizer: str) -> str:
    digest = hashlib.sha256(tokenizer.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
