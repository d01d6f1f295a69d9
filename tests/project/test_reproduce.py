"""The paper's table from published files: each step against a server on loopback, with tiny models."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tomllib
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import picture
from support.loopback import Answer, Loopback, serve
from support.names import ENTITY_NAMES
from support.paths import ROOT

from examples import reproduce
from examples.downloads import Downloader, Politeness, thumbnail
from examples.leak_audit import audit, file_name
from examples.reproduce import Corpus
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig, TrainConfig

NAMES = ENTITY_NAMES[:6]
COUNTS = {"train": 8, "valid": 3, "test": 4}


def captions(url: str, split: str) -> list[Any]:
    """A split in WikiDiverse's layout; test has a caption and a picture of training, and a picture that is missing."""
    rows: list[Any] = []
    for number in range(COUNTS[split]):
        name = NAMES[number % len(NAMES)]
        start = len("Look, a ")
        address = f"https://en.wikipedia.org/wiki/{name.replace(' ', '_')}"
        of_split = "train" if (split, number) == ("test", 1) else split
        place = "missing" if (split, number) == ("test", 2) else f"{of_split}{number}.png"
        mentions = [[name, "Thing", start, start + len(name), address], ["Look", "Thing", 0, 4, ""]]
        text = f"Look, a {name}." if (split, number) == ("test", 0) else f"Look, a {name} {split}."
        rows.append([text, f"{url}/pictures/{place}", "things", mentions])
    if split == "train":
        rows[0][0] = "Look, a brown bear."
    return rows


def answer_of(url: str, path: str) -> Answer:
    """The archive of the splits, or a picture of a colour of its own."""
    if path == "/corpus.zip":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as opened:
            for split in COUNTS:
                opened.writestr(f"../../data/{split}.json", json.dumps(captions(url, split)))
            opened.writestr("readme.html", "<html>")
        return Answer(body=archive.getvalue())
    if "missing" in path:
        return Answer(404)
    return Answer(body=picture(f"#{zlib.crc32(path.encode()) & 0xFFFFFF:06x}"))


def corpus(url: str, training: Path, **changes: Any) -> Corpus:
    settings = {
        "name": "Tiny",
        "layout": "wikidiverse",
        "training": str(training),
        "origins": [url],
        "files": [{"name": "corpus.zip", "page": "the page", "address": f"{url}/corpus.zip"}],
        **{name: f"corpus/{split}.json" for name, split in zip(reproduce.SPLITS, COUNTS, strict=True)},
        "seconds_between_requests": 0.0,
        "published": {"GEMEL": 86.3},
    }
    return Corpus.model_validate(settings | changes)


def downloader(corpus: Corpus) -> Downloader:
    return Downloader(Politeness(origins=corpus.origins, seconds_between_requests=0.0, max_retries=0), "test")


@pytest.mark.unit
@pytest.mark.parametrize("name", ["wikidiverse", "wikimel"])
def test_the_configurations_name_what_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = Corpus.model_validate(tomllib.loads(Path(f"examples/{name}/reproduce.toml").read_text()))
    assert load_config(TrainConfig, settings.training).search.objective == "mean"
    for file in settings.files:
        assert file.address is not None
        assert "/".join(file.address.split("/")[:3]) in settings.origins
    assert len(Path(f"examples/{name}/README.md").read_text().splitlines()) <= 40


@pytest.mark.unit
@pytest.mark.parametrize("name", ["wikidiverse_opt", "wikimel_opt"])
def test_training_and_linking_get_settings_that_they_know(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(reproduce, "gemel", lambda *arguments: commands.append([*map(str, arguments)]))
    path = ROOT / f"jobs/configs/{name}.toml"
    training = tomllib.loads(path.read_text())
    reproduce.build(tmp_path, training)
    reproduce.train(tmp_path, path)
    reproduce.link(tmp_path, training, tmp_path / "test.parquet", "linked")
    assert [command[0] for command in commands] == ["build-kb", "build-demonstrations", "train", "link"]
    _, config, *overrides = commands[2]
    trained = load_config(TrainConfig, Path(config), overrides)
    assert trained.image_source.allowed_prefixes == (str(tmp_path / "pictures"),)
    linking = load_config(LinkConfig, Path(commands[3][1]))
    assert (linking.score.kind, linking.search.objective, linking.resources.generation.num_gpus) == (
        "language_model",
        "mean",
        0.8,
    )
    assert linking.vision.feature_mapper == f"{trained.output}/feature_mapper"
    assert (linking.prompt, linking.retrieval) == (trained.prompt, trained.retrieval)


@pytest.mark.unit
def test_files_are_unpacked_and_what_is_no_corpus_is_asked_of_the_user(tmp_path: Path) -> None:
    with serve(lambda path: answer_of("http://x", path)) as server:
        tiny = corpus(server.url, tmp_path)
        reproduce.fetch_files(tiny, tmp_path / "work", downloader(tiny))
        reproduce.fetch_files(tiny, tmp_path / "work", downloader(tiny))
        assert server.requests == ["/corpus.zip"]
        assert sorted(os.listdir(tmp_path / "work/files/corpus")) == ["test.json", "train.json", "valid.json"]
        assert os.listdir(tmp_path) == ["work"]
    with serve(lambda _: Answer(body=b"<html>sign in</html>")) as server:
        tiny = corpus(server.url, tmp_path)
        with pytest.raises(SystemExit, match=r"neither a ZIP archive nor JSON. Download the page in a browser to "):
            reproduce.fetch_files(tiny, tmp_path / "other", downloader(tiny))
    with pytest.raises(SystemExit, match="correct `train`"):
        reproduce.import_mentions(corpus("http://x", tmp_path, train="*.csv"), tmp_path / "work")


@pytest.mark.unit
def test_pictures_that_a_browser_fetched_are_found_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "imported").mkdir()
    row = {"mention_id": "0", "group": "g", "entity_id": "Q1", "entity_name": "x", "image_uri": "https://a/b.png"}
    for split in reproduce.SPLITS:
        mentions = pa.Table.from_pylist([row, row | {"image_uri": "c.jpg"}, row | {"entity_id": None}])
        pq.write_table(mentions, tmp_path / f"imported/{split}.parquet")
    by_hand = corpus("http://x", tmp_path, pictures_page="the page")
    with pytest.raises(SystemExit, match="download the page in a browser, and unpack it there"):
        reproduce.fetch_pictures(by_hand, tmp_path, downloader(by_hand))
    (tmp_path / "pictures/sub").mkdir(parents=True)
    (tmp_path / "pictures/sub/b.jpg").write_bytes(b"x")
    reproduce.fetch_pictures(by_hand, tmp_path, downloader(by_hand))
    found = pq.read_table(tmp_path / "test.parquet").to_pylist()
    assert [(row["mention_id"], row["image_uri"]) for row in found] == [("test-0", "sub/b.jpg"), ("test-0", None)]


@pytest.mark.unit
def test_pictures_of_commons_are_asked_for_in_a_small_size() -> None:
    original = "https://upload.wikimedia.org/wikipedia/commons/0/06/A%C3%A9_b.jpg"
    small = "https://commons.wikimedia.org/wiki/Special:FilePath/A%C3%A9_b.jpg?width=500"
    assert thumbnail(original) == small
    assert thumbnail("https://upload.wikimedia.org/wikipedia/en/0/06/A.jpg").endswith("/en/0/06/A.jpg")
    assert {file_name(address) for address in (original, small, "commons/thumb/0/06/x/500px-Aé b.jpg")} == {"Aé_b.jpg"}


@pytest.mark.unit
def test_leaks_are_found(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1"), ("d", b"3")):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(content)

    def mentions(split: str, texts: list[str], files: list[str | None], addresses: list[str]) -> pa.Table:
        return pa.table(
            {
                "mention_id": [f"{split}-{number}" for number in range(len(texts))],
                "text": texts,
                "mention": ["x"] * len(texts),
                "entity_id": ["Q1"] * len(texts),
                "image_uri": pa.array(files, pa.string()),
                "image_address": addresses,
            }
        )

    train = mentions("train", ["seen", "other"], ["a", "b"], ["t/A.jpg", "t/B.jpg"])
    test = mentions(
        "test", ["seen", "new", "newer", "newest"], [None, "c", "d", "d"], ["C", "D", "wiki/Own x.jpg", "E"]
    )
    entities = pa.table({"entity_id": ["Q1", "Q2"], "image_uri": [["https://c/FilePath/Own_x.jpg?width=500"], None]})
    found = {name: is_shared.tolist() for name, is_shared in audit(train, test, entities, tmp_path).items()}
    assert found == {
        "mention_ids": [False] * 4,
        "texts": [True, False, False, False],
        "mentions_in_texts": [True, False, False, False],
        "pictures": [False, True, False, False],
        "own_pictures": [False, False, True, False],
    }


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_table_is_made_by_one_command(artifacts: dict[str, Path], tmp_path: Path) -> None:
    training = tmp_path / "training.toml"
    training.write_text(
        f"""
train = "x"
output = "x"
knowledge_base = "x"
demonstrations = "x"
max_failed_fraction = 0.5
[language_model]
name = "{artifacts["language_model"]}"
dtype = "float32"
[vision]
image_encoder = "{artifacts["image_encoder"]}"
[retrieval]
mention_encoder = "{artifacts["mention_encoder"]}"
num_demonstrations = 2
num_candidates = 0
[prompt]
max_prompt_tokens = 600
query_reserve = 200
[search]
objective = "mean"
[mapper]
initialisation = "random"
[optimisation]
epochs = 1
batch_size = 4
[validation]
num_mentions = 0
"""
    )
    ids = [name.replace(" ", "_") for name in NAMES[:3]]
    candidates = [{"mention_id": f"test-test-{n}-0", "candidate_ids": ids} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(candidates), tmp_path / "candidates.parquet")
    work = tmp_path / "work"
    servers: list[Loopback] = []
    num_files = sum(COUNTS.values())  # the archive, and pictures, one of which two splits have
    with serve(lambda path: answer_of(servers[0].url, path)) as server:
        servers.append(server)
        (tmp_path / "tiny.toml").write_text(as_toml(corpus(server.url, training)))
        command = [sys.executable, "-m", "examples.reproduce", str(tmp_path / "tiny.toml"), str(work)]
        command += ["--contact", "test@example.org", "--candidates", str(tmp_path / "candidates.parquet")]
        first = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert first.returncode == 0, first.stderr[-4000:]
        assert len(server.requests) == num_files
        assert set(server.user_agents) == {"gemel-engine-reproduce/0.1 (test@example.org)"}
        second = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert len(server.requests) == num_files
    assert second.stdout == first.stdout
    result = json.loads((work / "result.json").read_text())
    assert result["leaks"] == {"mention_ids": 0, "texts": 1, "mentions_in_texts": 1, "pictures": 1, "own_pictures": 0}
    counts = [(row["protocol"], row["mentions"], row["num_mentions"]) for row in result["reproduced"]]
    assert counts == [
        ("entity", "all", 4),
        ("entity", "without leaks", 2),
        ("name", "all", 4),
        ("name", "without leaks", 2),
        ("candidates", "all", 3),
        ("candidates", "without leaks", 1),
    ]
    assert "| GEMEL | as reported | | 86.3 |" in first.stdout


def as_toml(corpus: Corpus) -> str:
    (file,) = corpus.files
    settings = corpus.model_dump(mode="json", exclude={"files", "published", "pictures_page"})
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    lines += ["[[files]]", *(f"{name} = {json.dumps(value)}" for name, value in file.model_dump().items())]
    return "\n".join([*lines, "[published]", *(f"{name} = {value}" for name, value in corpus.published.items())])
