"""The command `gemel`: what it lists, explains and refuses, and that both scripts in `jobs/` are commands, too."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from support.paths import ROOT

from gemel_engine.cli.basic_settings import BASIC_SETTINGS
from gemel_engine.cli.knowledge_bases import EncoderOptions
from gemel_engine.cli.main import COMMANDS, main
from gemel_engine.config.components import ImagePolicy, VisionSettings
from gemel_engine.decoding.language_model import language_model_fingerprint
from gemel_engine.errors import InputError
from gemel_engine.vision.mapper import FeatureMapper

HEAVY = ("faiss", "open_clip", "pyarrow", "ray", "torch", "transformers", "vllm")


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["gemel", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_the_list_of_commands_waits_for_no_library() -> None:
    report = f"import atexit; atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules]))"
    code = f"import sys; {report}; sys.argv[1:] = ['--help']; from gemel_engine.cli.main import main; main()"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    *listed, imported = finished.stdout.splitlines()
    assert imported == "[]"
    assert "\n".join(listed).count("•") == len(COMMANDS)


def test_a_command_ends_without_a_last_visit_to_all_objects() -> None:
    report = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0))"
    code = f"import sys; {report}; sys.argv[1:] = ['--help']; from gemel_engine.cli.main import main; main()"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout.splitlines()[-1] == "True"


def test_the_package_offers_its_public_names_and_waits_for_no_library() -> None:
    code = f"""
import sys, gemel_engine
print([name for name in {HEAVY} if name in sys.modules])
from gemel_engine import LinkConfig, Linker, load_config
print(LinkConfig.__name__, Linker.__name__, load_config.__name__)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout.splitlines() == ["[]", "LinkConfig Linker load_config"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, command, "--help") == 0
    explained = capsys.readouterr().out
    assert f"usage: gemel {command} " in explained
    assert "show this help message" in explained


def test_a_job_explains_its_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code(monkeypatch, "link", "--help")
    basic = capsys.readouterr().out
    assert "--search.max-rollouts INT" in basic
    assert set(re.findall(r"--([a-z][a-z.-]+)", basic)) - {"help", "help-all", "no-dry-run", "search.width"} == {
        name.replace("_", "-") for name in BASIC_SETTINGS
    }
    exit_code(monkeypatch, "link", "--help-all")
    everything = capsys.readouterr().out
    assert "--search.num-to-certify INT" in everything
    assert all(f"--{name.replace('_', '-')}" in everything for name in BASIC_SETTINGS)
    for asked in ("--help", "--help-all"):
        exit_code(monkeypatch, "link", str(ROOT / "examples/emoji/link.toml"), asked)
        assert "build/emoji/knowledge_base" in capsys.readouterr().out


@pytest.mark.parametrize("script", sorted((ROOT / "jobs").glob("*.py")), ids=lambda script: script.stem)
def test_every_script_is_the_command_that_it_names(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    named = re.search(r"`(gemel [a-z-]+)`", script.read_text("utf-8"))
    assert named is not None
    assert f"usage: {named[1]} " in capsys.readouterr().out


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gemel", "--version"])
    main()
    assert capsys.readouterr().out == f"gemel {metadata.version('gemel-engine')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing subcommand"),
        (("linc",), "Unrecognized options: linc"),
        (("link",), "name a configuration: gemel link CONFIG.toml"),
        (("link", "--input", "x"), "name a configuration: gemel link CONFIG.toml"),
        (("train", "nowhere.toml"), "nowhere.toml can't be read"),
        (("link", "examples/emoji/link.toml", "--search.widt", "3"), "gemel link examples/emoji/link.toml --help"),
        (("build-kb", "entities.parquet", "kb"), "--tokenizer"),
        (("import-gemel", "mapper", "only.pkl"), "OUTPUT_DIR"),
        (("evaluate", "out", "--gallery-size", "-1"), "--gallery-size is -1: Input should be greater than or equal"),
        (("calibrate", "out", "c", "--nil-precision", "nan"), "--nil-precision is nan: Input should be a finite"),
        (("build-kb", "e", "kb", "--tokenizer", "t", "--max-name-tokens", "0"), "--max-name-tokens is 0: "),
        (
            ("build-kb", "e", "kb", "--tokenizer", "t", "--no-evidence", "--mention-encoder", "m"),
            "--no-evidence is given",
        ),
        (("build-kb", "e", "kb", "--tokenizer", "t", "--image-encoder-pretrained", "w"), "without --image-encoder"),
        (("build-demonstrations", "m", "e", "out", "--image-encoder-pretrained", "w"), "without --image-encoder"),
        (("build-demonstrations", "m", "e", "out"), "--mention-encoder is missing"),
        (("update-kb", "kb", "c", "s3://b/kb2", "--tokenizer", "t"), "--output-dir is 's3:/b/kb2': give a local path"),
        (("import-gemel", "mentions", "in", "s3://b/out"), "--output-dir is 's3:/b/out': give a local path"),
        (("import", "dbpedia", "d.ttl", "s3://b/e.parquet"), "the output is 's3://b/e.parquet': give a local path"),
        (("plan", "examples/emoji/link.toml", "--previous", "old"), "leave it out"),
        (("plan", "examples/emoji/link.toml", "--price-per-actor-hour", "inf"), "price_per_actor_hour: Input should"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_an_error_ends_a_command_with_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = exit_code(monkeypatch, "import-gemel", "mentions", str(tmp_path), str(tmp_path / "out"))
    assert code == InputError.exit_code
    assert f"error: {tmp_path} has neither train.json" in capsys.readouterr().err


def test_an_untrained_mapper_fits_its_models(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [f"--{name}={artifacts[name.replace('-', '_')]}" for name in ("language-model", "image-encoder")]
    monkeypatch.setattr(sys, "argv", ["gemel", "init-mapper", str(tmp_path), *models, "--prefix-length", "3"])
    main()
    found = FeatureMapper.load(tmp_path).metadata
    expected = FeatureMapper.load(artifacts["feature_mapper"]).metadata
    assert (found.prefix_length, found.vision_width) == (3, expected.vision_width)
    assert found.image_encoder_fingerprint == expected.image_encoder_fingerprint
    assert found.language_model_fingerprint == language_model_fingerprint(str(artifacts["language_model"]))


def test_demonstrations_take_the_pictures_that_linking_takes() -> None:
    options = EncoderOptions()
    assert options.max_image_bytes == ImagePolicy().max_bytes
    assert options.max_image_pixels == VisionSettings().max_image_pixels
