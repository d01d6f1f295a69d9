"""Checks of a configuration: input, artifacts, models, and whether the output can be written."""

from __future__ import annotations

import os
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path

from gemel_engine import storage
from gemel_engine.config.components import ImagePolicy
from gemel_engine.config.finding import FindConfig
from gemel_engine.config.loading import load_config
from gemel_engine.config.machine import fast_dtype
from gemel_engine.config.settings import LinkConfig, TrainConfig
from gemel_engine.errors import GemelError, ImageFetchError, redacted, shown
from gemel_engine.fingerprints import read_manifest_at
from gemel_engine.survey.corpus import IMAGE_ENCODER, LANGUAGE_MODEL, MENTION_ENCODER, CorpusSurvey, survey_corpus
from gemel_engine.survey.machine import Check, Status, free_bytes, gpu_names, nearest_directory
from gemel_engine.vision.fetch import fetch_image

Config = LinkConfig | TrainConfig | FindConfig

# Their own modules load torch.
MANIFESTS = {
    "knowledge_base": "knowledge_base.json",
    "demonstrations": "index.json",
    "feature_mapper": "mapper.json",
    "calibration": "calibration.json",
    "previous": "_report.json",
}
_COMMANDS = {
    "knowledge_base": "build-kb",
    "demonstrations": "build-demonstrations",
    "feature_mapper": "train",
    "calibration": "calibrate",
    "previous": "link",
}
_CONFIG_FILES = ("config.json", "open_clip_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt")
_MIN_OUTPUT_BYTES = 1 << 30


def check_job(path: Path) -> Iterator[Check]:
    """Check a configuration of linking, training or finding mentions, and all that it names."""
    try:
        config = _read(path)
    except GemelError as error:
        yield Check(
            "configuration", Status.PROBLEM, str(error), "correct the file; `gemel link --help-all` lists the keys"
        )
        return
    yield Check("configuration", Status.OK, f"{path}: all keys are known")
    for name in ("input", "train", "dev"):
        if (uri := getattr(config, name, None)) is not None:
            finds = isinstance(config, FindConfig) or getattr(config, "find_mentions", False)
            yield from _corpus(name, uri, config, finds=finds)
    artifacts = {name: getattr(config, name, None) for name in MANIFESTS}
    if not isinstance(config, FindConfig):
        artifacts["feature_mapper"] = config.vision.feature_mapper
    for name, uri in artifacts.items():
        if uri is not None:
            yield _artifact(name, uri)
    for name, model in _models(config).items():
        if model is not None:
            yield _model(name, model)
    if isinstance(config, LinkConfig):
        yield from _device(config)
    yield _output(config.output)


def _read(path: Path) -> Config:
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8-sig")).keys()
    except (OSError, ValueError):
        keys = {}.keys()  # `load_config` says what is wrong
    if "train" in keys:
        return load_config(TrainConfig, path)
    return load_config(LinkConfig, path) if "language_model" in keys or not keys else load_config(FindConfig, path)


def _models(config: Config) -> dict[str, str | None]:
    """Return the models of a configuration; an architecture whose weights open_clip has is left out."""
    models = {} if isinstance(config, TrainConfig) else {"finder": config.finder.model}
    if isinstance(config, FindConfig):
        return models
    vision = config.vision
    return models | {
        "language model": config.language_model.name,
        "mention encoder": config.retrieval.mention_encoder,
        "image encoder": vision.image_encoder if vision.pretrained is None else None,
    }


def _corpus(name: str, uri: str, config: Config, *, finds: bool) -> Iterator[Check]:
    try:
        survey = survey_corpus(uri, config.columns.given())
    except (GemelError, OSError) as error:
        yield Check(name, Status.PROBLEM, _message(error), "give mentions or documents that can be read")
        return
    yield _rows(name, survey, finds=finds)
    if isinstance(config, FindConfig) or config.vision.image_encoder is None or survey.first_image is None:
        return
    yield _picture(survey.first_image, config.image_source)


def _picture(address: str, source: ImagePolicy) -> Check:
    """Read the first picture of a corpus, whose address may be refused or lead nowhere."""
    try:
        size = len(fetch_image(address, source))
    except ImageFetchError as error:
        remedy = "correct image_source.allowed_prefixes, where relative addresses begin, or the table"
        return Check("pictures", Status.PROBLEM, f"the first can't be read: {error}", remedy)
    return Check("pictures", Status.OK, f"the first, {shown(address)}, has {size:,} bytes")


def _rows(name: str, survey: CorpusSurvey, *, finds: bool) -> Check:
    found = f"{survey.num_rows:,} rows in {survey.num_files:,} file(s): {', '.join(survey.columns)}"
    if survey.missing:
        return Check(name, Status.PROBLEM, f"{found}; no {', '.join(survey.missing)}", "name them in [columns]")
    if survey.has_documents and not finds:
        return Check(name, Status.PROBLEM, found, "these are documents: set find_mentions = true to link them")
    if finds and not survey.has_documents:
        return Check(name, Status.PROBLEM, found, "these are mentions: leave out find_mentions, and `gemel link` them")
    return Check(name, Status.OK, found)


def _artifact(name: str, uri: str) -> Check:
    shown_name = name.replace("_", " ")
    try:
        read_manifest_at(f"{uri}/{MANIFESTS[name]}")
    except (GemelError, OSError) as error:
        remedy = f"make it by `gemel {_COMMANDS[name]}`, or correct the address"
        return Check(shown_name, Status.PROBLEM, _message(error), remedy)
    return Check(shown_name, Status.OK, uri)


def _model(name: str, model: str) -> Check:
    if model in (LANGUAGE_MODEL, MENTION_ENCODER, IMAGE_ENCODER):
        return Check(name, Status.PROBLEM, f"{model} is still to be filled in", "name a model, or its local directory")
    directory = Path(model)
    if directory.is_dir():
        files = [path.name for path in directory.iterdir()]
        if not set(_CONFIG_FILES) & set(files) or not any(file.endswith(_WEIGHTS) for file in files):
            return Check(name, Status.PROBLEM, f"{directory} has no configuration or no weights", "download it again")
        return Check(name, Status.OK, str(directory))
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return Check(name, Status.OK, f"{model}, in the model hub's cache")
    found = f"{model} is no directory here, and not in the model hub's cache"
    if constants.HF_HUB_OFFLINE:
        return Check(name, Status.PROBLEM, f"{found}; HF_HUB_OFFLINE is set", "download it, or correct the path")
    return Check(name, Status.WARNING, found, "the job downloads it if the hub has it; else correct the path")


def _device(config: LinkConfig) -> Iterator[Check]:
    num_gpus, has_gpus = config.resources.generation.num_gpus, bool(gpu_names())
    dtype = config.language_model.dtype
    if num_gpus and not has_gpus and not os.environ.get("RAY_ADDRESS"):
        remedy = "set it to 0 to compute on CPUs, or RAY_ADDRESS to a cluster with GPUs"
        yield Check(
            "device", Status.PROBLEM, f"resources.generation.num_gpus is {num_gpus:g}, and no GPU is here", remedy
        )
    elif not num_gpus and has_gpus:
        yield Check("device", Status.WARNING, "GPUs are here, but unused", "set resources.generation.num_gpus = 1")
    elif not num_gpus and dtype == "bfloat16" and fast_dtype() != "bfloat16":
        found = "the language model is in bfloat16, which this CPU computes up to a hundred times slower than float32"
        yield Check("device", Status.WARNING, found, 'set language_model.dtype = "float32"')
    else:
        yield Check(
            "device", Status.OK, f"the language model in {dtype} on {f'{num_gpus:g} GPUs' if num_gpus else 'CPUs'}"
        )


def _output(uri: str) -> Check:
    """Write a file in the output, create one exclusively, and remove both."""
    path = storage.local_path(uri)
    if path is not None and path.exists() and not path.is_dir():
        return Check("output", Status.PROBLEM, f"{path} is a file", "choose another output")
    place = f"{uri if path is None else nearest_directory(path)}/_doctor-{uuid.uuid4().hex}"
    try:
        try:
            storage.write_bytes(f"{place}/put", b"1")
            is_created = storage.create_exclusive(f"{place}/exclusive", b"1")
            is_replaced = storage.create_exclusive(f"{place}/exclusive", b"2")
            if not is_created or is_replaced or storage.read_bytes(f"{place}/exclusive") != b"1":
                raise OSError("the storage replaces a file that should only be created")
        finally:
            storage.remove_tree(place)
    except (GemelError, OSError) as error:
        remedy = "give an output where this user may write, create conditionally, read and remove files"
        return Check("output", Status.PROBLEM, _message(error), remedy)
    if path is not None and (free := free_bytes(path)) < _MIN_OUTPUT_BYTES:
        return Check("output", Status.WARNING, f"{path}: {free >> 20} MiB free", "free some, or choose another output")
    return Check("output", Status.OK, f"{uri} can be written to, once for each name")


def _message(error: Exception) -> str:
    return redacted(str(error))
