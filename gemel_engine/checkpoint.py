"""Checks of model checkpoints: files are readable, every tensor is present, all numbers are finite.

transformers initializes a missing tensor with random numbers, different ones at each start. Which
tensors a model needs is computed by transformers, which handles renamed, merged and tied tensors.
Only names and shapes are read for that, so it is cheap at any size and needs no memory for weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict
from transformers.utils import logging as transformers_logging
from transformers.utils.generic import ContextManagers
from transformers.utils.hub import cached_file

from gemel_engine.errors import ArtifactError, not_loadable
from gemel_engine.storage.local import open_regular

_READ = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors", ".bin", ".pt"})
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt"})
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_POINTER = b"version https://git-lfs.github.com/spec/"
_NUM_NAMED = 5
_META = torch.device("meta")


def checkpoint_directory(what: str, name_or_path: str) -> Path:
    """Return the local directory of a model's files; a model of the hub must have been downloaded.

    Args:
        what: Kind of model, for messages.
        name_or_path: Local directory, or name on the model hub.

    Raises:
        ArtifactError: The model does not exist, or `check_files` rejects one of its files.
    """
    check_files(name_or_path)
    try:
        return Path(str(cached_file(name_or_path, "config.json"))).parent
    except OSError as error:
        raise not_loadable(what, name_or_path, error) from error


def check_files(name_or_path: str) -> None:
    """Raise unless the files of a local model directory are regular files and not git-lfs pointers.

    A name on the model hub passes. Weight files may be pointers here; `weight_files` checks those
    that are loaded.

    Raises:
        ArtifactError: A file is not a regular file, or is a pointer.
    """
    directory = Path(name_or_path)
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        if path.suffix in _READ and path.exists() and not path.is_dir():
            check_file(path, may_be_pointer=path.suffix in _WEIGHTS)


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files that transformers would load: a single file, or those in an index.

    Raises:
        ArtifactError: There is no weight file, one is missing, not a regular file or a git-lfs
            pointer, or the index names a file outside of the directory.
    """
    for whole in _WHOLE:
        index = directory / f"{whole}.index.json"
        if (directory / whole).exists():
            files = [directory / whole]
        elif index.exists():
            files = _indexed_files(index)
        else:
            continue
        for path in files:
            check_file(path)
        return files
    raise ArtifactError(f"{directory} holds no weights, neither {' nor '.join(_WHOLE)}: download the model again")


def check_only_weights(directory: Path, files: Collection[Path]) -> None:
    """Raise if vLLM would load other safetensors files than transformers.

    vLLM loads every safetensors file of the directory, or those in the index if there is one.

    Raises:
        ArtifactError: The two would load different files.
    """
    read = {*directory.glob("*.safetensors")}
    index = directory / f"{_WHOLE[0]}.index.json"
    if index.exists():
        read &= {*_indexed_files(index)}
    if read and read != {*files}:
        others = ", ".join(sorted(path.name for path in read ^ {*files}))
        raise ArtifactError(
            f"{directory} holds more weights than one model has, and engines would read different ones: remove {others}"
        )


def tensor_names(files: Collection[Path]) -> set[str]:
    """Return the names of all tensors in the files of a checkpoint."""
    return {name for path in files for name in _shapes(path)}


def check_tensors(
    what: str, directory: Path, files: Collection[Path], architecture: type[PreTrainedModel], config: PreTrainedConfig
) -> None:
    """Raise unless a checkpoint contains exactly the tensors of a model; their values are not read.

    Args:
        what: Kind of model, for messages.
        directory: Directory of the checkpoint, for messages.
        files: Result of `weight_files` for the directory.
        architecture: Class of the model.
        config: Configuration of the model.

    Raises:
        ArtifactError: A tensor is missing, unexpected or of another shape, a file is damaged, or
            no model can be built from the configuration.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= _shapes(path)
    showed_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with ContextManagers(architecture.get_init_context(torch.float32, False, False, False)):
            model = architecture(copy.deepcopy(config))
        conversions: list[Any] = get_model_conversion_mapping(model)
        settings = LoadStateDictConfig(device_map={"": _META}, weight_mapping=conversions)
        found, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(found)
    except Exception as error:  # an arbitrary configuration can raise anything
        raise ArtifactError(
            f"{directory} describes no {what} that can be made ({error}): download the model again"
        ) from error
    finally:
        if showed_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    check_whole(what, directory, found.to_dict())


def load_model(what: str, auto_class: Any, name_or_path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model with an auto class of transformers; return it and its loading info.

    The loading info is the `loaded` argument of `check_whole`.

    Raises:
        ArtifactError: The model cannot be loaded.
    """
    try:
        model, loaded = auto_class.from_pretrained(
            name_or_path, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # an arbitrary directory can raise anything
        raise not_loadable(what, name_or_path, error) from error
    return model, loaded


def check_whole(what: str, name_or_path: object, loaded: Mapping[str, Any]) -> None:
    """Raise unless a model was loaded with exactly its tensors.

    Args:
        what: Kind of model, for messages.
        name_or_path: Name or path of the model, for messages.
        loaded: Loading info that transformers returns with `output_loading_info=True`.

    Raises:
        ArtifactError: A tensor is missing, unexpected or of another shape.
    """
    mismatched = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in loaded["mismatched_keys"]]
    faults = {
        "lacks the tensors": sorted(loaded["missing_keys"]),
        "has the unexpected tensors": sorted(loaded["unexpected_keys"]),
        "has tensors of another shape:": sorted(mismatched),
    }
    named = [f"{fault} {_some(names)}" for fault, names in faults.items() if names]
    if named:
        raise ArtifactError(
            f"the {what} {name_or_path} {', '.join(named)}: its weights are not those of its config.json; download it "
            "again"
        )


def check_finite(what: str, name_or_path: object, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all numbers of a model are finite.

    Raises:
        ArtifactError: A tensor contains a number that is not finite.
    """
    damaged = sorted(name for name, tensor in tensors.items() if not _is_finite(tensor))
    if damaged:
        raise ArtifactError(
            f"the {what} {name_or_path} has numbers that are not finite in {_some(damaged)}: download it again"
        )


def check_finite_files(what: str, directory: Path, files: Collection[Path]) -> None:
    """Raise unless all numbers in the files of a checkpoint are finite.

    Safetensors files are read one tensor at a time.

    Raises:
        ArtifactError: A tensor contains a number that is not finite.
    """
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    check_finite(what, directory, {name: file.get_tensor(name)})
        else:
            check_finite(what, directory, load_state_dict(path))


def copy_weights(model: nn.Module) -> None:
    """Copy memory-mapped weights: a later write to their file cannot change or crash the model."""
    for tensor in [*model.parameters(), *model.buffers()]:  # each once, tied ones too
        tensor.data = tensor.data.clone()


def _indexed_files(index: Path) -> list[Path]:
    try:
        with open_regular(index) as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        if not names or any(Path(name).name != name or name in ("", "..") for name in names):
            raise ValueError("it must list names of files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{index} is no index of weights ({error!r}): download the model again") from error
    return [index.parent / name for name in names]


def check_file(path: Path, *, may_be_pointer: bool = False) -> None:
    """Raise unless a file of a model is a regular file and, by default, not a git-lfs pointer.

    Raises:
        ArtifactError: The file is missing, not a regular file, or a pointer that is not allowed.
    """
    try:
        with open_regular(path) as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise ArtifactError(f"{path} of the model cannot be read ({error}): download the model again") from error
    if is_pointer and not may_be_pointer:
        raise ArtifactError(f"{path} is a pointer of git-lfs and not the file: run `git lfs pull` in its directory")


def _shapes(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file on the device "meta": names, shapes and types."""
    try:
        tensors = load_state_dict(path, map_location="meta")
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("it holds more than tensors")
    except Exception as error:  # an arbitrary file can raise anything; no code of it is run
        raise ArtifactError(f"{path} is damaged or holds more than tensors ({error}): download it again") from error
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, in one pass without a second tensor of the same size.

    Minimum and maximum are NaN if any number is. Types of less than two bytes are not checked.
    """
    if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
