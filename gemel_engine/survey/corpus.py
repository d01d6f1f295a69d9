"""Looks at a corpus and writes the configuration that links it, as far as it can be known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine.config.addresses import HTTP, canonical_address, local_path
from gemel_engine.display import visible
from gemel_engine.errors import ConfigurationError, InputError, shown
from gemel_engine.storage import parquet
from gemel_engine.types import MENTION_COLUMNS, mention_columns
from gemel_engine.vision.archive import split_address
from gemel_engine.vision.fetch import is_relative

_DOCUMENT_ID = "document_id"
_COLUMNS = {**MENTION_COLUMNS, _DOCUMENT_ID: MENTION_COLUMNS["group"]}
_KNOWLEDGE_BASE = "kb"
_SAMPLE_ROWS = 1000
_REQUIRED = {True: (_DOCUMENT_ID, "text"), False: ("mention_id", "text", "mention")}
# Usual names of columns, for a corpus that lacks the engine's own.
_USUAL_NAMES = {
    "mention_id": ("id", "key", "uid"),
    _DOCUMENT_ID: ("doc_id", "id", "key", "uid"),
    "text": ("caption", "sentence", "content", "body", "title"),
    "mention": ("surface_form", "surface", "form", "entity_mention"),
    "image_uri": ("image", "image_url", "image_path", "image_file", "photo", "picture", "file_name", "img"),
    "entity_id": ("wikidata_id", "wikidata", "gold"),
}
MISSING = "MISSING"
# Names that a configuration has until they are filled in.
LANGUAGE_MODEL, MENTION_ENCODER, IMAGE_ENCODER = "LANGUAGE_MODEL", "MENTION_ENCODER", "IMAGE_ENCODER"


@dataclass(frozen=True, slots=True)
class CorpusSurvey:
    """What a corpus has.

    Attributes:
        uri: Absolute address.
        num_files: Number of files.
        num_rows: Number of rows.
        columns: Names of the columns that all files have, as they are stored.
        stored_names: The corpus' names of columns that have another name there.
        has_documents: Whether rows are documents, whose mentions are to be found, and not mentions.
        missing: Required columns that a file lacks.
        num_sampled: Number of rows in the sample, the first ones.
        num_labelled: Number of sampled rows with an `entity_id`.
        num_pictures: Number of sampled rows with a picture, by the column that has it.
        num_features: Width of the first image features; None without any.
        image_prefixes: Places of the sampled image addresses.
        first_image: First sampled image address; None without any.
        median_characters: Median length of the sampled texts; None without any.
    """

    uri: str
    num_files: int
    num_rows: int
    columns: tuple[str, ...]
    stored_names: dict[str, str]
    has_documents: bool
    missing: tuple[str, ...]
    num_sampled: int
    num_labelled: int
    num_pictures: dict[str, int]
    num_features: int | None
    image_prefixes: tuple[str, ...]
    first_image: str | None
    median_characters: int | None

    @property
    def has_pictures(self) -> bool:
        """Whether the corpus has pictures that an image encoder reads."""
        return bool(self.num_pictures.keys() & {"image_bytes", "image_uri"})


def usual_columns(uri: str) -> dict[str, str]:
    """Guess which columns of a corpus have another name there; return them by the engine's own.

    Raises:
        InputError: The corpus is unreadable.
    """
    table = next(parquet.open_tables(uri, {}))
    stored = {field.name.lower(): field for field in table.stored_schema if not pa.types.is_binary(field.type)}
    found = {}
    for own, usual in _USUAL_NAMES.items():
        fitting = [stored[name].name for name in usual if name in stored and _COLUMNS[own].takes(stored[name].type)]
        if fitting and own not in table.names:
            found[own] = fitting[0]
    known = {*table.names, *found}
    has_documents = "mention" not in known and "mention_id" not in table.names and {_DOCUMENT_ID, "text"} <= known
    found.pop("mention_id" if has_documents else _DOCUMENT_ID, None)
    return found


def survey_corpus(uri: str, stored_names: Mapping[str, str] | None = None) -> CorpusSurvey:
    """Read the footers of a corpus and its first rows.

    Args:
        uri: Address of the corpus.
        stored_names: The corpus' names of columns that have another name there.

    Raises:
        InputError: The corpus is unreadable, or its rows are entities.
    """
    num_files = num_rows = 0
    columns: list[str] = []
    sample: pa.Table | None = None
    names = dict(stored_names or {})
    for table in parquet.open_tables(uri, mention_columns(names, columns=_COLUMNS)):
        columns = list(table.names) if not num_files else [name for name in columns if name in table.names]
        num_files, num_rows = num_files + 1, num_rows + table.num_rows
        if sample is None and table.num_rows:
            sample = table.read(list(_COLUMNS), range(min(_SAMPLE_ROWS, table.num_rows)))
    if sample is None:
        raise InputError(f"{shown(uri)} has no rows")
    if "name" in columns and not {"text", "mention", _DOCUMENT_ID} & set(columns):
        raise InputError(
            f"{shown(uri)} looks like a table of entities, with the columns {', '.join(columns)}: build a knowledge "
            "base of it with `gemel build-kb`, and give mentions or documents here"
        )
    has_documents = _DOCUMENT_ID in columns and "mention" not in columns
    path = local_path(uri)
    return CorpusSurvey(
        uri=uri if path is None else str(path),
        num_files=num_files,
        num_rows=num_rows,
        columns=tuple(names.get(name, name) for name in columns),
        stored_names=names,
        has_documents=has_documents,
        missing=tuple(name for name in _REQUIRED[has_documents] if name not in columns),
        num_sampled=len(sample),
        num_labelled=_count(sample, "entity_id"),
        num_pictures={
            name: count for name in ("image_bytes", "image_uri", "image_features") if (count := _count(sample, name))
        },
        num_features=_width(sample),
        image_prefixes=tuple(dict.fromkeys((*_start_of_relative(sample, uri), *sorted(set(_prefixes(sample)))))),
        first_image=next(iter(_image_addresses(sample)), None),
        median_characters=_median_characters(sample),
    )


def configuration(survey: CorpusSurvey, dtype: str) -> str:
    """Return a commented `link.toml`; what has to be filled in is marked as `MISSING`.

    Args:
        survey: What the corpus has.
        dtype: Data type in which this machine computes fast.
    """
    return "\n".join((*_findings(survey), "", *_settings(survey, dtype), *_vision(survey), *_images(survey), ""))


def _findings(survey: CorpusSurvey) -> Iterator[str]:
    rows = "documents" if survey.has_documents else "mentions"
    yield "# Written by `gemel init`. Fill in what is marked MISSING; `gemel doctor` checks the result."
    yield "#"
    yield f"# Found: {survey.num_rows:,} {rows} in {survey.num_files:,} file(s), with the columns"
    yield f"# {visible(', '.join(survey.columns))}."
    if survey.missing:
        remedy = "Say below in [columns] which columns have it, or add them"
        yield f"# {MISSING} in the corpus: {_quoted(survey.missing)}. {remedy}."
    if survey.median_characters is not None:
        yield f"# Texts have {survey.median_characters:,} characters in the median."
    of_sample = f"of the first {survey.num_sampled:,} rows"
    pictures = [f"{count:,} {of_sample} in {name}" for name, count in survey.num_pictures.items()]
    yield f"# Pictures: {', '.join(pictures)}." if pictures else "# Pictures: none."
    if survey.num_labelled:
        yield f"# Gold labels: {survey.num_labelled:,} {of_sample}. Judge the run with `gemel evaluate OUTPUT`."
    else:
        yield "# Gold labels: none. Label some rows to judge the run with `gemel evaluate OUTPUT --gold LABELS`."


def _settings(survey: CorpusSurvey, dtype: str) -> Iterator[str]:
    yield f"input = {json.dumps(survey.uri, ensure_ascii=False)}"
    yield 'output = "linked"'
    if survey.has_documents:
        yield "find_mentions = true  # the rows are documents; `gemel find-mentions` does this alone"
    encoder = f"--mention-encoder {MENTION_ENCODER}"
    if not (Path(_KNOWLEDGE_BASE) / "knowledge_base.json").exists():
        pictures = f" --image-encoder {IMAGE_ENCODER}" if survey.has_pictures else ""
        command = f"gemel build-kb ENTITIES {_KNOWLEDGE_BASE} --tokenizer {LANGUAGE_MODEL} {encoder}{pictures}"
        yield f"# {MISSING}: {command}"
    yield f'knowledge_base = "{_KNOWLEDGE_BASE}"'
    yield f"# If there are training mentions: gemel build-demonstrations TRAIN ENTITIES demonstrations {encoder}"
    yield '# demonstrations = "demonstrations"'
    yield ""
    yield "[language_model]"
    yield f'name = "{LANGUAGE_MODEL}"  # {MISSING}: a local directory, or a name on the model hub'
    yield f'dtype = "{dtype}"  # fast on the machine where this was written'
    yield ""
    yield "[retrieval]"
    yield f'mention_encoder = "{MENTION_ENCODER}"  # {MISSING}: such as sentence-transformers/all-MiniLM-L6-v2'
    if survey.stored_names:
        yield ""
        yield "[columns]  # guessed by the names that the corpus has: correct what is wrong"
        for name, theirs in survey.stored_names.items():
            yield f"{name} = {json.dumps(theirs, ensure_ascii=False)}"
    if survey.missing:
        yield from ("# Missing, too:",) if survey.stored_names else ("", "# [columns]")
        for name in survey.missing:
            yield f'# {name} = "{MISSING}: its name in the corpus"'


def _vision(survey: CorpusSurvey) -> Iterator[str]:
    if survey.has_pictures:
        yield ""
        yield "[vision]  # remove it to link without pictures"
        yield f'image_encoder = "{IMAGE_ENCODER}"  # {MISSING}: an architecture of open_clip, or a local directory'
        yield '# pretrained = "openai"  # weights of an architecture'
        yield "# Without a feature mapper pictures are evidence; by one the language model sees them, too: gemel train"
        yield '# feature_mapper = "mapper"'
    elif survey.num_features is not None:
        yield ""
        yield f"[vision]  # the corpus has features of width {survey.num_features}; remove it to link without them"
        yield f'feature_mapper = "mapper"  # {MISSING}: one of this width, by gemel train or gemel init-mapper'


def _images(survey: CorpusSurvey) -> Iterator[str]:
    if "image_uri" in survey.num_pictures:
        yield ""
        yield "[image_source]"
        yield f"# Where the first {survey.num_sampled:,} rows have their pictures; an address elsewhere is refused."
        yield f"allowed_prefixes = {json.dumps(survey.image_prefixes, ensure_ascii=False)}"


def _count(sample: pa.Table, name: str) -> int:
    return sample.num_rows - sample[name].null_count if name in sample.column_names else 0


def _width(sample: pa.Table) -> int | None:
    if not _count(sample, "image_features"):
        return None
    width: int = pc.list_value_length(sample["image_features"].drop_null())[0].as_py()
    return width


def _median_characters(sample: pa.Table) -> int | None:
    if not _count(sample, "text"):
        return None
    return int(median(pc.utf8_length(sample["text"].drop_null()).to_pylist()))


def _start_of_relative(sample: pa.Table, uri: str) -> Iterator[str]:
    """Yield where relative image addresses begin.

    That is the directory of the table, unless the first picture is not there, but in a directory
    beside the table or in the working directory.
    """
    relative = next(filter(is_relative, _image_addresses(sample)), None)
    if relative is None:
        return
    path = local_path(uri)
    if path is None:
        directory, _, name = uri.rpartition("/")
        yield directory if "." in name else uri
    else:
        beside = path if path.is_dir() else path.parent
        places = chain([beside, Path.cwd()], sorted(filter(os.path.isdir, beside.iterdir())))
        file, _ = split_address(relative)
        yield str(next((place for place in places if os.path.exists(place / file)), beside))


def _prefixes(sample: pa.Table) -> Iterator[str]:
    """Yield the host or bucket of each image address, and where local ones are in each directory of the root.

    The root itself, which allows all files, is never one of these places.
    """
    places: dict[tuple[str, ...], set[Path]] = {}
    for uri in _image_addresses(sample):
        try:
            canonical_address(uri)
            parts = urlsplit(uri)
            path = None if uri.startswith(HTTP) else local_path(split_address(uri)[0])
        except (ConfigurationError, ValueError):  # a run refuses it, too
            continue
        if path is None:
            yield f"{parts.scheme}://{parts.netloc}"
        elif len(top := path.parent.parts[:2]) > 1:
            places.setdefault(top, set()).add(path.parent)
    yield from map(os.path.commonpath, places.values())


def _image_addresses(sample: pa.Table) -> list[str]:
    return sample["image_uri"].drop_null().to_pylist() if _count(sample, "image_uri") else []


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
