"""The command `gemel import`: tables from public dumps, corpora and other tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field
from tyro.conf import Positional, arg

from gemel_engine.cli.options import check_local, checked
from gemel_engine.errors import ConfigurationError
from gemel_engine.importers.commons import ThumbnailWidth

Dump = Annotated[Positional[str], arg(metavar="DUMP")]
Files = Annotated[Positional[tuple[str, ...]], arg(metavar="DUMP... OUTPUT.parquet")]
Input = Annotated[Positional[str], arg(metavar="INPUT")]
Output = Annotated[Positional[Path], arg(metavar="OUTPUT.parquet")]
Layout = Annotated[Positional[Literal["wikidiverse", "melbench", "aida", "blink"]], arg(metavar="LAYOUT")]
Languages = Annotated[tuple[str, ...], Field(min_length=1)]
Separator = Annotated[str, Field(min_length=1)]


def import_entities(arguments: Sequence[str]) -> None:
    """Make a table of entities for `gemel build-kb`, or of mentions, from what others publish."""
    commands: dict[str, Callable[..., None]] = {
        "wikidata": checked(import_wikidata),
        "dbpedia": checked(import_dbpedia),
        "table": checked(import_table),
        "mentions": checked(import_mentions),
    }
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="gemel import", description=import_entities.__doc__, args=arguments
    )


def import_wikidata(
    dump: Dump,
    output: Output,
    *,
    languages: Languages = ("en",),
    leave_out: tuple[str, ...] = (),
    image_width: ThumbnailWidth = 500,
    names_in_all_languages: bool = False,
) -> None:
    """Read the items of Wikidata that have a label in one of the languages.

    Left out are items about Wikimedia's own pages: disambiguation pages, categories, lists,
    templates and the like.

    Args:
        dump: JSON dump, such as latest-all.json.gz: local or s3://bucket/key, plain or compressed.
        output: Parquet file to write; an existing one is replaced.
        languages: Language codes. The first with a label gives name and description; labels in the
            others are aliases.
        leave_out: More types of items to leave out, such as Q13442814 for scholarly articles.
        image_width: Width of the pictures in pixels, one of those that Wikimedia serves.
        names_in_all_languages: Whether labels in the other languages are names that the linker may
            generate (`other_names`), not only aliases that help to find the entity.
    """
    from gemel_engine.importers.entities import ImportReport, check_output, write_entities
    from gemel_engine.importers.wikidata import WIKIMEDIA_PAGES, read_wikidata

    check_output(output, [dump])
    report = ImportReport()
    left_out_types = frozenset((*WIKIMEDIA_PAGES, *leave_out))
    entities = read_wikidata(
        dump,
        report,
        languages=languages,
        left_out_types=left_out_types,
        image_width=image_width,
        with_other_names=names_in_all_languages,
    )
    write_entities(output, entities, report)


def import_dbpedia(
    files: Files,
    *,
    languages: Languages = ("en",),
    image_width: ThumbnailWidth = 500,
    names_in_all_languages: bool = False,
) -> None:
    """Read the resources of DBpedia that have a label in one of the languages.

    Memory stays below 1 GiB; the directory for temporary files (TMPDIR) needs about twice the
    unpacked size of the lines in use.

    Args:
        files: Dumps in N-Triples, local or s3://bucket/key, plain or compressed, and last the Parquet
            file to write. Needed are labels; short abstracts, redirects, disambiguations, images,
            page links (wikilinks) and interlanguage links of the first language are optional.
        languages: Language codes. The first with a label gives name and description; labels in the
            others are aliases.
        image_width: Width of the pictures in pixels, one of those that Wikimedia serves.
        names_in_all_languages: Whether labels in the other languages are names that the linker may
            generate (`other_names`), not only aliases that help to find the entity.
    """
    from gemel_engine.importers.dbpedia import read_dbpedia
    from gemel_engine.importers.entities import ImportReport, check_output, write_entities

    if len(files) < 2:
        raise ConfigurationError("name dumps and the output: gemel import dbpedia DUMP... OUTPUT.parquet")
    *dumps, output = files
    check_local("the output", output)
    check_output(Path(output), dumps)
    report = ImportReport()
    entities = read_dbpedia(
        dumps,
        report,
        languages=languages,
        image_width=image_width,
        with_other_names=names_in_all_languages,
    )
    write_entities(Path(output), entities, report)


def import_table(input: Input, output: Output, *, columns: tuple[str, ...] = (), separator: Separator = "|") -> None:
    """Read the entities of a table in Parquet, CSV, TSV or JSON Lines.

    Args:
        input: Table named *.parquet, *.csv, *.tsv, *.jsonl, *.ndjson or *.json, or a directory of
            Parquet files: local or s3://bucket/prefix. Text may be compressed by gzip, bzip2 or
            Zstandard; fields of CSV may be quoted, those of TSV may not. Required columns:
            `entity_id` and `name`; optional columns: `description`, `popularity`, `aliases`,
            `image_uri`, `language`, `other_names`.
        output: Parquet file to write; an existing one is replaced.
        columns: Names of columns in the table where they differ: name=title aliases=redirects.
        separator: Text between the items of `aliases`, `image_uri` and `other_names` in CSV and TSV.
    """
    from gemel_engine.importers.entities import ImportReport, check_output, write_entities
    from gemel_engine.importers.table import parse_columns, read_table

    check_output(output, [input])
    report = ImportReport()
    write_entities(output, read_table(input, report, columns=parse_columns(columns), separator=separator), report)


def import_mentions(
    layout: Layout,
    input: Input,
    output: Output,
    *,
    pictures: str | None = None,
    part: Literal["train", "testa", "testb"] | None = None,
) -> None:
    """Read the mentions of a published corpus, with their gold labels.

    Mentions without an entity have no label. A label that is an address in Wikipedia becomes the
    title of the page as DBpedia has it, such as New_York_City. Identifiers that the corpus lacks
    begin with the name of the file.

    Args:
        layout: wikidiverse (JSON of its authors), melbench (JSON of WikiMEL or Richpedia-MEL), aida
            (tokens of AIDA-CoNLL-YAGO), or blink (JSON Lines).
        input: File of the corpus, local or s3://bucket/key.
        output: Parquet file to write; an existing one is replaced.
        pictures: Directory or address that has the pictures of wikidiverse or melbench by their
            names. Default: pictures have the addresses that the corpus gives.
        part: Documents of aida to read. Default: all.
    """
    from gemel_engine.importers.entities import ImportReport, check_output, write_rows
    from gemel_engine.importers.mentions import LAYOUTS, MENTION_SCHEMA

    check_output(output, [input])
    takes_pictures, is_aida = layout in ("wikidiverse", "melbench"), layout == "aida"
    for option, is_of_no_use in (("pictures", pictures and not takes_pictures), ("part", part and not is_aida)):
        if is_of_no_use:
            raise ConfigurationError(f"--{option} is of no use for {layout}: leave it out")
    report = ImportReport()
    options = {"pictures": pictures} if takes_pictures else {"part": part} if is_aida else {}
    write_rows(output, LAYOUTS[layout](input, report, **options), report, MENTION_SCHEMA, "mentions")
