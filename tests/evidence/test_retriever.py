"""What retrieval finds for a prompt: demonstrations, cards, and the candidate pool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.evidence import build_evidence
from support.tables import make_tokenizer

from gemel_engine.config.components import KnowledgeBaseSettings, RetrievalSettings
from gemel_engine.evidence.cards import EntityCards
from gemel_engine.evidence.forms import FormStatistics
from gemel_engine.evidence.index import DIRECTORY, EvidenceIndex, entities_checksum
from gemel_engine.evidence.retrieved import PromptItem, Retrieved, retrieved_to_array, row_to_retrieved
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.types import Mention

ENTITIES = pa.table(
    {
        "entity_id": ["element", "planet", "singer", "Oslo", "spoilt"],
        "name": ["Mercury (element)", "Mercury (planet)", "Freddie Mercury", "Oslo", "Odd"],
        "aliases": [["quicksilver"], ["Hermes"], ["Farrokh Bulsara"], [], ["[Text]", "odd one"]],
        "description": [None, "innermost\n planet", "singer of Queen " * 40, None, "a [Question] of taste"],
        "popularity": [1.0, 5.0, 90.0, 5.0, None],
    }
)


@pytest.fixture(scope="module")
def knowledge_base(tmp_path_factory: pytest.TempPathFactory, encoder: MentionEncoder) -> KnowledgeBase:
    directory = tmp_path_factory.mktemp("knowledge_base") / "kb"
    build_knowledge_base(ENTITIES, make_tokenizer(), directory, KnowledgeBaseSettings())
    opened = KnowledgeBase.open(directory, verify=True)
    planet, singer = np.eye(2, 4, dtype=np.float32)
    pictures = {row_of(opened, "planet"): planet[None], row_of(opened, "singer"): singer[None]}
    build_evidence(
        opened.table(),
        directory / DIRECTORY,
        knowledge_base=entities_checksum(directory),
        mention_encoder=encoder,
        pictures=pictures,
    )
    return opened


@pytest.fixture(scope="module")
def evidence(knowledge_base: KnowledgeBase) -> EvidenceIndex:
    return EvidenceIndex.open(knowledge_base.directory / DIRECTORY, verify=True)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, encoder: MentionEncoder) -> DemonstrationIndex:
    rows = [
        Demonstration("d0", "They melt Mercury.", "Mercury", "element", "Mercury (element)", "d0"),
        Demonstration("d1", "Mercury is hot.", "Mercury", "planet", "Mercury (planet)", "g"),
        Demonstration("d2", "Oslo in May.", "Oslo", "Oslo", "Oslo", "d2"),
        Demonstration("d3", "Not in the knowledge base.", "Mercury", "gone", "Gone", "d3"),
    ]
    return DemonstrationIndex.build(tmp_path_factory.mktemp("index"), rows, encoder)


def row_of(knowledge_base: KnowledgeBase, entity_id: str) -> int:
    row = knowledge_base.row_of_entity(entity_id)
    assert row is not None
    return row


def settings(encoder_directory: Path, **changes: object) -> RetrievalSettings:
    defaults = {"mention_encoder": str(encoder_directory), "num_demonstrations": 2, "num_cards": 2, "num_own_cards": 1}
    return RetrievalSettings(**(defaults | changes))  # type: ignore[arg-type]


SPACE = Mention("m", "The singer of Queen sang in Oslo.", "Mercury")
HOT = Mention("n", "The innermost planet is hot.", "Mercury")


def test_what_depends_on_the_form_alone_comes_first_and_is_shared(
    knowledge_base: KnowledgeBase,
    evidence: EvidenceIndex,
    index: DemonstrationIndex,
    mention_encoder_directory: Path,
) -> None:
    retriever = Retriever(settings(mention_encoder_directory), knowledge_base, index, evidence)
    first, second = retriever.retrieve([SPACE, HOT], [None, np.array([1, 0, 0, 0], np.float32)])
    assert first.shared == second.shared
    assert [item.is_card for item in first.shared] == [False, False, True, True]
    assert [item.is_card for item in first.own] == [True]
    # The best candidate by all evidence, here the picture, is next to the question, although it is shown before.
    assert second.own == (PromptItem(row_of(knowledge_base, "planet"), is_card=True),)
    assert set(second.own) <= set(second.shared)
    assert first.items == first.shared + first.own
    assert {candidate.row for candidate in first.candidates} >= {item.row for item in first.items if item.is_card}
    assert [retriever.retrieve([mention], [None])[0].shared for mention in (SPACE, HOT)] == [first.shared] * 2
    reasons = {candidate.row: candidate.reasons for candidate in second.candidates}
    assert "picture" in reasons[row_of(knowledge_base, "planet")]


def test_a_knowledge_base_alone_gives_cards_and_an_index_alone_demonstrations(
    knowledge_base: KnowledgeBase,
    evidence: EvidenceIndex,
    index: DemonstrationIndex,
    mention_encoder_directory: Path,
) -> None:
    with_encoder, without = settings(mention_encoder_directory), RetrievalSettings(num_cards=2, num_own_cards=1)
    for options in (with_encoder, without):
        (found,) = Retriever(options, knowledge_base, None, evidence).retrieve([SPACE], [None])
        assert all(item.is_card for item in found.items)
        assert len(found.items) == 3
    assert Retriever(without, knowledge_base, None, evidence).encoder is None
    for options, opened in ((with_encoder, None), (settings(mention_encoder_directory, num_candidates=0), evidence)):
        (found,) = Retriever(options, knowledge_base, index, opened).retrieve([SPACE], [None])
        assert [item.is_card for item in found.items] == [False, False]
        assert not found.candidates
    (nothing,) = Retriever(without, knowledge_base, None, evidence).retrieve([Mention("m", "", "qqq")], [None])
    assert nothing == Retrieved()


def test_similar_pictures_need_no_other_demonstrations(
    knowledge_base: KnowledgeBase, encoder: MentionEncoder, mention_encoder_directory: Path, tmp_path: Path
) -> None:
    picture = np.array([0, 1, 0, 0], np.float32)
    rows = [Demonstration("d0", "Mercury is hot.", "Mercury", "planet", "Mercury (planet)", "d0", picture)]
    index = DemonstrationIndex.build(tmp_path, rows, encoder)
    options = settings(mention_encoder_directory, num_demonstrations=0, num_similar_pictures=1)
    (found,) = Retriever(options, knowledge_base, index, None).retrieve([SPACE], [picture])
    assert found == Retrieved((), (PromptItem(0),))


def test_cards_are_of_a_mention_s_own_candidates(
    knowledge_base: KnowledgeBase, evidence: EvidenceIndex, mention_encoder_directory: Path
) -> None:
    retriever = Retriever(settings(mention_encoder_directory), knowledge_base, None, evidence)
    own = ("Oslo", "planet")
    mentions = [replace(SPACE, candidate_ids=own), replace(SPACE, candidate_ids=("unknown",)), SPACE]
    found, unknown, whole = retriever.retrieve(mentions, [None] * 3)
    rows = {row_of(knowledge_base, entity_id) for entity_id in own}
    assert {candidate.row for candidate in found.candidates} == rows
    assert {item.row for item in found.items} <= rows
    assert unknown == Retrieved()
    assert retriever.retrieve([SPACE], [None]) == [whole]


def test_unfit_features_are_left_to_generation(
    knowledge_base: KnowledgeBase, evidence: EvidenceIndex, mention_encoder_directory: Path
) -> None:
    retriever = Retriever(settings(mention_encoder_directory), knowledge_base, None, evidence)
    found = retriever.retrieve([SPACE] * 3, [None, np.zeros(7, np.float32), np.full(4, np.nan, np.float32)])
    assert found[0] == found[1] == found[2]


def test_form_statistics_count_the_entities_that_the_knowledge_base_has(
    knowledge_base: KnowledgeBase, index: DemonstrationIndex
) -> None:
    forms = FormStatistics.of_index(index, knowledge_base)
    planet, element = row_of(knowledge_base, "planet"), row_of(knowledge_base, "element")
    assert sorted(forms.entities("mercury")) == sorted([(planet, 1), (element, 1)])
    assert forms.entities("mercury", "g") == [(element, 1)]


def test_a_result_survives_arrow(
    knowledge_base: KnowledgeBase, evidence: EvidenceIndex, mention_encoder_directory: Path
) -> None:
    found = Retriever(settings(mention_encoder_directory), knowledge_base, None, evidence).retrieve([SPACE], [None])
    stored = retrieved_to_array([*found, Retrieved((PromptItem(3),))]).to_pylist()
    assert [row_to_retrieved(row) for row in stored] == [*found, Retrieved((PromptItem(3),))]
    assert row_to_retrieved(None) == Retrieved()


def test_a_card_is_a_demonstration_of_its_entity(knowledge_base: KnowledgeBase, evidence: EvidenceIndex) -> None:
    cards = EntityCards(knowledge_base, evidence.pictures, "description")
    planet = cards.card(row_of(knowledge_base, "planet"), "hermes")
    assert (planet.text, planet.mention, planet.name) == ("innermost planet", "hermes", "Mercury (planet)")
    assert planet.features is not None
    assert planet.features.tolist() == [1, 0, 0, 0]
    element = cards.card(row_of(knowledge_base, "element"), "quicksilver")
    assert (element.text, element.mention, element.features) == ("Mercury (element)", "quicksilver", None)
    singer = cards.card(row_of(knowledge_base, "singer"), "he")
    assert len(singer.text) <= 160
    assert singer.text.startswith("singer of Queen singer")
    assert singer.text.endswith("Queen") or singer.text.endswith("of") or singer.text.endswith("singer")
    assert EntityCards(knowledge_base, None, "name").card(row_of(knowledge_base, "planet"), "x").text == planet.name


def test_descriptions_with_prompt_markers_are_left_out_of_cards(knowledge_base: KnowledgeBase) -> None:
    card = EntityCards(knowledge_base, None, "description").card(row_of(knowledge_base, "spoilt"), "odd one")
    assert (card.text, card.mention, card.name) == ("Odd", "odd one", "Odd")
