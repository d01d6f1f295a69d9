"""The settings of a linking run that most users need, for `gemel link --help`."""

from __future__ import annotations

import dataclasses
from functools import reduce
from typing import Annotated, Any, get_type_hints

from tyro.conf import arg

BASIC_SETTINGS = {
    "input": "Table of mentions: a file of Parquet, CSV or JSON Lines, or a directory of them.",
    "output": "Directory for the answers.",
    "knowledge_base": "Knowledge base to link to, made by `gemel build-kb`.",
    "demonstrations": "Solved examples for the prompts, made by `gemel build-demonstrations`.",
    "language_model.name": "Language model: a local directory, or a name on the Hugging Face hub.",
    "language_model.dtype": "Precision of its numbers. `auto` takes what the processor is fast in.",
    "retrieval.mention_encoder": "Sentence encoder that finds demonstrations and candidates.",
    "vision.image_encoder": "Model that reads pictures. Without it they are ignored.",
    "vision.feature_mapper": "Shows pictures to the language model, too: see `gemel train`.",
    "image_source.allowed_prefixes": "Places that pictures may be read from, where the table has addresses.",
    "output_columns": "Columns of the input that the answers have, too.",
    "score.risk": "Share of wrong answers that you accept where the language model is not asked: faster. 0: never.",
    "search.max_rollouts": "How often the language model is asked for one mention at most: more is surer and slower.",
    "resources.generation.max_actors": "How many copies of the language model work at the same time.",
    "resources.generation.num_gpus": "GPUs of each copy; 0: it works on CPUs.",
    "dry_run": "Check everything, say how much is to be done, and stop.",
}


def basic_type(config_type: type[Any], values: Any | None) -> type[Any]:
    """Return a flat dataclass of the basic settings, with the defaults of `config_type`.

    Args:
        config_type: Type of the configuration.
        values: Configuration whose values are the defaults; None: those of the type.
    """
    fields: list[Any] = []
    for name, words in BASIC_SETTINGS.items():
        *groups, key = name.split(".")
        group = reduce(lambda found, part: get_type_hints(found)[part], groups, config_type)
        kind: Any = get_type_hints(group)[key]
        kind = Annotated[kind, arg(name=name.replace("_", "-"), help=words)]
        default = next(field.default for field in dataclasses.fields(group) if field.name == key)
        if values is not None:
            default = reduce(getattr, name.split("."), values)
        is_required = default is dataclasses.MISSING
        attribute = name.replace(".", "_")
        fields.append((attribute, kind) if is_required else (attribute, kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass("BasicSettings", fields, kw_only=True)
