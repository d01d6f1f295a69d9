"""A component of spaCy that links the entities of a document.

    register()
    nlp.add_pipe("gemel_linker", config={"link_toml": "link.toml"})

spaCy is no dependency of this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError
from gemel_engine.linker import Linker
from gemel_engine.types import Mention

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc

COMPONENT = "gemel_linker"


def register() -> None:
    """Make the component known to spaCy.

    Raises:
        ConfigurationError: spaCy is not installed.
    """
    try:
        from spacy.language import Language
    except ModuleNotFoundError as error:
        raise ConfigurationError("the package spacy is not installed: install spacy") from error
    Language.factory(COMPONENT, func=make_linker)


class SpacyLinker:
    """Sets `kb_id_` of each entity of a document; empty where it can't be linked, and for NIL.

    Args:
        linker: All parts of a linking run.
    """

    def __init__(self, linker: Linker) -> None:
        self._linker = linker

    def __call__(self, doc: Doc) -> Doc:
        """Link the entities of a document."""
        mentions = [Mention(str(n), doc.text, span.text, span.start_char) for n, span in enumerate(doc.ents)]
        spans = []
        for span, answer in zip(doc.ents, self._linker.link(mentions, [None] * len(mentions)), strict=True):
            kb_id = "" if answer.is_nil else answer.entity_id or ""
            spans.append(doc.char_span(span.start_char, span.end_char, label=span.label, kb_id=kb_id))
        doc.set_ents(spans)
        return doc


def make_linker(nlp: Language, name: str, link_toml: str) -> SpacyLinker:
    """Return a component that links by the configuration at the path `link_toml`."""
    return SpacyLinker(Linker(load_config(LinkConfig, Path(link_toml))))
