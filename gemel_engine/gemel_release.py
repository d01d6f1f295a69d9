"""Read files that GEMEL's authors released: mapper checkpoints, and mentions with CLIP features.

    train.json, dev.json, test.json   one JSON object per line: `mention`, `text`, `target` (name of
                                      the entity), `golden` (its id, or NIL), and the picture as
                                      `img_name` or `img_url`
    clip_vit_large_patch14_1024.hdf5  array of 1,024 numbers per picture, by name or address
    *.pkl                             state dict of the linear layer: `weight` (P * D, C) and
                                      `bias` (P * D,)

The files are untrusted: only tensors are unpickled from a checkpoint.

C vision width, P prefix length, D language-model width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.extras import extra
from gemel_engine.storage.local import open_regular
from gemel_engine.types import Features, are_features
from gemel_engine.vision.mapper import FeatureMapper, MapperMetadata

with extra("import"):
    import h5py

_KEYS = ("mention", "text", "target", "golden")
_PICTURE_KEYS = ("img_name", "img_url")
_NIL = "NIL"
_MAX_WIDTH = 1 << 20
_SCHEMA = pa.schema(
    [
        pa.field("mention_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("mention", pa.string(), nullable=False),
        pa.field("entity_id", pa.string(), nullable=False),
        pa.field("entity_name", pa.string(), nullable=False),
        pa.field("image_features", pa.list_(pa.float32())),
    ]
)


def import_mapper(checkpoint: Path, language_model_width: int) -> FeatureMapper:
    """Read a released feature mapper.

    Args:
        checkpoint: File with the pickled state dict.
        language_model_width: D, from which P follows.

    Raises:
        ArtifactError: The file can't be read, contains anything but the weight and bias of a linear
            layer, or its shapes do not fit D.
    """
    try:
        with open_regular(checkpoint) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArtifactError(f"{checkpoint} can't be read: {error.strerror}") from error
    except Exception as error:  # a malformed file can raise anything
        # PyTorch's message is left out: it advises to unpickle everything.
        raise ArtifactError(f"{checkpoint} is damaged, or holds more than tensors; nothing of it was run") from error
    if not isinstance(state, dict) or set(state) != {"weight", "bias"}:
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ArtifactError(f"{checkpoint} holds {found}, not the weight and bias of a linear layer")
    weight, bias = state["weight"], state["bias"]
    if not (_is_plain(weight) and _is_plain(bias)):
        raise ArtifactError(f"{checkpoint} holds a weight or bias that is no tensor of finite numbers")
    if (
        not weight.numel()
        or weight.ndim != 2
        or bias.shape != weight.shape[:1]
        or weight.shape[0] % language_model_width
    ):
        raise ArtifactError(
            f"{checkpoint} has a weight {tuple(weight.shape)} and a bias {tuple(bias.shape)}, which make no prefix of "
            f"embeddings of width {language_model_width}: name the language model that it was trained for"
        )
    mapper = FeatureMapper(
        MapperMetadata(
            vision_width=weight.shape[1],
            prefix_length=weight.shape[0] // language_model_width,
            language_model_width=language_model_width,
            initialisation="imported",
            trained=True,
        )
    )
    mapper.linear.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return mapper


def _is_plain(tensor: object) -> bool:
    """Return whether this is a dense tensor of finite numbers.

    It must be contiguous, because a stride of 0 would turn one stored number into terabytes.
    """
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and bool(torch.isfinite(tensor).all())
    )


def import_mentions(path: Path, features: Path | None) -> tuple[pa.Table, int]:
    """Read a split without its NIL mentions, which the authors leave out too.

    Args:
        path: File of JSON lines.
        features: HDF5 file of image features; None for text alone.

    Returns:
        Mentions with `entity_id`, `entity_name` and `image_features`, and the number of mentions
        left out. A `mention_id` consists of the file's name and the line number.

    Raises:
        InputError: A line is malformed, or a picture has no features; the message names the line.
    """
    with ExitStack() as files:
        pictures = None if features is None else files.enter_context(_open_features(features))
        return _table(_rows(path, pictures))


def entities_of(mentions: pa.Table) -> pa.Table:
    """Return the entities of mentions, as a table that `gemel build-kb` reads."""
    names = dict(zip(mentions["entity_id"].to_pylist(), mentions["entity_name"].to_pylist(), strict=True))
    return pa.table({"entity_id": list(names), "name": list(names.values())}).sort_by("entity_id")


def _table(rows: Iterator[dict[str, object] | None]) -> tuple[pa.Table, int]:
    kept, num_left_out = [], 0
    for row in rows:
        if row is None:
            num_left_out += 1
        else:
            kept.append(row)
    return pa.Table.from_pylist(kept, schema=_SCHEMA), num_left_out


def _open_features(path: Path) -> h5py.File:
    try:
        open_regular(path).close()
        return h5py.File(path)
    except OSError as error:
        raise InputError(f"{path} is no readable HDF5 file ({error}); download it again") from error


def _rows(path: Path, pictures: h5py.File | None) -> Iterator[dict[str, object] | None]:
    """Yield a row for each line; None for a NIL mention."""
    try:
        lines = open_regular(path)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error}") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                fields = json.loads(line)  # UnicodeDecodeError is a ValueError
                mention, text, target, golden = (fields[key] for key in _KEYS)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(f"{where} is no JSON object with {', '.join(_KEYS)}: {error!r}") from error
            picture = next((fields[key] for key in _PICTURE_KEYS if fields.get(key)), None)
            if not all(map(_is_text, (mention, text, target, golden, picture or ""))):
                raise InputError(f"{where}: {', '.join((*_KEYS, *_PICTURE_KEYS))} must be strings; correct the line")
            if golden == _NIL:
                yield None
                continue
            yield {
                "mention_id": f"{path.stem}-{number:06d}",
                "text": text,
                "mention": mention,
                "entity_id": golden,
                "entity_name": target,
                "image_features": None if pictures is None or picture is None else _features(pictures, picture, where),
            }


def _is_text(value: object) -> bool:
    """Return whether this is a string without lone surrogates, which JSON allows."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _features(pictures: h5py.File, name: str, where: str) -> Features:
    # An external link would read another file.
    linked = isinstance(pictures.get(name, getlink=True, default=None), h5py.ExternalLink)
    item = None if linked else pictures.get(name)
    if not isinstance(item, h5py.Dataset) or item.file.filename != pictures.filename:
        raise InputError(f"{where}: {pictures.filename} has no features of {name!r}; use the file made for this corpus")
    # So would external and virtual datasets; and terabytes of equal numbers take no room in a file.
    if item.external or item.is_virtual or item.dtype.kind != "f" or not 0 < (item.size or 0) <= _MAX_WIDTH:
        raise InputError(f"{where}: the features of {name!r} are no array of up to {_MAX_WIDTH} numbers; extract them")
    try:
        stored = item[()]
    except OSError as error:
        raise InputError(
            f"{where}: the features of {name!r} can't be read ({error}); download the file again"
        ) from error
    with np.errstate(over="ignore"):
        features = np.asarray(stored, np.float32).ravel()
    if not are_features(features, len(features)):
        raise InputError(f"{where}: the features of {name!r} are not finite; extract them again")
    return features
