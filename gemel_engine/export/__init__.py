"""A run's answers joined with its input, in formats that other tools read."""

from typing import Literal

Format = Literal["parquet", "csv", "jsonl", "nif", "elevant", "blink"]
WIKIDATA = "http://www.wikidata.org/entity/"  # beginning of the addresses of its entities
