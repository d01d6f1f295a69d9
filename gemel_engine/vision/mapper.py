"""The trained part of the model, from image features to a visual prefix, and its directory on disk.

It loads neither the vision encoder nor the language model; their fingerprints are stored with the
weights, so that a mapper that was trained with other models can be rejected.

Shapes: B batch, C vision width, P prefix length, D language-model width, N pictures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from gemel_engine.config.bounds import Width
from gemel_engine.config.components import FeatureScaling
from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.storage.local import open_regular
from gemel_engine.storage.manifest import MAPPER_MANIFEST, claimed, parse_manifest, read_manifest, write_manifest

FORMAT_VERSION = 3
_WITHOUT_CHECKSUM = 2
_WEIGHTS = "mapper.safetensors"
MANIFEST = MAPPER_MANIFEST
_CHECKSUM = "weights_sha256"
_MAX_HEADER_BYTES = 1 << 20
_PICTURES_PER_BATCH = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class MapperMetadata:
    """Describes a mapper's weights; stored beside them as JSON.

    Attributes:
        vision_width: C, the width of the image features.
        prefix_length: P, the number of embeddings of one picture.
        language_model_width: D, the width of the language model's input embeddings.
        language_model_fingerprint: Fingerprint of the language model it was made for; None for any
            model of width D.
        image_encoder_fingerprint: Fingerprint of the image encoder it was made for; None for any
            encoder of width C.
        scaling: Scaling of image features: `none`; `z_score`, each feature to mean 0 and deviation
            1 over the training pictures; `z_score_norm`, then also every picture's features to the
            norm √C.
        initialisation: How the weights were set before training.
        trained: Whether gradient steps were taken.
        seed: Seed of the random start; None if there was none.
        details: Free remarks about the training run, such as its number of steps.
    """

    vision_width: Width
    prefix_length: Width
    language_model_width: Width
    language_model_fingerprint: str | None = None
    image_encoder_fingerprint: str | None = None
    scaling: FeatureScaling = "none"
    initialisation: Literal["random", "ridge", "imported"] = "random"
    trained: bool = False
    seed: int | None = None
    details: dict[str, str | float | int] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """`trained`, or else the initialisation."""
        return "trained" if self.trained else self.initialisation


class FeatureMapper(nn.Module):
    """One linear layer from image features, scaled or not, to P embeddings (GEMEL, section 3.2).

    Attributes:
        metadata: Description of the weights. Replace it (`dataclasses.replace`) when it no longer
            holds, as training does.
        feature_mean: Buffer of shape (C,), zero unless `fit_scaling` was called.
        feature_std: Buffer of shape (C,), one unless `fit_scaling` was called.
        linear: Weight of shape (P * D, C), row p * D + d; bias of shape (P * D,).
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, metadata: MapperMetadata) -> None:
        super().__init__()
        self.metadata = metadata
        self.linear = nn.Linear(metadata.vision_width, metadata.prefix_length * metadata.language_model_width)
        self.register_buffer("feature_mean", torch.zeros(metadata.vision_width))
        self.register_buffer("feature_std", torch.ones(metadata.vision_width))

    @classmethod
    def random(
        cls,
        vision_width: int,
        prefix_length: int,
        language_model_width: int,
        seed: int,
        *,
        scaling: FeatureScaling = "none",
        language_model_fingerprint: str | None = None,
        image_encoder_fingerprint: str | None = None,
    ) -> Self:
        """Return a mapper with PyTorch's default initialisation; keep the global random state."""
        metadata = MapperMetadata(
            vision_width=vision_width,
            prefix_length=prefix_length,
            language_model_width=language_model_width,
            language_model_fingerprint=language_model_fingerprint,
            image_encoder_fingerprint=image_encoder_fingerprint,
            scaling=scaling,
            seed=seed,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(metadata)

    def forward(self, features: Tensor) -> Tensor:
        """Map image features (B, C) to visual prefixes (B, P, D), in the mapper's dtype."""
        prefixes: Tensor = self.linear(self.scaled(features))  # (B, P * D)
        return prefixes.reshape(-1, self.metadata.prefix_length, self.metadata.language_model_width)

    def scaled(self, features: Tensor) -> Tensor:
        """Return image features (B, C) as the linear layer receives them."""
        scaled = (features.to(self.feature_mean) - self.feature_mean) / self.feature_std
        if self.metadata.scaling == "z_score_norm":
            scaled = nn.functional.normalize(scaled, dim=-1) * math.sqrt(self.metadata.vision_width)
        return scaled

    def fit_scaling(self, features: Tensor) -> None:
        """Fit the scaling to the training pictures (N, C); a constant feature is only centred."""
        if self.metadata.scaling == "none":
            return
        std, mean = torch.std_mean(features.to(self.feature_mean), dim=0, correction=0)
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(torch.where(std > 0, std, 1.0))

    @torch.no_grad()
    def fit_ridge(self, features: Tensor, embeddings: Iterable[Tensor], penalty: float, gain: float = 1.0) -> None:
        """Fit the linear layer in closed form, by ridge regression from pictures to embeddings.

        Args:
            features: Image features of the training pictures, (N, C).
            embeddings: Target visual prefixes, the embeddings of the pictures' names, in the same
                order and in batches of any size, each (B, P, D).
            penalty: Term added to the variance of each feature, in units of the mean variance.
            gain: Factor on deviations from the mean embedding, which a regression shrinks.

        Raises:
            InputError: All pictures have the same features.
        """
        count, width = len(features), self.linear.out_features
        sums = [self.scaled(part).double().sum(dim=0) for part in torch.split(features, _PICTURES_PER_BATCH)]
        input_mean = torch.stack(sums).sum(dim=0) / count
        target_sum = torch.zeros(width, dtype=torch.float64)
        covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)  # (C, C)
        with_targets = torch.zeros(features.shape[1], width, dtype=torch.float64)  # (C, P * D)
        start = 0
        for batch in embeddings:
            inputs = self.scaled(features[start : start + len(batch)]).double() - input_mean
            targets = batch.flatten(1).double()
            target_sum += targets.sum(dim=0)
            covariance.addmm_(inputs.T, inputs, alpha=1 / count)
            with_targets.addmm_(inputs.T, targets, alpha=1 / count)
            start += len(batch)
        variance = covariance.diagonal().mean()
        if not variance:
            raise InputError(f"the {count} training pictures have the same features: there is nothing to regress on")
        covariance.diagonal().add_(penalty * variance)
        weight = gain * torch.linalg.solve(covariance, with_targets).T  # (P * D, C)
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(target_sum / count - weight @ input_mean)
        self.metadata = replace(self.metadata, initialisation="ridge", seed=None)

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `mapper.safetensors`, then `mapper.json`: a directory with the second is complete.

        The linear layer is written in `dtype`, the scaling in float32: a mean may be many
        deviations away from zero.

        Raises:
            ConfigurationError: Another command is writing there.
        """
        directory = Path(directory)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items() if name.startswith("linear.")}
        weights = save(tensors)
        with claimed(directory, must_be_empty=False):
            (directory / MANIFEST).unlink(missing_ok=True)
            (directory / _WEIGHTS).write_bytes(weights)
            checksum = {_CHECKSUM: sha256(weights).hexdigest()}
            write_manifest(directory / MANIFEST, FORMAT_VERSION, asdict(self.metadata) | checksum)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Load a mapper as float32 on the CPU; later changes of its files do not affect it.

        Raises:
            ArtifactError: A file is missing or damaged, or has another format version; or the
                weights differ from `mapper.json` in shapes or checksum, have another type, are not
                finite, or contain a deviation that is not positive.
        """
        directory = Path(directory)
        metadata, checksum = _read_metadata(directory / MANIFEST)
        with torch.device("meta"):  # shapes without memory: the metadata is not trusted yet
            mapper = cls(metadata)
        path = directory / _WEIGHTS
        limit = 4 * sum(tensor.numel() for tensor in mapper.state_dict().values()) + _MAX_HEADER_BYTES
        try:
            with open_regular(path) as file:
                if os.fstat(file.fileno()).st_size > limit:
                    raise ArtifactError(f"{path} is larger than what {MANIFEST} asks for; save the mapper again")
                data = file.read()
            weights = load(data)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); save the feature mapper again") from error
        expected = {name: tuple(tensor.shape) for name, tensor in mapper.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if found != expected:
            raise ArtifactError(f"{path} holds {found}, but {MANIFEST} asks for {expected}; save the mapper again")
        for name, tensor in weights.items():
            if tensor.dtype not in _DTYPES:
                raise ArtifactError(f"{path}: {name} is of {tensor.dtype}, not floating-point; save the mapper again")
            if not torch.isfinite(tensor).all():
                raise ArtifactError(f"{path}: {name} has values that are not finite; go back to an earlier checkpoint")
        if not (weights["feature_std"] > 0).all():
            raise ArtifactError(f"{path}: feature_std must be positive; fit the scaling again")
        if sha256(data).hexdigest() != checksum:
            raise ArtifactError(f"{path} has another checksum than {MANIFEST} gives; save the feature mapper again")
        mapper.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
        return mapper


def _read_metadata(path: Path) -> tuple[MapperMetadata, str | None]:
    """Return the metadata in a file, and the checksum of the weights."""
    contents = read_manifest(path, FORMAT_VERSION, without_checksum=_WITHOUT_CHECKSUM)
    checksum = contents.pop(_CHECKSUM, None)
    return parse_manifest(contents, MapperMetadata, path), checksum
