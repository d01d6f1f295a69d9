"""What a person sees of untrusted text: every character, and no line that is not there."""

from __future__ import annotations

import io
import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from rich.console import Console

from gemel_engine.cli import options as command_line
from gemel_engine.cli.tables import print_explanation
from gemel_engine.display import make_visible, visible, without_unseen
from gemel_engine.errors import InputError
from gemel_engine.linker import Explanation
from gemel_engine.pipeline.output import check_claim
from gemel_engine.types import Candidate, Mention, Prediction

FORGED = "error: all is well"
HOSTILE = f"\x1b[2J\x9b31m\n{FORGED}\r\u202e\u2066\u200b\u2060\ufeff\U000e0041\u2028{FORGED}"
SHOWN = f"␛[2J\ufffd31m␊{FORGED}␍‹U+202E›‹U+2066›‹U+200B›‹U+2060›‹U+FEFF›‹U+E0041›‹U+2028›{FORGED}"
# Format characters that are drawn: signs over numbers, and those that arrange hieroglyphs.
DRAWN = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}


@pytest.mark.parametrize(
    ("text", "kept", "compared"),
    [
        ("P\u200bar\u00adis\ufeff", "Paris", "Paris"),
        ("\u202ePa\u200dris\u200c", "Paris", "Paris"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u062e"),
        ("\U0001f468\u200d\U0001f680", "\U0001f468\u200d\U0001f680", "\U0001f468\U0001f680"),
        ("1\ufe0f\u20e3", "1\ufe0f\u20e3", "1\u20e3"),
        ("\U0001f3f4\U000e0067\U000e007f", "\U0001f3f4\U000e0067\U000e007f", "\U0001f3f4"),
        ("a\u2028b", "a\u2028b", "a\u2028b"),  # separates lines, and is refused in names
        ("\u200b\u3164", "", ""),
    ],
)  # fmt: skip
def test_characters_without_width_are_removed_where_they_do_nothing(text: str, kept: str, compared: str) -> None:
    assert without_unseen(text) == kept
    assert without_unseen(text, also_joining=True) == compared


def test_every_character_that_is_unseen_is_made_visible() -> None:
    unseen = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in DRAWN
    ]
    unseen += [*"\u034f\u115f\u3164\uffa0\ufe00\ufe0f", "\U000e0100"]
    assert [hex(ord(character)) for character in unseen if character in visible(f"a{character}b")] == []
    assert visible(HOSTILE) == SHOWN
    assert visible(visible(HOSTILE)) == SHOWN


@pytest.mark.parametrize("text", ["Zürich 北京 é e\u0301", "❤\ufe0f ☎\ufe0e 1\ufe0f", "👍🏽", "مرحبا", "a b\u00a0c"])
def test_what_is_seen_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_a_selector_without_a_symbol_or_behind_another_is_made_visible() -> None:
    assert visible("a\ufe0f") == "a‹U+FE0F›"
    assert visible("❤\ufe0f\ufe0f") == "❤\ufe0f‹U+FE0F›"


def test_running_text_keeps_its_lines() -> None:
    assert visible("a\n\tb\r\x1b", lines=True) == "a\n\tb␍␛"


def test_a_record_is_one_line_and_its_traceback_is_indented() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(make_visible)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning("100%% of %s", HOSTILE)
    assert stream.getvalue() == f"100% of {SHOWN}\n"
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("failed")
    first, *others = stream.getvalue().splitlines()[1:]
    assert first == "failed"
    assert all(line.startswith("  ") for line in others)
    assert f"  {FORGED}␍‹U+202E›" in stream.getvalue()


def ends_with(error: Exception, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        command_line.run(command)
    return stopped.value.code, capsys.readouterr().err


def test_an_error_is_one_line_whatever_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(InputError(f"no column {HOSTILE}"), capsys) == (3, f"error: no column {SHOWN}\n")


def test_an_error_of_a_task_is_printed_as_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    cause = InputError("a file is missing")
    error = RayTaskError("commit", "Traceback:\n  ...", cause, "ray", 1, "127.0.0.1")  # type: ignore[no-untyped-call]
    assert ends_with(error.as_instanceof_cause(), capsys) == (3, "error: a file is missing\n")  # type: ignore[no-untyped-call]


def test_an_error_that_nobody_expects_shows_where_and_forges_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = ends_with(RuntimeError(HOSTILE), capsys)
    assert code == 1
    assert "in command" in printed
    assert all(line.startswith("  ") for line in printed.rstrip("\n").split("\n"))
    assert not {*"\x1b\x9b\r\u202e\u200b\u2028\U000e0041"} & {*printed}


def test_the_keys_of_a_manifest_forge_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "_run.json").write_text(json.dumps({"settings": {HOSTILE: 1}}))
    with pytest.raises(SystemExit, match="2"):
        command_line.run(lambda: check_claim(str(tmp_path), {"settings": {}}))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert f"differs in settings.{SHOWN}" in line


def test_an_explanation_forges_no_line_and_hides_no_character() -> None:
    answer = Candidate(HOSTILE, HOSTILE, -0.5)
    explanation = Explanation(
        mention=Mention("m", f"See {HOSTILE} here.", HOSTILE),
        prediction=Prediction(
            "m", entity_id=HOSTILE, entity_name=HOSTILE, candidates=(answer,), log_prob=-0.5, probability=0.5
        ),
        demonstrations=(),
        prompt=(f"[Text]{HOSTILE}",),
    )
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    print_explanation(explanation, console)
    assert isinstance(console.file, io.StringIO)
    output = console.file.getvalue()
    before, prompt = output.split("prompt ──")
    assert not {*"\x1b\x9b\r\u202e\u2066\u200b\u2060\ufeff\U000e0041\u2028"} & {*output}
    assert before.count(f"\n{FORGED}") == 0
    assert before.count("‹U+202E›") >= 4
    assert f"[Text]␛[2J\ufffd31m\n{FORGED}" in prompt
