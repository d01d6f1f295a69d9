"""spaCy finds the component and gets the linker's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.corpus import toml

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.linker import Linker
from gemel_engine.spacy_component import COMPONENT, register

spacy = pytest.importorskip("spacy")


def test_entities_of_a_document_are_linked(artifacts: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "link.toml"
    path.write_text(toml(artifacts, "none.parquet", "none"))
    register()
    nlp = spacy.blank("en")
    patterns = [{"label": "ANIMAL", "pattern": name} for name in ("brown bear", "cat")]
    nlp.add_pipe("entity_ruler").add_patterns(patterns)
    nlp.add_pipe(COMPONENT, config={"link_toml": str(path)})
    doc = nlp("A brown bear and a cat.")
    linker = Linker(load_config(LinkConfig, path))
    assert [(span.text, span.label_) for span in doc.ents] == [("brown bear", "ANIMAL"), ("cat", "ANIMAL")]
    assert [span.kb_id_ for span in doc.ents] == [linker.link_one(doc.text, span.text).entity_id for span in doc.ents]
    assert not nlp("Nothing here.").ents
