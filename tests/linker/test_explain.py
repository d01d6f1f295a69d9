"""An explanation of one mention: what linking says, the prompt as it was sent, text printed as text."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from support.corpus import picture, toml
from support.names import ENTITY_NAMES

from gemel_engine.cli.main import main
from gemel_engine.cli.tables import print_explanation
from gemel_engine.config.components import GEMEL_TEMPLATE
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError, ImageError, InvalidMentionError
from gemel_engine.linker import Explanation, Linker, VisualMark, explain
from gemel_engine.types import Mention

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


def test_what_cannot_be_linked_is_an_error(linker: Linker, config: LinkConfig) -> None:
    with pytest.raises(ImageError):
        explain(linker, Mention("m", TEXT, "brown bear"), b"no picture")
    with pytest.raises(InvalidMentionError, match=r"candidate_ids \['Q999'\] are not in the knowledge base"):
        explain(linker, Mention("m", TEXT, "brown bear", candidate_ids=("Q999",)))
    blind = Linker(replace(config, vision=replace(config.vision, image_encoder=None)))
    with pytest.raises(ConfigurationError, match=r"a picture needs vision\.image_encoder"):
        explain(blind, Mention("m", TEXT, "brown bear"), picture("red"))


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
    assert "demonstrations, the last" not in output
    monkeypatch.setattr("sys.argv", ["explain.py", str(path), "--text", TEXT])
    with pytest.raises(SystemExit, match="2"):
        main("explain")
    assert "--mention" in capsys.readouterr().err
