"""The linking job as a user runs it, on tiny real models; test_on_ray.py has Ray, vLLM and S3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from support.corpus import mention_rows, picture, predictions, run_job, toml, write_mentions, write_unsorted
from support.models import llama_2_tokenizer, save_artifacts, save_tiny_model
from support.names import ENTITY_NAMES
from support.trouble import forget_checksum

from gemel_engine import storage
from gemel_engine.config.components import KnowledgeBaseSettings, VisionSettings
from gemel_engine.config.loading import config_json, load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.confidence import Calibration, LogisticModel, Term, scoring_settings
from gemel_engine.errors import ArtifactError, ConfigurationError, GemelError, InputError, TooManyFailuresError
from gemel_engine.evidence.retrieved import Retrieved
from gemel_engine.evidence.update import open_knowledge_base
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.linker import Linker, explain
from gemel_engine.linking.job import describe_run, link_corpus
from gemel_engine.linking.order import ordered_plan
from gemel_engine.linking.report import LinkReport
from gemel_engine.pipeline.corpus import plan_shards
from gemel_engine.pipeline.stages import Retrieve, read_mentions
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.types import Features, Mention
from gemel_engine.vision.mapper import FeatureMapper


@pytest.fixture
def config(artifacts: dict[str, Path], tmp_path: Path) -> LinkConfig:
    """A run over nine good mentions on the reference engine; tests replace what they are about."""
    path = tmp_path / "link.toml"
    path.write_text(toml(artifacts, write_mentions(tmp_path / "mentions.parquet"), tmp_path / "output"))
    return load_config(LinkConfig, path)


@pytest.fixture(scope="module")
def linked(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[LinkConfig, LinkReport]:
    """A finished run, which tests only look at, or copy."""
    directory = tmp_path_factory.mktemp("linked")
    path = directory / "link.toml"
    path.write_text(toml(artifacts, write_mentions(directory / "mentions.parquet"), directory / "output"))
    config = load_config(LinkConfig, path)
    return config, link_corpus(config)


def test_every_row_comes_out_once_in_order(linked: tuple[LinkConfig, LinkReport]) -> None:
    config, report = linked
    rows = predictions(config.output)
    assert [row["mention_id"] for row in rows] == [f"m{n}" for n in range(9)]
    assert all(row["error"] is None and row["certified"] for row in rows)
    assert {row["entity_name"] for row in rows} <= set(ENTITY_NAMES)
    assert all(len(row["demonstration_ids"]) == len(row["demonstration_entity_ids"]) == 2 for row in rows)
    assert all(0 < row["probability"] <= 1 and 0 <= row["unexplored_mass"] <= 1 for row in rows)
    assert (report.rows, report.errors, report.shards, report.feature_mapper) == (9, {}, 3, "random")
    assert set(report.stage_seconds) == {"image", "retrieval", "generation"}
    assert json.loads(storage.read_bytes(f"{config.output}/_report.json")) == asdict(report)
    assert not storage.exists(f"{config.output}/_parts")
    assert not storage.exists(f"{config.output}/_marks")


def test_many_small_files_become_few_shards(config: LinkConfig, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n, name in enumerate(["b", "a", "c", "a"]):
        row = {"mention_id": f"m{n}", "text": f"Look at {name}.", "mention": name}
        pq.write_table(pa.Table.from_pylist([row]), corpus / f"{n}.parquet")
    config = replace(config, input=str(corpus), rows_per_shard=3)
    plan = ordered_plan(config, plan_shards(config.input, config.rows_per_shard))
    assert [(shard.start, shard.stop) for shard in plan] == [(0, 3), (0, 1)]
    plan = ordered_plan(replace(config, output=f"{config.output}-large", rows_per_shard=9), plan)
    assert [(shard.start, shard.stop) for shard in plan] == [(0, 4)]
    assert pq.read_table(plan[0].uri)["mention_id"].to_pylist() == ["m1", "m3", "m0", "m2"]


def test_equal_surface_forms_meet_in_one_shard(config: LinkConfig, tmp_path: Path) -> None:
    corpus, expected = write_unsorted(tmp_path / "corpus")
    unsorted: dict[str, Any] = {"input": str(corpus), "rows_per_shard": 6, "max_failed_fraction": 0.1}
    config = replace(config, vision=VisionSettings(), **unsorted)
    storage.write_bytes(f"{config.output}/_ordered/stopped/000000000000.parquet", b"")
    report = link_corpus(config)
    assert (report.rows, report.shards, report.errors) == (18, 3, {"invalid_mention": 1})
    assert [row["mention_id"] for row in predictions(config.output)] == expected
    (Path(config.output) / "data/shard-00001.parquet").unlink()
    (sort,) = Path(config.output, "_ordered").iterdir()
    assert sort.name in Path(config.output, "_plan.json").read_text()
    assert link_corpus(config).shards_skipped == 2
    assert [row["mention_id"] for row in predictions(config.output)] == expected


def test_the_linker_gives_the_same(linked: tuple[LinkConfig, LinkReport]) -> None:
    config, _ = linked
    linker = Linker(config)
    for row, expected in list(zip(mention_rows(), predictions(config.output), strict=True))[:4]:
        prediction = linker.link_one(row["text"], row["mention"], row["image_bytes"])
        assert (prediction.entity_id, prediction.num_rollouts) == (expected["entity_id"], expected["num_rollouts"])
        assert prediction.log_prob == pytest.approx(expected["log_prob"], abs=1e-4)


def test_a_linker_serves_several_threads(config: LinkConfig) -> None:
    linker = Linker(config)
    calls = [(row["text"], row["mention"], row["image_bytes"]) for row in mention_rows()[:4]] * 4
    alone = [linker.link_one(*call) for call in calls[:4]] * 4
    with ThreadPoolExecutor(8) as threads:
        linked = list(threads.map(lambda call: linker.link_one(*call), calls))
        explained = list(
            threads.map(lambda call: explain(linker, Mention("0", call[0], call[1]), call[2]).prediction, calls[:4])
        )
    for found, expected in zip([*linked, *explained], [*alone, *alone[:4]], strict=True):
        assert (found.entity_id, found.error) == (expected.entity_id, None)
        assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)


def test_a_tokenizer_that_begins_texts_with_a_space_links_with_newlines(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    model = save_tiny_model("llama", llama_2_tokenizer(), tmp_path / "model")
    made = save_artifacts(tmp_path, model, artifacts["mention_encoder"])
    path = tmp_path / "link.toml"
    path.write_text(toml(made, write_mentions(tmp_path / "mentions.parquet"), tmp_path / "output"))
    prediction = Linker(load_config(LinkConfig, path)).link_one("Look at the bear.", "bear")
    assert prediction.error is None
    assert prediction.certified


def test_a_rerun_skips_finished_shards_and_refuses_other_settings(
    linked: tuple[LinkConfig, LinkReport], tmp_path: Path
) -> None:
    finished, _ = linked
    config = replace(finished, output=str(tmp_path / "copy"))
    shutil.copytree(finished.output, config.output)
    Path(config.output, "data/shard-00001.parquet").unlink()
    report = link_corpus(config)
    assert (report.shards_skipped, report.rows_linked_now, report.rows) == (2, 4, 9)
    assert predictions(config.output) == predictions(finished.output)
    link_corpus(config)  # has nothing to do, and leaves the report of who did the work
    assert json.loads(Path(config.output, "_report.json").read_text()) == asdict(report)
    other = replace(config, search=replace(config.search, objective="mean"))
    with pytest.raises(ConfigurationError, match=r"differs in settings\.search\.objective"):
        link_corpus(other)


def test_a_finished_output_is_compared_with_its_plan(linked: tuple[LinkConfig, LinkReport], tmp_path: Path) -> None:
    """Nothing is left to link, and yet a shard with fewer rows, or a foreign table, does not pass for the output."""
    finished, _ = linked
    config = replace(finished, output=str(tmp_path / "copy"))
    shutil.copytree(finished.output, config.output)
    shard, foreign = (Path(config.output, "data", f"{name}.parquet") for name in ("shard-00001", "table"))
    pq.write_table(pq.read_table(shard), foreign)
    for check in (link_corpus, describe_run):
        with pytest.raises(
            InputError, match=r"data/table\.parquet' is no shard of this run: remove it and run the same"
        ):
            check(config)
    foreign.unlink()
    pq.write_table(pq.read_table(shard).slice(1), shard)
    for check in (link_corpus, describe_run):
        with pytest.raises(InputError, match=r"shard-00001\.parquet' has 3 of its 4 rows: remove it and run the same"):
            check(config)
    shard.unlink()
    assert link_corpus(config).rows_linked_now == 4
    assert predictions(config.output) == predictions(finished.output)


def test_an_output_within_the_input_is_refused_at_the_first_run(config: LinkConfig, tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "run"):
        with pytest.raises(ConfigurationError, match="choose an output outside of the input"):
            link_corpus(replace(config, input=str(tmp_path), output=str(output)))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_checks_and_says_what_is_left(linked: tuple[LinkConfig, LinkReport], tmp_path: Path) -> None:
    config, _ = linked
    assert describe_run(config).startswith(f"{config.output}: 0 of 9 rows are to be linked, in 0 of 3 shards")
    fresh = replace(config, output=str(tmp_path / "fresh"))
    assert "9 of 9 rows are to be linked, in 3 of 3 shards" in describe_run(fresh)
    assert not storage.exists(fresh.output)
    with pytest.raises(ConfigurationError, match=r"settings\.rows_per_shard"):
        describe_run(replace(config, rows_per_shard=5))


def test_a_calibration_gives_confidence(config: LinkConfig, tmp_path: Path) -> None:
    model = LogisticModel(terms={"logit_probability": Term(mean=0.0, scale=1.0, weight=1.0)}, bias=0.0)
    scoring = scoring_settings(json.loads(config_json(config)))
    parts: dict[str, Any] = {"right": model, "nil": model, "nil_threshold": 0.5, "scoring": scoring, "fitted_on": {}}
    Calibration(weights=None, contents={}, **parts).save(tmp_path / "calibration")
    config = replace(config, calibration=str(tmp_path / "calibration"))
    found = Linker(config).link_one("Look at the bear over there.", "bear")
    assert found.probability is not None
    assert found.confidence == pytest.approx(found.probability)  # since that model is the identity
    assert found.is_nil == (found.probability >= 0.5)
    with pytest.raises(ConfigurationError, match=r"other settings of search\.max_rollouts"):
        link_corpus(replace(config, search=replace(config.search, max_rollouts=3)))
    assert not storage.exists(config.output)
    Calibration(weights=None, contents={"knowledge_base": "another"}, **parts).save(tmp_path / "calibration")
    with pytest.raises(ArtifactError, match="was fitted with another knowledge base than"):
        describe_run(config)
    weights = ScoreWeights(features={}, language_model=1.0, risks=(), fitted_on={})
    Calibration(weights=weights, contents={}, **parts).save(tmp_path / "calibration")
    with pytest.raises(ConfigurationError, match="fitted on a run with candidate pools, which this lacks"):
        describe_run(config)


def test_bad_rows_become_errors_and_too_many_fail_the_job_at_its_end(config: LinkConfig, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture("red"))
    corpus = write_mentions(
        tmp_path / "bad.parquet",
        (0, {"mention": " ", "mention_start": None}),
        (1, {"text": None}),
        (2, {"mention_start": 99}),
        (3, {"image_bytes": b"no picture", "candidate_ids": ["Q3"]}),
        (4, {"image_bytes": None, "image_uri": str(outside)}),
        (5, {"text": "very long " * 500, "mention_start": None}),
        (6, {"candidate_ids": ["Q1", "no such entity"]}),
        (7, {"candidate_ids": ["Q9", "Q3"]}),
    )
    config = replace(config, input=str(corpus), max_failed_fraction=0.5)
    with pytest.raises(TooManyFailuresError, match=r"6 of 9 rows failed .*max_failed_fraction 0\.5"):
        link_corpus(config)
    rows = predictions(config.output)
    kinds = [row["error"] and row["error"].partition(":")[0] for row in rows]
    assert kinds == [
        "invalid_mention",
        "invalid_mention",
        "invalid_mention",
        "image",
        "image_fetch",
        None,
        "invalid_mention",
        None,
        None,
    ]
    report = json.loads(storage.read_bytes(f"{config.output}/_report.json"))
    assert report["errors"] == {"invalid_mention": 4, "image": 1, "image_fetch": 1}
    assert {candidate["entity_id"] for candidate in rows[7]["candidates"]} == {"Q9", "Q3"}
    assert [row["mention_id"] for row in rows] == [f"m{n}" for n in range(9)]
    assert all(row["entity_id"] is None and row["candidates"] == [] for row in rows[:7] if row["error"])
    assert [row["num_characters_dropped"] or 0 for row in rows[5:]] == [rows[5]["num_characters_dropped"], 0, 0, 0]
    assert 4000 < rows[5]["num_characters_dropped"] < 5000


Change = Callable[[LinkConfig, Path], LinkConfig]


def test_a_row_that_fails_in_retrieval_alone_becomes_an_error(
    config: LinkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def retrieve(mentions: Sequence[Mention], features: Sequence[Features | None]) -> list[Retrieved]:
        if any(mention.mention_id == "m1" for mention in mentions):
            raise RuntimeError("the expanded size must match")
        return retriever.retrieve(mentions, features)

    stage = Retrieve(config)
    retriever = stage._retriever
    monkeypatch.setattr(stage, "_retriever", SimpleNamespace(retrieve=retrieve))
    (shard,) = plan_shards(config.input, 10)
    found = stage(read_mentions(pa.Table.from_pylist([asdict(shard)]), config.output, ()))
    assert found.num_rows == len(mention_rows())
    for row in found.select(["mention_id", "error", "retrieved"]).to_pylist():
        if row["mention_id"] == "m1":
            assert row["error"] == (
                "failed: RuntimeError in stage retrieval, of this row alone: the expanded size must match"
            )
        else:
            assert (row["error"], len(row["retrieved"]["shared"])) == (None, 2)


def with_table(config: LinkConfig, directory: Path, table: pa.Table) -> LinkConfig:
    pq.write_table(table, directory / "changed.parquet")
    return replace(config, input=str(directory / "changed.parquet"))


def without_text(config: LinkConfig, directory: Path) -> LinkConfig:
    return with_table(config, directory, pq.read_table(config.input).drop_columns(["text"]))


def with_repeated_id(config: LinkConfig, directory: Path) -> LinkConfig:
    table = pq.read_table(config.input)
    return with_table(config, directory, pa.concat_tables([table, table.slice(3, 1)]))


def with_numeric_mention(config: LinkConfig, directory: Path) -> LinkConfig:
    table = pq.read_table(config.input)
    return with_table(config, directory, table.set_column(2, "mention", pa.array(range(9))))


def without_rows(config: LinkConfig, directory: Path) -> LinkConfig:
    return with_table(config, directory, pq.read_table(config.input).slice(0, 0))


def with_other_mapper(config: LinkConfig, directory: Path) -> LinkConfig:
    FeatureMapper.random(FeatureMapper.load(str(config.vision.feature_mapper)).metadata.vision_width, 2, 32, 0).save(
        directory / "mapper"
    )
    return replace(config, vision=replace(config.vision, feature_mapper=str(directory / "mapper")))


def with_mapper_of_another_width(config: LinkConfig, directory: Path) -> LinkConfig:
    FeatureMapper.random(7, 2, 64, 0).save(directory / "mapper")
    return replace(config, vision=replace(config.vision, feature_mapper=str(directory / "mapper")))


def with_mapper_for_another_model(config: LinkConfig, directory: Path) -> LinkConfig:
    width = FeatureMapper.load(str(config.vision.feature_mapper)).metadata.vision_width
    FeatureMapper.random(width, 2, 64, 0, language_model_fingerprint="another").save(directory / "mapper")
    return replace(config, vision=replace(config.vision, feature_mapper=str(directory / "mapper")))


def with_other_tokenizer(config: LinkConfig, directory: Path) -> LinkConfig:
    model = Path(config.language_model.name)
    other = directory / "model"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return replace(config, language_model=replace(config.language_model, name=str(other)))


def with_added_token(config: LinkConfig, directory: Path) -> LinkConfig:
    shutil.copytree(config.language_model.name, directory / "model")
    tokenizer = load_tokenizer(str(directory / "model"))
    tokenizer.add_tokens(["snorkel"])
    tokenizer.save_pretrained(directory / "model")
    return replace(config, language_model=replace(config.language_model, name=str(directory / "model")))


def without_knowledge_base(config: LinkConfig, directory: Path) -> LinkConfig:
    return replace(config, knowledge_base=str(directory / "nowhere"))


def with_knowledge_base_of_another_version(config: LinkConfig, directory: Path) -> LinkConfig:
    copy = directory / "kb"
    (copy / "trie").mkdir(parents=True)
    for file in Path(config.knowledge_base).rglob("*.*"):
        (copy / file.relative_to(config.knowledge_base)).write_bytes(file.read_bytes())
    manifest = json.loads((copy / "knowledge_base.json").read_text())
    (copy / "knowledge_base.json").write_text(json.dumps(manifest | {"format_version": 99}))
    return replace(config, knowledge_base=str(copy))


def without_language_model(config: LinkConfig, directory: Path) -> LinkConfig:
    return replace(config, language_model=replace(config.language_model, name=str(directory / "nowhere")))


def with_language_model_that_lacks_a_tensor(config: LinkConfig, directory: Path) -> LinkConfig:
    model = Path(shutil.copytree(config.language_model.name, directory / "model"))
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return replace(config, language_model=replace(config.language_model, name=str(model)))


def with_trie_of_another_knowledge_base(config: LinkConfig, directory: Path) -> LinkConfig:
    """Of an earlier release, in which the files of a knowledge base did not name each other."""
    entities = open_knowledge_base(config.knowledge_base).table()
    names = [name[::-1] for name in entities["name"].to_pylist()]
    tokenizer = load_tokenizer(config.language_model.name)
    other = entities.set_column(entities.column_names.index("name"), "name", pa.array(names))
    build_knowledge_base(other, tokenizer, directory / "other", KnowledgeBaseSettings())
    mixed = Path(shutil.copytree(config.knowledge_base, directory / "kb"))
    shutil.copytree(directory / "other" / "trie", mixed / "trie", dirs_exist_ok=True)
    forget_checksum(mixed / "knowledge_base.json", format_version=1, also=["trie_sha256"])
    return replace(config, knowledge_base=str(mixed))


def with_template_of_an_attribute(config: LinkConfig, directory: Path) -> LinkConfig:
    return replace(config, prompt=replace(config.prompt, template="{text.body} {mention}"))


def with_template_without_mention(config: LinkConfig, directory: Path) -> LinkConfig:
    return replace(config, prompt=replace(config.prompt, template="{text}"))


def with_gemma(config: LinkConfig, directory: Path) -> LinkConfig:
    model = save_tiny_model("gemma3", load_tokenizer(config.language_model.name), directory / "gemma")
    return replace(config, language_model=replace(config.language_model, name=str(model)))


def with_prompts_too_long_for_the_model(config: LinkConfig, directory: Path) -> LinkConfig:
    return replace(config, prompt=replace(config.prompt, max_prompt_tokens=1024))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without_text, InputError, "has no column 'text'"),
        (with_template_of_an_attribute, ConfigurationError, r"'\{text.body\} \{mention\}' is malformed"),
        (with_template_without_mention, ConfigurationError, r"must hold the fields \{text\} and \{mention\}"),
        (with_gemma, ConfigurationError, "useless without a BOS token: set it to true"),
        (with_prompts_too_long_for_the_model, ConfigurationError, r"reads 1024 at most: set prompt\.max_prompt_tokens"),
        (with_repeated_id, InputError, r"repeats 1 mention_id, such as \['m3'\]"),
        (with_numeric_mention, InputError, "column 'mention' is of type int64, it must be string"),
        (without_rows, InputError, "has no rows"),
        (with_other_mapper, ArtifactError, "makes embeddings of width 32, but"),
        (with_mapper_of_another_width, ArtifactError, "different image encoders"),
        (with_mapper_for_another_model, ArtifactError, "made for another language model"),
        (with_other_tokenizer, ArtifactError, "built with another tokenizer"),
        (with_added_token, ArtifactError, "tokens beyond them, such as 'snorkel': resize the model's embeddings"),
        (without_knowledge_base, ArtifactError, "nowhere"),
        (with_knowledge_base_of_another_version, ArtifactError, "format version 99"),
        (without_language_model, ArtifactError, "nowhere"),
        (with_language_model_that_lacks_a_tensor, ArtifactError, r"lacks the tensors model\.norm\.weight"),
        (with_trie_of_another_knowledge_base, ArtifactError, "they are of two knowledge bases"),
    ],
)
def test_a_bad_job_stops_before_any_work(
    config: LinkConfig, tmp_path: Path, change: Change, error: type[GemelError], message: str
) -> None:
    changed = change(config, tmp_path)
    with pytest.raises(error, match=message):
        describe_run(changed)
    with pytest.raises(error, match=message):
        link_corpus(changed)
    assert not Path(config.output).exists()


def test_exit_codes_of_the_command(config: LinkConfig, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text((tmp_path / "link.toml").read_text() + "\n[search]\nobjectiv = 'sum'\n")
    finished = run_job(path)
    assert finished.returncode == 2
    assert "unknown key 'search.objectiv'; did you mean 'objective'?" in finished.stderr
    assert "Traceback" not in finished.stderr
