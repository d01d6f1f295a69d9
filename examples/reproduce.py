"""Reproduce GEMEL's table on a published corpus: download, import, build, train, link, evaluate.

python -m examples.reproduce examples/wikidiverse/reproduce.toml WORK --contact you@example.org

Run from the root of the repository, on a machine with a GPU and a network. Each step leaves its result under WORK,
and the same command skips the steps whose result is there. What is downloaded from where: README.md beside the
configuration.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from examples.downloads import Downloader, DownloadError, Politeness, check_picture, download_all, thumbnail
from examples.leak_audit import audit
from gemel_engine.evaluation.run import LinkedRun, judge_run

SPLITS = ("train", "dev", "test")
Protocol = Literal["entity", "name", "candidates"]
MAX_PICTURE_BYTES, MAX_FILE_BYTES = 20_000_000, 1 << 30
# Tables of a configuration of training that linking has as well.
SHARED_TABLES = ("language_model", "vision", "retrieval", "prompt", "search")

logger = logging.getLogger("reproduce")


class Strict(BaseModel):
    """A table of the configuration, whose misspelt keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedFile(Strict):
    """A file of the authors.

    Attributes:
        name: Name under WORK/files.
        page: Where a browser finds it.
        address: Address for programs; None: it has to be fetched by hand.
    """

    name: str
    page: str
    address: str | None = None


class Corpus(Strict):
    """A published corpus.

    Attributes:
        name: Name of the corpus.
        layout: Layout of its files, see `gemel import mentions`.
        training: Configuration of training, which names the models.
        origins: The only scheme://host that are asked for files and pictures.
        files: Files of the authors.
        train: Pattern of the file of a split under WORK/files; `dev` and `test` likewise.
        pictures_page: Where a browser finds the pictures, which then belong into WORK/pictures; None: they are
            downloaded from the addresses in the corpus.
        seconds_between_requests: Least time between two requests to a host.
        published: Accuracies in percent as others report them, by system.
    """

    name: str
    layout: Literal["wikidiverse", "melbench"]
    training: Path
    origins: tuple[str, ...]
    files: tuple[PublishedFile, ...]
    train: str
    dev: str
    test: str
    pictures_page: str | None = None
    seconds_between_requests: float = 0.5
    published: dict[str, float]


def main(
    config: tyro.conf.Positional[Path],
    work: tyro.conf.Positional[Path],
    *,
    contact: Annotated[str, tyro.conf.arg(metavar="MAIL_OR_PAGE")],
    entities: Path | None = None,
    candidates: Path | None = None,
) -> None:
    """Do the steps whose results are missing, and print the table.

    Args:
        config: Configuration of the corpus.
        work: Directory of everything that is made.
        contact: Address of you, which the servers see: Wikimedia refuses clients without one.
        entities: Knowledge base as a table of entities, as `gemel import` writes it. Default: the entities of the
            corpus's own mentions, which is easier than in the paper.
        candidates: Table of `mention_id`, as in WORK/test.parquet, and `candidate_ids`, for the protocol `candidates`.
    """
    corpus = Corpus.model_validate(tomllib.loads(config.read_text("utf-8")))
    training: dict[str, Any] = tomllib.loads(corpus.training.read_text("utf-8"))
    politeness = Politeness(origins=corpus.origins, seconds_between_requests=corpus.seconds_between_requests)
    downloader = Downloader(politeness, f"gemel-engine-reproduce/0.1 ({contact})")
    fetch_files(corpus, work, downloader)
    import_mentions(corpus, work)
    fetch_pictures(corpus, work, downloader)
    write_entities(work, entities)
    build(work, training)
    train(work, corpus.training)
    runs: dict[str, tuple[Protocol, ...]] = {"linked": ("entity", "name")}
    link(work, training, work / "test.parquet", "linked")
    if candidates is not None:
        mentions = work / "test_candidates.parquet"
        if not mentions.exists():
            write(with_candidates(pq.read_table(work / "test.parquet"), pq.read_table(candidates)), mentions)
        link(work, training, mentions, "linked_candidates")
        runs["linked_candidates"] = ("candidates",)
    tables = {name: pq.read_table(work / f"{name}.parquet") for name in ("train", "test", "entities")}
    leaks = audit(tables["train"], tables["test"], tables["entities"], work)
    rows = list(evaluate(runs, leaks, work))
    shared = {name: int(is_shared.sum()) for name, is_shared in leaks.items()}
    result = {"corpus": corpus.name, "published": corpus.published, "reproduced": rows, "leaks": shared}
    (work / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(as_markdown(result))


def fetch_files(corpus: Corpus, work: Path, downloader: Downloader) -> None:
    """Download the authors' files and unpack archives; raise SystemExit for one that has to be fetched by hand."""
    for file in corpus.files:
        path = work / "files" / file.name
        if not path.exists():
            try:
                if file.address is None:
                    raise DownloadError("it has no address for programs", is_permanent=True)
                downloader.download(file.address, path, MAX_FILE_BYTES, check_published)
            except DownloadError as error:
                raise SystemExit(f"{file.name}: {error}. Download {file.page} in a browser to {path}") from error
        if path.suffix == ".zip":
            unpack(path, path.with_suffix(""))


def check_published(path: Path) -> None:
    """Raise ValueError if a file is neither an archive nor JSON: Google Drive answers with pages of HTML."""
    with path.open("rb") as stream:
        if stream.read(64).lstrip()[:1] not in (b"P", b"[", b"{"):
            raise ValueError("it is neither a ZIP archive nor JSON")


def unpack(archive: Path, directory: Path) -> None:
    """Unpack the JSON files of an archive, each under its own name alone."""
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            target = directory / Path(member.filename).name
            if target.suffix == ".json" and member.file_size <= MAX_FILE_BYTES and not target.exists():
                part = target.with_suffix(".part")
                part.write_bytes(opened.read(member))
                part.replace(target)


def import_mentions(corpus: Corpus, work: Path) -> None:
    """Import each split from the authors' layout."""
    for split in SPLITS:
        output = work / "imported" / f"{split}.parquet"
        pattern = getattr(corpus, split)
        found = sorted((work / "files").glob(pattern))
        if len(found) != 1:
            raise SystemExit(f"{len(found)} files are {work}/files/{pattern}, and one has to be: correct `{split}`")
        if not output.exists():
            gemel("import", "mentions", corpus.layout, found[0], output)


def fetch_pictures(corpus: Corpus, work: Path, downloader: Downloader) -> None:
    """Download pictures, and write the mentions with an entity whose `image_uri` is a name under WORK/pictures."""
    pictures = work / "pictures"
    if all((work / f"{split}.parquet").exists() for split in SPLITS):
        return
    splits = {split: pq.read_table(work / "imported" / f"{split}.parquet") for split in SPLITS}
    addresses = [uri for table in splits.values() for uri in table["image_uri"].drop_null().to_pylist()]
    if corpus.pictures_page is None:
        names = download_all(
            addresses, pictures, downloader, MAX_PICTURE_BYTES, asked_for=thumbnail, check=check_picture
        )
    elif not pictures.is_dir():
        raise SystemExit(f"{pictures} is missing: download {corpus.pictures_page} in a browser, and unpack it there")
    else:
        here = {path.stem: str(path.relative_to(pictures)) for path in pictures.rglob("*") if path.is_file()}
        names = {uri: here[stem] for uri in addresses if (stem := Path(uri).stem) in here}
    for split, table in splits.items():
        write(prepared(table, split, names), work / f"{split}.parquet")


def prepared(mentions: pa.Table, split: str, names: dict[str, str]) -> pa.Table:
    """Return the mentions that have an entity, with ids that are unique in the corpus, and their pictures' files."""
    rows = [row for row in mentions.to_pylist() if row["entity_id"] is not None]
    for row in rows:
        row["mention_id"], row["group"] = f"{split}-{row['mention_id']}", f"{split}-{row['group']}"
        row["image_address"], row["image_uri"] = row["image_uri"], names.get(row["image_uri"])
    return pa.Table.from_pylist(rows, mentions.schema.append(pa.field("image_address", pa.string())))


def write_entities(work: Path, given: Path | None) -> None:
    """Write the table of entities: the given one, and gold entities that it lacks."""
    output = work / "entities.parquet"
    if output.exists():
        return
    rows = [] if given is None else pq.read_table(given).to_pylist()
    known = {row["entity_id"] for row in rows}
    for split in SPLITS:
        for row in pq.read_table(work / f"{split}.parquet", columns=["entity_id", "entity_name"]).to_pylist():
            if row["entity_id"] not in known:
                rows.append({"entity_id": row["entity_id"], "name": row["entity_name"] or row["entity_id"]})
                known.add(row["entity_id"])
    write(pa.Table.from_pylist(rows), output)


def build(work: Path, training: dict[str, Any]) -> None:
    """Build the knowledge base, without evidence as in the paper, and the demonstrations with pictures' features."""
    model, vision = training["language_model"]["name"], training["vision"]
    entities, kb = work / "entities.parquet", work / "knowledge_base"
    if not (kb / "knowledge_base.json").exists():
        gemel("build-kb", entities, kb, "--tokenizer", model, "--on-bad-name", "skip", "--no-evidence")
    if not (work / "demonstrations/index.json").exists():
        gemel(
            *("build-demonstrations", work / "train.parquet", entities, work / "demonstrations"),
            *("--mention-encoder", training["retrieval"]["mention_encoder"]),
            *("--image-encoder", vision["image_encoder"]),
            *(("--image-encoder-pretrained", vision["pretrained"]) if "pretrained" in vision else ()),
            *("--device", vision.get("device", "cpu"), "--allowed-image-prefixes", pictures_of(work)),
        )


def train(work: Path, config: Path) -> None:
    """Train the feature mapper; an interrupted training goes on."""
    if not (work / "trained/feature_mapper/mapper.json").exists():
        gemel(
            *("train", config, "--train", work / "train.parquet", "--dev", work / "dev.parquet"),
            *("--output", work / "trained", "--knowledge-base", work / "knowledge_base"),
            *("--demonstrations", work / "demonstrations", "--image-source.allowed-prefixes", pictures_of(work)),
        )


def link(work: Path, training: dict[str, Any], mentions: Path, name: str) -> None:
    """Link mentions by the language model alone, as in the paper; an interrupted run goes on."""
    output, path = work / name, work / f"{name}.toml"
    tables = {table: dict(training.get(table, {})) for table in SHARED_TABLES}
    tables["language_model"].pop("activation_checkpointing", None)
    tables["vision"]["feature_mapper"] = str(work / "trained/feature_mapper")
    tables |= {"image_source": {"allowed_prefixes": [pictures_of(work)]}, "score": {"kind": "language_model"}}
    if training.get("workers", {}).get("use_gpu"):  # both models on one GPU, as in cluster/configs/link_1_gpu.toml
        tables["language_model"]["gpu_memory_utilization"] = 0.75
        tables |= {"resources.images": {"num_gpus": 0.2}, "resources.generation": {"num_gpus": 0.8}}
    places = {"input": mentions, "output": output, **{k: work / k for k in ("knowledge_base", "demonstrations")}}
    lines = [f"{key} = {json.dumps(str(place))}" for key, place in places.items()]
    for table, values in tables.items():
        lines += ["", f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines) + "\n")
    if not (output / "_report.json").exists():
        gemel("link", path)


def with_candidates(mentions: pa.Table, candidates: pa.Table) -> pa.Table:
    """Return the mentions that have candidates, with them."""
    of_mention = dict(zip(candidates["mention_id"].to_pylist(), candidates["candidate_ids"].to_pylist(), strict=True))
    rows = [row for row in mentions.to_pylist() if of_mention.get(row["mention_id"])]
    lists = pa.array([of_mention[row["mention_id"]] for row in rows], pa.list_(pa.string()))
    return pa.Table.from_pylist(rows, mentions.schema).append_column("candidate_ids", lists)


def evaluate(
    runs: dict[str, tuple[Protocol, ...]], leaks: dict[str, NDArray[np.bool_]], work: Path
) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of a run by each protocol, over all of its mentions and over those without a leak."""
    is_clean = pa.array(~np.logical_or.reduce([*leaks.values()]))
    clean_ids = pq.read_table(work / "test.parquet")["mention_id"].filter(is_clean)
    for name, protocols in runs.items():
        linked = LinkedRun.open(str(work / name))
        mentions = pq.read_table(linked.settings["input"])
        clean = mentions.filter(pc.is_in(mentions["mention_id"], clean_ids.combine_chunks()))
        for protocol, (kind, gold) in product(protocols, (("all", mentions), ("without leaks", clean))):
            if len(gold):
                pq.write_table(gold, work / "gold.parquet")
                judged = judge_run(linked, gold=str(work / "gold.parquet"), protocol=protocol)
                accuracy = asdict(judged.evaluation.accuracy)
                yield {"protocol": protocol, "mentions": kind, "names": judged.knowledge_base_names, **accuracy}


def as_markdown(result: dict[str, Any]) -> str:
    """Return the table: published accuracies as their authors report them, then those of this run."""
    lines = [f"| {result['corpus']} | protocol | test mentions | accuracy |", "|---|---|---|---|"]
    lines += [f"| {name} | as reported | | {value:.1f} |" for name, value in result["published"].items()]
    for row in result["reproduced"]:
        interval = f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        mentions = f"{row['num_mentions']:,}, {row['mentions']}"
        lines.append(f"| this run, {row['names']:,} names | {row['protocol']} | {mentions} | {interval} |")
    leaks = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in result["leaks"].items())
    return "\n".join([*lines, "", f"Test mentions that share something with training or their entity: {leaks}."])


def write(table: pa.Table, path: Path) -> None:
    """Write a table, whole or not at all."""
    part = path.with_suffix(".part")
    pq.write_table(table, part)
    part.replace(path)


def pictures_of(work: Path) -> str:
    """Return the absolute address of the pictures."""
    return str((work / "pictures").resolve())


def gemel(*arguments: object) -> None:
    """Run a command of the engine with this Python; raise SystemExit with its code if it fails."""
    command = [str(argument) for argument in arguments]
    logger.info("gemel %s", " ".join(command))
    code = subprocess.run([sys.executable, "-m", "gemel_engine.cli.main", *command], check=False).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    tyro.cli(main)
