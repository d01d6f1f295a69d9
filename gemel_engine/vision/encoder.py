"""Encodes pictures as the pooled features of a frozen open_clip vision tower.

The feature mapper turns these features into visual prefixes.

Shapes: B batch, C vision width.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from gemel_engine.checkpoint import check_file, check_finite
from gemel_engine.errors import ArtifactError, ConfigurationError, ImageError, MentionError
from gemel_engine.types import Features
from gemel_engine.vision.decode import decode_image

Preprocess = Callable[[Image.Image], Tensor]

_REMEMBERED_PICTURES = 8192


class ImageEncoder:
    """A frozen open_clip vision tower without its projection, and its preprocessing.

    Args:
        name_or_path: A directory with ``open_clip_config.json`` and weights, or one of open_clip's
            model names.
        pretrained: Tag of the weights if `name_or_path` is a model name; None for a directory.
        device: torch device of the tower.
        dtype: Type in which the tower computes; features are always float32.

    Attributes:
        width: C, the width of the features.
        preprocess: Function from an RGB picture to the tower's input, (3, height, width).
        fingerprint: SHA-256 over configuration, preprocessing and weights of the tower, in
            hexadecimal. It depends on neither `device` nor `dtype`.

    Raises:
        ArtifactError: The directory or its files are missing or damaged.
        ConfigurationError: The model name, the tag or the kind of tower cannot be used.
    """

    def __init__(
        self,
        name_or_path: str,
        pretrained: str | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if pretrained is None:
            config, tower, self.preprocess = _load_directory(Path(name_or_path))
        else:
            config, tower, self.preprocess = _load_named(name_or_path, pretrained)
        check_finite("image encoder", name_or_path, tower.state_dict())
        self.fingerprint = _fingerprint(config, tower)
        _remove_projection(tower)
        self._device, self._dtype = torch.device(device), dtype
        self._tower = tower.eval().requires_grad_(False).to(self._device, dtype)
        self.width = self.encode([Image.new("RGB", (1, 1))]).shape[1]

    def encode(self, images: Iterable[Image.Image]) -> Features:
        """Compute the pooled features in front of the projection.

        Args:
            images: B RGB pictures, at least one; each is used before the next is requested.

        Returns:
            Features of shape (B, C), float32.
        """
        return self.encode_pixels([self.preprocess(image) for image in images])

    @torch.inference_mode()
    def encode_pixels(self, preprocessed: Sequence[Tensor]) -> Features:
        """Compute the features (B, C) of B pictures that `preprocess` has prepared."""
        pixels = torch.stack(list(preprocessed))  # (B, 3, height, width)
        # Channels last halve the time of a convolutional tower, and do not change that of a ViT.
        pixels = pixels.to(self._device, self._dtype, memory_format=torch.channels_last)
        features: Tensor = self._tower(pixels)  # (B, C)
        return features.float().cpu().numpy()


class PictureEncoder:
    """Encodes image files; an unusable file does not stop the others.

    Recent files are not encoded again, since the mentions of one caption share its picture.

    Args:
        encoder: The image encoder.
        max_pixels: Largest number of pixels of a picture.
        batch_size: Number of pictures that are encoded at once.

    Attributes:
        fingerprint: Fingerprint of the image encoder.
    """

    def __init__(self, encoder: ImageEncoder, max_pixels: int, batch_size: int) -> None:
        self.fingerprint = encoder.fingerprint
        self._encoder = encoder
        self._max_pixels = max_pixels
        self._batch_size = batch_size
        # By the digest of the file: features, or the message of an error, whose traceback would hold the file.
        self._known: OrderedDict[bytes, Features | str] = OrderedDict()

    def encode(self, pictures: Iterable[bytes | MentionError | None]) -> list[Features | MentionError | None]:
        """Return the image features (C,) of each of B files, or an error for an unusable file.

        Files are read one by one, and only one decoded picture is in memory at a time.

        Args:
            pictures: Image files; None and errors are returned as they are.
        """
        results: dict[bytes, Features | str] = {}
        waiting: dict[bytes, Tensor] = {}
        rows: list[bytes | MentionError | None] = []
        for picture in pictures:
            if not isinstance(picture, bytes):
                rows.append(picture)
                continue
            digest = hashlib.sha256(picture).digest()
            rows.append(digest)
            if digest in results or digest in waiting:
                continue
            if digest in self._known:
                results[digest] = self._known[digest]
                continue
            try:
                waiting[digest] = self._encoder.preprocess(decode_image(picture, self._max_pixels))
            except ImageError as error:
                results[digest] = error.args[0]
            if len(waiting) == self._batch_size:
                results |= self._encode(waiting)
                waiting = {}
        results |= self._encode(waiting)
        self._remember(results)
        return [_features_or_error(results[row]) if isinstance(row, bytes) else row for row in rows]

    def _encode(self, waiting: Mapping[bytes, Tensor]) -> dict[bytes, Features]:
        if not waiting:
            return {}
        return dict(zip(waiting, self._encoder.encode_pixels(list(waiting.values())), strict=True))

    def _remember(self, results: Mapping[bytes, Features | str]) -> None:
        for digest, result in results.items():
            self._known[digest] = result
            self._known.move_to_end(digest)
        while len(self._known) > _REMEMBERED_PICTURES:
            self._known.popitem(last=False)


def _features_or_error(result: Features | str) -> Features | ImageError:
    return ImageError(result) if isinstance(result, str) else result


def _load_directory(directory: Path) -> tuple[dict[str, Any], nn.Module, Preprocess]:
    """Load an open_clip model directory: configuration, vision tower and preprocessing."""
    config_file, weights_file = directory / "open_clip_config.json", directory / "open_clip_model.safetensors"
    # open_clip prefers safetensors, so requiring this file also means that no pickle is ever read.
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ArtifactError(
                f"{file} is missing; give a directory in open_clip's format, or a model name and the tag of its weights"
            )
        check_file(file)
    name = f"local-dir:{directory}"
    try:
        config = open_clip.get_model_config(name)
        model, preprocess = open_clip.create_model_from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{directory} is not a whole open_clip model ({error}); write it again") from error
    return config, model.visual, preprocess


def _load_named(name: str, pretrained: str) -> tuple[dict[str, Any], nn.Module, Preprocess]:
    """Load the same for a model name of open_clip; download weights that are not cached."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise ConfigurationError(f"open_clip has no model {name!r}; open_clip.list_models() names them")
    weights = open_clip.get_pretrained_cfg(name, pretrained)
    if not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ConfigurationError(f"open_clip has no weights {pretrained!r} for {name}; it has {tags}")
    if weights.get("quick_gelu", False) != config.get("quick_gelu", False):
        # open_clip only warns, and computes features that the weights were not trained for.
        twin = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise ConfigurationError(f"the weights {pretrained!r} need another activation than {name} has; use {twin!r}")
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"the weights {pretrained!r} of {name} cannot be loaded ({error}): see that they can be downloaded here"
        ) from error
    return config, model.visual, preprocess


def _fingerprint(config: dict[str, Any], tower: nn.Module) -> str:
    settings = [config["vision_cfg"], config.get("quick_gelu", False), tower.preprocess_cfg]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def _remove_projection(tower: nn.Module) -> None:
    if isinstance(tower, VisionTransformer):
        tower.proj = None
    elif isinstance(tower, TimmModel) and not hasattr(tower.head, "pool"):
        tower.trunk.reset_classifier(0)
        tower.head = nn.Identity()
    else:
        raise ConfigurationError(
            f"the projection of a {type(tower).__name__} cannot be told from its pooling; use a ViT or a timm tower "
            "that pools by itself"
        )
