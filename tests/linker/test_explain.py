"""An explanation of one mention: what linking says, the prompt as it was sent, text printed as text."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console
from support.corpus import picture, toml
from support.evidence import build_evidence
from support.names import ENTITY_NAMES

from gemel_engine.cli.main import main
from gemel_engine.cli.tables import print_explanation
from gemel_engine.config.components import GEMEL_TEMPLATE, KnowledgeBaseSettings, ScoreSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError, ImageError, InputError, InvalidMentionError, PromptTooLongError
from gemel_engine.evidence.cards import Card
from gemel_engine.evidence.index import DIRECTORY, entities_checksum
from gemel_engine.evidence.reasons import in_words
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.linker import Explanation, Linker, VisualMark, explain
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.types import CARD_PREFIX, Mention

TEXT = "Look at the brown bear over there."
HOSTILE = "[bold]a[/bold] :bear: \x1b]0;title\x07 [link=http://x]y"


@pytest.fixture(scope="module")
def config(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LinkConfig:
    path = tmp_path_factory.mktemp("explain") / "link.toml"
    path.write_text(toml(artifacts, "none.parquet", "none"))
    return load_config(LinkConfig, path)


@pytest.fixture(scope="module")
def linker(config: LinkConfig) -> Linker:
    return Linker(config)


@pytest.fixture(scope="module")
def proposing(config: LinkConfig, tmp_path_factory: pytest.TempPathFactory) -> Linker:
    """A linker whose knowledge base has descriptions and an evidence index."""
    directory = tmp_path_factory.mktemp("with_evidence") / "knowledge_base"
    numbers = range(len(ENTITY_NAMES))
    table = {
        "entity_id": [f"Q{n}" for n in numbers],
        "name": ENTITY_NAMES,
        "description": [f"{HOSTILE}\nentity number {n} {'of many ' * 20}" for n in numbers],
    }
    build_knowledge_base(
        pa.table(table), load_tokenizer(config.language_model.name), directory, KnowledgeBaseSettings()
    )
    entities = KnowledgeBase.open(directory).table()
    build_evidence(entities, directory / DIRECTORY, knowledge_base=entities_checksum(directory))
    retrieval = replace(config.retrieval, num_cards=2, num_own_cards=1)
    prompt = replace(config.prompt, max_prompt_tokens=950)
    return Linker(replace(config, knowledge_base=str(directory), retrieval=retrieval, prompt=prompt))


def printed(explanation: Explanation, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_explanation(explanation, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_it_says_what_linking_says_with_and_without_the_picture(linker: Linker) -> None:
    mention = Mention("m", TEXT, "brown bear")
    explanation = explain(linker, mention, picture("red"))
    without = explanation.without_picture
    assert without is not None
    assert [explanation.prediction] == linker.link([mention], [picture("red")])
    assert [without.prediction] == linker.link([mention], [None])
    assert without.without_picture is None
    assert explanation.prediction != without.prediction
    output = printed(explanation)
    for prediction in (explanation.prediction, without.prediction):
        for candidate in prediction.candidates:
            assert f"{candidate.log_prob:.2f}" in output
    assert "without picture" in output


def test_without_a_mapper_a_picture_is_evidence_and_not_in_the_prompt(config: LinkConfig) -> None:
    linker = Linker(replace(config, vision=replace(config.vision, feature_mapper=None)))
    explanation = explain(linker, Mention("m", TEXT, "brown bear"), picture("red"))
    assert [piece for piece in explanation.prompt if isinstance(piece, VisualMark)] == []
    assert explanation.without_picture is not None
    assert explanation.without_picture.prompt == explanation.prompt


def test_the_prompt_is_shown_as_it_was_sent(linker: Linker) -> None:
    explanation = explain(linker, Mention("m", TEXT, "brown bear"), picture("red"))
    demonstrations = [used.demonstration for used in explanation.demonstrations]
    assert tuple(used.id for used in explanation.demonstrations) == explanation.prediction.demonstration_ids
    expected: list[str | VisualMark] = []
    for demonstration in demonstrations:
        if demonstration.features is not None:
            expected.append(VisualMark(2))
        filled = GEMEL_TEMPLATE.format(text=demonstration.text, mention=demonstration.mention)
        expected.append(f"{filled}{demonstration.name}\n")
    expected += [VisualMark(2), GEMEL_TEMPLATE.format(text=TEXT, mention="brown bear")]
    assert joined(explanation.prompt) == joined(expected)
    assert printed(explanation).count("⟨picture: 2 embeddings⟩") == expected.count(VisualMark(2))


def joined(pieces: object) -> str:
    assert isinstance(pieces, (list, tuple))
    return "".join("\0" if isinstance(piece, VisualMark) else piece for piece in pieces)


def test_an_equal_surface_form_has_similarity_one(linker: Linker) -> None:
    explanation = explain(linker, Mention("m", "A star.", "star"))
    last = explanation.demonstrations[-1]
    assert last.demonstration.mention == "star"
    assert last.similarity == pytest.approx(1.0, abs=1e-5)
    assert all((used.similarity or 0.0) <= 1.0 + 1e-5 for used in explanation.demonstrations)


def test_text_is_printed_as_text(linker: Linker) -> None:
    explanation = explain(linker, Mention("m", f"See {HOSTILE} here.", HOSTILE))
    demonstrations = tuple(
        replace(used, demonstration=replace(used.demonstration, text=HOSTILE, name=HOSTILE))
        for used in explanation.demonstrations
    )
    prediction = replace(explanation.prediction, entity_name=HOSTILE)
    output = printed(replace(explanation, demonstrations=demonstrations, prediction=prediction))
    assert "\x1b" not in output
    assert "\x07" not in output
    assert output.count("[bold]a[/bold] :bear: ␛]0;title␇ [link=http://x]y") >= 2 + 2 * len(demonstrations)


def test_the_candidate_pool_has_its_reasons_and_cards_are_told_apart(proposing: Linker) -> None:
    explanation = explain(proposing, Mention("m", TEXT, "brown bear"), picture("red"))
    prediction = explanation.prediction
    assert prediction.pool[0].reasons["name"] == 1.0
    pool_ids = {found.entity_id for found in prediction.pool}
    assert explanation.entities.keys() == pool_ids | {item.entity_id for item in prediction.candidates}
    output = printed(explanation, width=1000)
    _, candidates, why, pool, demonstrations, _ = output.split(" \u2500\u2500")
    first, second, *_ = prediction.candidates
    assert explanation.arguments
    if second.score is not None and first.score is not None:
        difference = sum(item.difference for item in explanation.arguments)
        assert difference == pytest.approx(first.score - second.score, abs=0.05)
    assert all(f"{item.difference:+.2f}" in why and item.words in why for item in explanation.arguments)
    for item in prediction.candidates:
        assert f"entity number {item.entity_id[1:]} of many" in candidates
    assert len(pool.splitlines()) == len(prediction.pool) + 3
    for found in prediction.pool:
        assert "; ".join(in_words(found.reasons)) in pool
        assert f"entity number {found.entity_id[1:]} of many" in pool
    assert "in the text, words: 2" in pool
    is_card = [isinstance(used.demonstration, Card) for used in explanation.demonstrations]
    assert is_card == [used.id.startswith(CARD_PREFIX) for used in explanation.demonstrations]
    kinds = ["card" if card else "mention" for card in is_card]
    assert [line.split()[1] for line in demonstrations.splitlines()[2:-1]] == kinds
    assert set(kinds) == {"card", "mention"}
    assert "\x1b" not in output
    assert "\x07" not in output


def test_where_evidence_decides_alone_no_prompt_is_shown(proposing: Linker) -> None:
    plain, score = Mention("m", TEXT, "brown bear"), ScoreSettings(risk=0.9)
    by_evidence = Linker(replace(proposing.config, score=score))
    explanation = explain(by_evidence, plain)
    assert [explanation.prediction] == by_evidence.link([plain], [None])
    assert explanation.prediction.decided_by == "evidence"
    assert (explanation.demonstrations, explanation.prompt) == ((), ())
    assert explanation.prediction.pool
    assert "\u2500 prompt" not in printed(explanation)
    too_long = replace(plain, mention="brown bear " * 300)
    with pytest.raises(PromptTooLongError):
        explain(proposing, too_long)
    (answer,) = by_evidence.link([too_long], [None])
    assert answer.decided_by == "evidence"
    assert explain(by_evidence, too_long).prediction == answer


def test_without_an_evidence_index_there_is_no_pool(linker: Linker) -> None:
    explanation = explain(linker, Mention("m", TEXT, "brown bear"))
    assert explanation.prediction.pool == ()
    assert "candidate pool" not in printed(explanation)


def test_what_cannot_be_linked_is_an_error(linker: Linker, config: LinkConfig) -> None:
    with pytest.raises(ImageError):
        explain(linker, Mention("m", TEXT, "brown bear"), b"no picture")
    with pytest.raises(InvalidMentionError, match=r"candidate_ids \['Q999'\] are not in the knowledge base"):
        explain(linker, Mention("m", TEXT, "brown bear", candidate_ids=("Q999",)))
    blind = Linker(replace(config, vision=replace(config.vision, image_encoder=None)))
    for wrong, fault, message in (
        (blind, picture("red"), r"a picture needs vision\.image_encoder"),
        (blind, "bear.png", "a picture is 'bear.png': give the content of the image file, as bytes"),
        (linker, bytearray(b"x"), r"a picture is bytearray\(b'x'\)"),
    ):
        for ask in (explain, lambda linker, mention, given: linker.link([mention], [given])):
            with pytest.raises((ConfigurationError, InputError), match=message):
                ask(wrong, Mention("m", TEXT, "brown bear"), fault)  # type: ignore[arg-type]


def test_the_job_takes_overrides_and_candidates(
    config: LinkConfig,
    artifacts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, image = tmp_path / "link.toml", tmp_path / "red.png"
    path.write_text(toml(artifacts, "none.parquet", "none", engine="vllm"))
    Image.new("RGB", (8, 8), "red").save(image)
    question = ["--text", TEXT, "--mention", "brown bear", "--picture", str(image), "--candidates", "Q0", "Q1"]
    overrides = ["--language-model.engine", "transformers", "--retrieval.num-demonstrations", "0"]
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.argv", ["explain.py", str(path), *question, *overrides])
    main("explain")
    output = capsys.readouterr().out
    assert all(name in output for name in ENTITY_NAMES[:2])
    assert not any(name in output for name in ENTITY_NAMES[4:8])
    assert "demonstrations and cards" not in output
    monkeypatch.setattr("sys.argv", ["explain.py", str(path), "--text", TEXT])
    with pytest.raises(SystemExit, match="2"):
        main("explain")
    assert "--mention" in capsys.readouterr().err
