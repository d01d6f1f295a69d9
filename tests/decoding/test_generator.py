"""The generator without Ray: predictions in order, prompts that can be compared, and errors of single mentions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.corpus import toml

from gemel_engine.assembly import start_generator
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.generator import EntityNameGenerator
from gemel_engine.errors import InvalidMentionError, PromptTooLongError
from gemel_engine.evidence.cards import Card
from gemel_engine.evidence.retrieved import PromptItem, Retrieved
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.types import Mention

BEAR = Mention("bear", "They saw the brown bear again.", "brown bear")
STAR = Mention("star", "A star.", "star")
NOTHING = Retrieved()


@pytest.fixture(scope="module")
def generator(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> EntityNameGenerator:
    directory = tmp_path_factory.mktemp("generator")
    (directory / "link.toml").write_text(toml(artifacts, "none.parquet", directory / "output"))
    return start_generator(load_config(LinkConfig, directory / "link.toml"))


def test_predictions_come_in_order_and_a_bad_mention_leaves_the_others_alone(generator: EntityNameGenerator) -> None:
    unknown = replace(BEAR, mention_id="unknown", candidate_ids=("Q999",))
    long = replace(STAR, mention_id="long", mention="star " * 800)
    mentions = [unknown, STAR, long, BEAR]
    found = generator.generate(mentions, [None] * 4, [NOTHING] * 4)
    assert [prediction.mention_id for prediction in found] == ["unknown", "star", "long", "bear"]
    kinds = [prediction.error and prediction.error.partition(": ")[0] for prediction in found]
    assert kinds == ["invalid_mention", None, "prompt_too_long", None]
    for place in (1, 3):
        (alone,) = generator.generate([mentions[place]], [None], [NOTHING])
        assert found[place].entity_id == alone.entity_id
        assert found[place].log_prob == pytest.approx(alone.log_prob, abs=1e-3)
        assert found[place].decided_by == "language_model"
    assert generator.generate([], [], []) == []


def test_a_prompt_is_built_of_items_and_picture(generator: EntityNameGenerator) -> None:
    retrieved = Retrieved((PromptItem(0), PromptItem(1)), (PromptItem(2, is_card=True),))
    mapper = generator.artifacts.feature_mapper
    assert mapper is not None
    features = np.full(mapper.metadata.vision_width, 0.1, np.float32)
    prompt, used = generator.prompt(BEAR, features, retrieved)
    assert used == retrieved.items
    without, _ = generator.prompt(BEAR, None, retrieved)
    assert len(prompt.visual_prefixes) == len(without.visual_prefixes) + 1
    ids, entity_ids = generator.ids(used)
    assert ids[-1] == f"card:{entity_ids[-1]}"
    assert not any(item.startswith("card:") for item in ids[:-1])
    assert isinstance(generator.example(PromptItem(0), "bear"), Demonstration)
    assert isinstance(generator.example(PromptItem(0, is_card=True), "bear"), Card)
    with pytest.raises(PromptTooLongError):
        generator.prompt(replace(BEAR, mention="bear " * 800), None, retrieved)


def test_image_features_that_the_mapper_cannot_read_are_refused(generator: EntityNameGenerator) -> None:
    mapper = generator.artifacts.feature_mapper
    assert mapper is not None
    width = mapper.metadata.vision_width
    with pytest.raises(InvalidMentionError, match="image_features holds 3 numbers"):
        generator.prompt(BEAR, np.zeros(3, np.float32), NOTHING)
    with pytest.raises(InvalidMentionError, match="of them finite and at most 1e\\+06"):
        generator.prompt(BEAR, np.full(width, np.nan, np.float32), NOTHING)
    (failed,) = generator.generate([BEAR], [np.zeros(3, np.float32)], [NOTHING])
    assert (failed.error or "").startswith("invalid_mention: image_features holds 3 numbers")


def test_an_earlier_prediction_is_continued_only_with_the_same_items(generator: EntityNameGenerator) -> None:
    retrieved = Retrieved((PromptItem(0), PromptItem(1)))
    (earlier,) = generator.generate([BEAR], [None], [retrieved])
    assert generator.can_continue(BEAR, None, retrieved, earlier)
    assert not generator.can_continue(BEAR, None, Retrieved((PromptItem(0), PromptItem(2))), earlier)
    assert not generator.can_continue(replace(BEAR, mention="bear " * 800), None, retrieved, earlier)
