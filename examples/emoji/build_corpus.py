"""Build the emoji corpus: one entity drawn in six styles, mentioned by a tag that several entities share.

    python examples/emoji/build_corpus.py

A text such as "I searched for bear and saved the first result." fits the bear, the panda and the teddy bear; only the
picture decides. Train, dev and test are drawn by different artists and worded with different sentences (dev and test
share theirs), and the entities of ``test_unseen`` occur in no other split. The knowledge base has a picture of each
entity that no split uses, and other names of it in six languages: its tags and what that language calls it. Pictures,
names and tags come from npm packages of fixed versions, fetched with ``npm`` into a temporary directory; everything
else is decided by one seed.

Left out of the knowledge base, because a picture could not decide or the tags would not be words:

- smileys and people: they differ by a detail of face or hand, and their tags are mostly slang;
- sequences of several code points (skin tones, professions, families): variants of one drawing;
- symbols, keycaps and flags: glyphs and country names, which the tags repeat;
- clock faces: two dozen drawings that differ by the angle of the hands.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import re
import subprocess
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

LOGGER = logging.getLogger(__name__)

HERE = Path(__file__).parent
SEED = 20240523
NUM_UNSEEN_ENTITIES = 70
NUM_SAMPLE_MENTIONS = 100
NUM_TRAIN_SENTENCES = 34
MAX_TAGS_PER_HELD_OUT_PICTURE = 2
MAX_ENTITIES_PER_TAG = 12
PICTURE_SIZE = 128
PICTURE_COLORS = 64

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/noto-v1": "1.2.5",
    "emojibase-data": "17.0.0",
}
TRAIN_ARTISTS = ("noto", "twemoji", "fxemoji")
DEV_ARTIST = "fluent-emoji-flat"
TEST_ARTIST = "emojione"
# Google's first drawings: other ones than those of noto, by which Google has replaced them.
KNOWLEDGE_BASE_ARTIST = "noto-v1"
# fxemoji names its drawings of a face "mouse", "tiger", "cat" and "pig", and of a piano "keyboard".
# emojione names a bat and a ball "cricket". noto-v1 names a revolver "water pistol".
MISNAMED = {
    "fxemoji": {"1F401", "1F405", "1F408", "1F416", "2328"},
    "emojione": {"1F997"},
    "noto-v1": {"1F52B"},
}
# fxemoji drew half of the entities, noto-v1 all but two; the others have to be complete.
REQUIRED_ARTISTS = ("noto", "twemoji", DEV_ARTIST, TEST_ARTIST)

# Of emojibase-data: animals and nature, food and drink, travel and places, activities, objects.
GROUPS = (3, 4, 5, 6, 7)
# Directories of emojibase-data. Mentions and names are in the first language.
LANGUAGES = ("en", "de", "es", "hi", "ja", "ru")
CLOCK_FACE = re.compile(r"o’clock$|-thirty$")
WORD = re.compile(r"[a-z][a-z' -]{2,}")
NOT_NAMES = {"behind", "done", "down", "drove", "hump", "moo", "not", "over", "tbt", "where", "woohoo", "yolo"}

ENTITY_SCHEMA = pa.schema(
    [
        pa.field("entity_id", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("aliases", pa.list_(pa.string()), nullable=False),
        pa.field("image_bytes", pa.binary()),
    ]
)
MENTION_SCHEMA = pa.schema(
    [
        pa.field("mention_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("mention", pa.string(), nullable=False),
        pa.field("mention_start", pa.int32(), nullable=False),
        pa.field("image_bytes", pa.binary(), nullable=False),
        pa.field("entity_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Emoji:
    """One entity: its code point in hexadecimal, its names, the tags that others share, a PNG by artist."""

    entity_id: str
    name: str
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    pictures: Mapping[str, bytes]


class IconSet:
    """The drawings of one artist, found by code point or, where the package has no such table, by name."""

    def __init__(self, directory: Path) -> None:
        collection = _read_json(directory / "icons.json")
        self._size = (collection["width"], collection["height"])
        self._icons: dict[str, dict[str, Any]] = dict(collection["icons"])
        for name, alias in collection.get("aliases", {}).items():
            # An alias with more than a parent is mirrored or rotated: another drawing.
            if alias.keys() == {"parent"} and alias["parent"] in self._icons:
                self._icons[name] = self._icons[alias["parent"]]
        self._by_code: dict[str, str] = _read_json(directory / "chars.json")
        self._by_name = {_squash(name): name for name in self._icons}

    def find(self, entity_id: str, name: str) -> str | None:
        """Return the drawing as SVG, or None where this artist has not drawn the entity."""
        official_name = unicodedata.name(chr(int(entity_id, 16)), "")
        key = self._by_code.get(entity_id.lower(), "")
        key = key or self._by_name.get(_squash(official_name), "") or self._by_name.get(_squash(name), "")
        if key not in self._icons:
            return None
        icon = self._icons[key]
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def install_packages(directory: Path) -> Path:
    """Install the npm packages without running any script of theirs; return the directory they are in."""
    packages = [f"{name}@{version}" for name, version in PACKAGES.items()]
    command = ["npm", "install", "--prefix", str(directory), "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    subprocess.run(command, check=True, capture_output=True)
    return directory / "node_modules"


def render(svg: str) -> bytes:
    """Draw an SVG on white as a square PNG with a palette."""
    drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=PICTURE_SIZE, height=PICTURE_SIZE, background="white"))
    with Image.open(io.BytesIO(drawn)) as picture:
        # The nearest palette colour, not a dither pattern: it compresses better and leaves flat areas flat.
        quantised = picture.convert("RGB").quantize(PICTURE_COLORS, dither=Image.Dither.NONE)
    png = io.BytesIO()
    quantised.save(png, "PNG", optimize=True)
    return png.getvalue()


def read_emoji(packages: Path) -> list[Emoji]:
    """Read the entities of `GROUPS` that every required artist drew and that share at least one tag."""
    artists = (*TRAIN_ARTISTS, DEV_ARTIST, TEST_ARTIST, KNOWLEDGE_BASE_ARTIST)
    icon_sets = {artist: IconSet(packages / "@iconify-json" / artist) for artist in artists}
    in_languages = [
        {entry["hexcode"]: entry for entry in _read_json(packages / "emojibase-data" / language / "data.json")}
        for language in LANGUAGES
    ]
    drawn: dict[str, dict[str, str]] = {}
    for hexcode, entry in in_languages[0].items():
        entity_id = hexcode.removesuffix("-FE0F")
        if entry.get("group") not in GROUPS or "-" in entity_id or CLOCK_FACE.search(entry["label"]):
            continue
        found = {artist: icons.find(entity_id, entry["label"]) for artist, icons in icon_sets.items()}
        svgs = {
            artist: svg
            for artist, svg in found.items()
            if svg is not None and entity_id not in MISNAMED.get(artist, ())
        }
        if svgs.keys() >= set(REQUIRED_ARTISTS):
            drawn[hexcode] = svgs

    entries = [[entries[hexcode] for hexcode in drawn] for entries in in_languages]
    names = [distinguishing_tags(entry["tags"] for entry in in_language) for in_language in entries]
    names[0] = {tag: count for tag, count in names[0].items() if WORD.fullmatch(tag) and tag not in NOT_NAMES}
    shared = {tag for tag, count in names[0].items() if count >= 2}
    return [
        Emoji(
            entity_id=hexcode.removesuffix("-FE0F"),
            name=translations[0]["label"],
            aliases=aliases(translations, names),
            tags=tuple(tag for tag in translations[0]["tags"] if tag in shared),
            pictures={artist: render(svg) for artist, svg in svgs.items()},
        )
        for (hexcode, svgs), *translations in zip(drawn.items(), *entries, strict=True)
        if shared.intersection(translations[0]["tags"])
    ]


def distinguishing_tags(tags_of_entities: Iterable[Iterable[str]]) -> dict[str, int]:
    """Return the tags that do not belong to very many entities, with the number of their entities."""
    counts = Counter(tag for tags in tags_of_entities for tag in set(tags))
    return {tag: count for tag, count in counts.items() if count <= MAX_ENTITIES_PER_TAG}


def aliases(translations: Iterable[Mapping[str, Any]], names: Iterable[Container[str]]) -> tuple[str, ...]:
    """Return what an entity is called in each language: its label, and those of its tags that are `names`."""
    spellings: dict[str, str] = {}  # of names that differ in case alone, the first
    for entry, names_of_language in zip(translations, names, strict=True):
        for name in (entry["label"], *(tag for tag in entry["tags"] if tag in names_of_language)):
            spellings.setdefault(name.casefold(), name)
    return tuple(spellings.values())[1:]  # the very first is the label in English, which is the entity's name


def split_mentions(emoji: list[Emoji], sentences: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Write the mentions of each split, in a random order.

    Train has every tag of a seen entity with every train artist; dev and test have at most
    `MAX_TAGS_PER_HELD_OUT_PICTURE` tags of every seen entity, ``test_unseen`` all tags of the others.
    """
    rng = random.Random(SEED)
    sentences = rng.sample(sentences, len(sentences))
    train_sentences, held_out_sentences = sentences[:NUM_TRAIN_SENTENCES], sentences[NUM_TRAIN_SENTENCES:]
    unseen_ids = {unseen.entity_id for unseen in rng.sample(emoji, NUM_UNSEEN_ENTITIES)}
    seen = [one for one in emoji if one.entity_id not in unseen_ids]
    unseen = [one for one in emoji if one.entity_id in unseen_ids]

    def mentions(entities: list[Emoji], artist: str, sentences: list[str], max_tags: int) -> Iterator[dict[str, Any]]:
        for entity in entities:
            if artist not in entity.pictures:
                continue
            for tag in rng.sample(entity.tags, min(max_tags, len(entity.tags))):
                before, after = rng.choice(sentences).split("{}")
                yield {
                    "text": before + tag + after,
                    "mention": tag,
                    "mention_start": len(before),
                    "image_bytes": entity.pictures[artist],
                    "entity_id": entity.entity_id,
                    "group": artist,
                }

    every_tag, some_tags = max(len(one.tags) for one in emoji), MAX_TAGS_PER_HELD_OUT_PICTURE
    splits = {
        "train": [row for artist in TRAIN_ARTISTS for row in mentions(seen, artist, train_sentences, every_tag)],
        "dev": list(mentions(seen, DEV_ARTIST, held_out_sentences, some_tags)),
        "test": list(mentions(seen, TEST_ARTIST, held_out_sentences, some_tags)),
        "test_unseen": list(mentions(unseen, TEST_ARTIST, held_out_sentences, every_tag)),
    }
    for split, rows in splits.items():
        rng.shuffle(rows)
        for number, row in enumerate(rows):
            row["mention_id"] = f"{split}-{row['group']}-{number:05d}"
    # Whole surface forms, as a corpus has them: their mentions share demonstrations.
    forms = sorted({row["mention"] for row in splits["test"]})
    rank = {form: position for position, form in enumerate(rng.sample(forms, len(forms)))}
    splits["sample"] = sorted(splits["test"], key=lambda row: rank[row["mention"]])[:NUM_SAMPLE_MENTIONS]
    return splits


def write_corpus(emoji: list[Emoji], sentences: list[str], output_dir: Path) -> None:
    """Write the knowledge base and one Parquet file per split."""
    entities = [
        {
            "entity_id": entity.entity_id,
            "name": entity.name,
            "aliases": entity.aliases,
            "image_bytes": entity.pictures.get(KNOWLEDGE_BASE_ARTIST),
        }
        for entity in emoji
    ]
    pq.write_table(pa.Table.from_pylist(entities, ENTITY_SCHEMA), output_dir / "entities.parquet", compression="zstd")
    without = [entity.name for entity in emoji if KNOWLEDGE_BASE_ARTIST not in entity.pictures]
    LOGGER.info("entities: %d, without a picture: %s", len(entities), ", ".join(without) or "none")
    for split, rows in split_mentions(emoji, sentences).items():
        table = pa.Table.from_pylist(rows, MENTION_SCHEMA)
        # The default limit of 1 MiB would end the dictionary early, and every mention would carry its own picture.
        pq.write_table(
            table, output_dir / f"{split}.parquet", compression="zstd", dictionary_pagesize_limit=table.nbytes + 1
        )
        LOGGER.info("%s: %d mentions", split, len(rows))


def main() -> None:
    """Read the command line and build the corpus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=HERE, help="where the Parquet files go")
    output_dir = parser.parse_args().output_dir
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sentences = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as scratch:
        emoji = read_emoji(install_packages(Path(scratch)))
    output_dir.mkdir(parents=True, exist_ok=True)
    write_corpus(emoji, sentences, output_dir)


if __name__ == "__main__":
    main()
