"""Files of the layout that GEMEL's authors released, and linking with the features that they bring."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.corpus import toml
from torch import nn

from gemel_engine.cli.main import main
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.gemel_release import import_mapper, import_mentions
from gemel_engine.linking.stages import GenerateEntityNames
from gemel_engine.pipeline.corpus import plan_shards
from gemel_engine.pipeline.stages import read_mentions
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.reading import read_demonstrations, read_names
from gemel_engine.vision.mapper import FeatureMapper

C, P, D = 64, 2, 64
PICTURES = ["https://example.org/a/Bear.jpg", "train 7.png"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two splits and the features of two pictures, one named by an address with slashes."""
    with h5py.File(tmp_path / "clip.hdf5", "w") as file:
        for number, name in enumerate(PICTURES):
            file[name] = np.full((1, C), number + 1, np.float16)
    train = [
        {"mention": "bear", "text": "A bear.", "target": "brown bear", "golden": "Q0", "img_url": PICTURES[0]},
        {"mention": "it", "text": "Look at it.", "target": "nil", "golden": "NIL", "img_url": PICTURES[0]},
        {"mention": "train", "text": "A train.", "target": "steam train", "golden": "Q4", "img_name": PICTURES[1]},
    ]
    for name, rows in (("train", train), ("dev", train[:1])):
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_job(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gemel", "import-gemel", *map(str, arguments)])
    main()


def test_a_released_mapper_keeps_its_arithmetic(
    language_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = nn.Linear(C, P * D).half()
    torch.save(linear.state_dict(), tmp_path / "linear.pkl")
    run_job(
        monkeypatch, "mapper", tmp_path / "linear.pkl", tmp_path / "mapper", "--language-model", language_models["opt"]
    )
    mapper = FeatureMapper.load(tmp_path / "mapper")
    assert (mapper.metadata.prefix_length, mapper.metadata.initialisation) == (P, "imported")
    features = torch.randn(3, C)
    torch.testing.assert_close(mapper(features).flatten(1), linear.float()(features))


def test_a_checkpoint_that_is_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(P * D, C), "bias": Path("x")}, tmp_path / "object.pkl")
    with pytest.raises(ArtifactError, match="is damaged, or holds more than tensors"):
        import_mapper(tmp_path / "object.pkl", D)
    with pytest.raises(ArtifactError, match="can't be read: No such file"):
        import_mapper(tmp_path / "none.pkl", D)
    torch.save({"weight": torch.zeros(P * D, C)}, tmp_path / "half.pkl")
    with pytest.raises(ArtifactError, match=r"holds \['weight'\]"):
        import_mapper(tmp_path / "half.pkl", D)
    torch.save(nn.Linear(C, P * D + 1).state_dict(), tmp_path / "shape.pkl")
    with pytest.raises(ArtifactError, match="make no prefix of embeddings of width 64"):
        import_mapper(tmp_path / "shape.pkl", D)


def test_mentions_keep_their_pictures_features(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(monkeypatch, "mentions", corpus, corpus / "out", "--features", corpus / "clip.hdf5")
    rows = pq.read_table(corpus / "out" / "train.parquet").to_pylist()
    assert [(row["mention_id"], row["entity_name"]) for row in rows] == [
        ("train-000001", "brown bear"),
        ("train-000003", "steam train"),
    ]
    assert [row["image_features"] for row in rows] == [[1.0] * C, [2.0] * C]
    entities = pq.read_table(corpus / "out" / "entities.parquet").to_pylist()
    assert entities == [{"entity_id": "Q0", "name": "brown bear"}, {"entity_id": "Q4", "name": "steam train"}]


def test_a_malformed_line_or_a_missing_picture_is_named(corpus: Path) -> None:
    with (corpus / "dev.json").open("a") as file:
        file.write('{"mention": "x", "text": "x", "target": "x", "golden": "Q1", "img_name": "absent.png"}\n{"mention"')
    with pytest.raises(InputError, match=r"dev\.json, line 2: .* no features of 'absent\.png'"):
        import_mentions(corpus / "dev.json", corpus / "clip.hdf5")
    with pytest.raises(InputError, match=r"dev\.json, line 3 is no JSON object"):
        import_mentions(corpus / "dev.json", None)
    with pytest.raises(InputError, match="no readable HDF5 file"):
        import_mentions(corpus / "dev.json", corpus / "train.json")


def test_features_are_linked_and_demonstrated_without_an_image_encoder(
    corpus: Path, artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(monkeypatch, "mentions", corpus, corpus / "out", "--features", corpus / "clip.hdf5")
    train = corpus / "out" / "train.parquet"
    demonstrations = read_demonstrations(str(train), read_names(str(corpus / "out" / "entities.parquet")))
    index = DemonstrationIndex.build(
        corpus / "index", demonstrations, MentionEncoder(str(artifacts["mention_encoder"]))
    )
    assert index.metadata.vision_width == C
    (corpus / "link.toml").write_text(toml(artifacts | {"demonstrations": corpus / "index"}, train, corpus / "linked"))
    config = load_config(LinkConfig, corpus / "link.toml")
    config = replace(config, vision=replace(config.vision, image_encoder=None))
    (shard,) = plan_shards(config.input, 10, config.vision.required_columns)
    mentions = read_mentions(pa.Table.from_pylist([asdict(shard)]), config.output, ("image_features",))
    generate = GenerateEntityNames(config)
    linked = generate(mentions)
    without = generate(mentions.drop_columns(["image_features"]))
    assert linked["error"].null_count == 2
    assert linked["log_prob"].to_pylist() != without["log_prob"].to_pylist()
    narrow = mentions.set_column(
        mentions.column_names.index("image_features"), "image_features", [[[1.0] * 3, [float("nan")] * C]]
    )
    assert [error.partition(",")[0] for error in generate(narrow)["error"].to_pylist()] == [
        "invalid_mention: image_features holds 3 numbers",
        "invalid_mention: image_features holds 64 numbers",
    ]
