"""What each source of candidates finds, without a model."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.evidence.dense import DenseIndex, DenseSettings
from gemel_engine.evidence.dictionary import NameDictionary
from gemel_engine.evidence.forms import FormStatistics
from gemel_engine.evidence.lexical import LexicalIndex
from gemel_engine.evidence.normal_form import normal_form, without_qualifier
from gemel_engine.evidence.pictures import PictureIndex

NAMES = [
    "Arsenal F.C.",  # 0
    "Mercury (planet)",  # 1
    "Mercury (element)",  # 2
    "Freddie Mercury",  # 3
    "Lúcio",  # 4
    "La Grange, North Carolina",  # 5
    "European Southern Observatory",  # 6
    "Proton",  # 7
    "The The",  # 8
    "東京",  # 9
    "La Grange, Texas",  # 10
    "Australia",  # 11
]
ROW = {name: row for row, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> NameDictionary:
    aliases = {ROW["Freddie Mercury"]: ["Farrokh Bulsara", "Mercury"], ROW["東京"]: ["Tokyo", "Tōkyō", "東京"]}
    entities = ((row, name, aliases.get(row, [])) for row, name in enumerate(NAMES))
    return NameDictionary.build(tmp_path_factory.mktemp("dictionary"), entities)


@pytest.fixture(scope="module")
def lexical(tmp_path_factory: pytest.TempPathFactory) -> LexicalIndex:
    return LexicalIndex.build(tmp_path_factory.mktemp("lexical"), enumerate(NAMES))


def found(hits: Iterable[tuple[int, object]]) -> list[str]:
    return [NAMES[row] for row, _ in hits]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  Lúcio's GOAL! ", "lucios goal"),
        ("U.S. Open, 3.5 km", "us open 3 5 km"),
        ("J. K. Rowling", "j k rowling"),
        ("O’Neill", "oneill"),
        ("snake_case – AT-4", "snake case at 4"),
        ("Straße", "strasse"),
        ("東京", "東京"),
        ("パリ", "パリ"),
        ("バリ", "バリ"),  # Bali, not Paris
        ("रोम", "रोम"),
        ("กรุงเทพฯ", "กรุงเทพฯ"),
        ("서울시", "서울시"),
        ("שָׁלוֹם", "שלום"),
        ("αθήνα", "αθηνα"),
        ("é ❤️ x", "e x"),
        (" £ ", "£"),
        ("!?", "!?"),
        (" ", ""),
    ],
)
def test_spellings_have_one_normal_form(text: str, form: str) -> None:
    assert normal_form(text) == form


def test_a_qualifier_is_removed_and_a_name_never_becomes_empty() -> None:
    assert without_qualifier("Mercury (planet)") == "Mercury"
    assert without_qualifier("La Grange, Texas") == "La Grange"
    assert without_qualifier("(I Can't Get No) Satisfaction") == "(I Can't Get No) Satisfaction"
    assert without_qualifier("(x)") == "(x)"


def test_a_name_is_found_whatever_its_accents_spaces_and_points(dictionary: NameDictionary) -> None:
    assert dictionary.find(normal_form("arsenal FC"), 9) == [(ROW["Arsenal F.C."], "name")]
    assert dictionary.find(normal_form("Lucio"), 9) == [(ROW["Lúcio"], "name")]
    assert dictionary.find(normal_form("tokyo"), 9) == [(ROW["東京"], "alias")]
    assert dictionary.find("", 9) == dictionary.find("zzz", 9) == dictionary.find("a", 9) == []


def test_all_entities_of_a_key_are_kept_aliases_before_names_without_qualifier(dictionary: NameDictionary) -> None:
    expected = [(ROW["Freddie Mercury"], "alias"), (ROW["Mercury (planet)"], "base_name")]
    assert dictionary.find("mercury", 9) == [*expected, (ROW["Mercury (element)"], "base_name")]
    assert dictionary.find("mercury", 2) == expected


def test_a_damaged_dictionary_is_refused(dictionary: NameDictionary, tmp_path: Path) -> None:
    NameDictionary.build(tmp_path, [(0, "A", [])])
    np.save(tmp_path / "rows.npy", np.zeros(2, np.uint32))
    with pytest.raises(ArtifactError, match="differ in length"):
        NameDictionary.open(tmp_path)
    np.save(tmp_path / "rows.npy", np.zeros(1, np.float64))
    with pytest.raises(ArtifactError, match=r"rows\.npy holds float64"):
        NameDictionary.open(tmp_path)
    (tmp_path / "rows.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ArtifactError, match=r"rows\.npy is missing or damaged"):
        NameDictionary.open(tmp_path)


def test_damage_that_a_search_meets_is_an_error(tmp_path: Path) -> None:
    LexicalIndex.build(tmp_path, ((row, f"red bear {row}") for row in range(50)))
    (terms,) = tmp_path.glob("*.term")
    whole = terms.read_bytes()
    for place in range(0, len(whole), 7):
        terms.write_bytes(whole[:place] + bytes([255 - whole[place]]) + whole[place + 1 :])
        with suppress(ArtifactError):
            index = LexicalIndex.open(tmp_path)
            index.similar("bear 7", 9)
            index.holding("bear", "red 7", 9)


def test_words_find_names_whatever_their_endings(lexical: LexicalIndex) -> None:
    assert found(lexical.similar(normal_form("protons"), 9)) == ["Proton"]
    assert found(lexical.similar(normal_form("Lucio's"), 9)) == ["Lúcio"]
    assert found(lexical.beginning_alike(normal_form("Australian"), 9)) == ["Australia"]
    assert found(lexical.similar("the", 9)) == ["The The"]
    assert lexical.similar("", 9) == lexical.similar("zzz", 9) == []


def test_the_context_decides_among_names_that_hold_a_form(lexical: LexicalIndex) -> None:
    for state in ("Texas", "North Carolina"):
        best = found(lexical.holding("la grange", normal_form(f"Map of La Grange in {state}."), 9))
        assert best[0] == f"La Grange, {state}"
        assert len(best) == 2


def test_initials_find_the_words_they_stand_for(lexical: LexicalIndex) -> None:
    assert found(lexical.abbreviated("eso", 9)) == found(lexical.abbreviated("esos", 9))
    assert found(lexical.abbreviated("eso", 9)) == ["European Southern Observatory"]
    assert lexical.abbreviated("e", 9) == lexical.abbreviated("a very long form indeed", 9) == []


def test_a_lexical_index_in_a_read_only_directory_is_opened(tmp_path: Path) -> None:
    LexicalIndex.build(tmp_path, enumerate(NAMES))
    before = sorted(tmp_path.iterdir())
    tmp_path.chmod(0o555)
    try:
        assert found(LexicalIndex.open(tmp_path).similar("proton", 9)) == ["Proton"]
    finally:
        tmp_path.chmod(0o755)
    assert sorted(tmp_path.iterdir()) == before
    assert not list(tmp_path.glob(".*lock"))


def test_a_directory_that_holds_no_lexical_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no readable lexical index"):
        LexicalIndex.open(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no readable lexical index"):
        LexicalIndex.open(tmp_path)


def vectors(count: int, width: int = 16, seed: int = 0) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    unit: NDArray[np.float32] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return unit


def test_few_vectors_are_searched_exactly_and_an_entity_comes_once(tmp_path: Path) -> None:
    stored, queries = vectors(60), vectors(5, seed=1)
    rows = np.repeat(np.arange(20, dtype=np.uint32), 3)
    index = DenseIndex.build(tmp_path, stored, rows, 20)
    best = np.round(queries @ stored.T, 5).reshape(5, 20, 3).max(axis=2)
    for found_rows, expected in zip(index.nearest(queries, 60), best, strict=True):
        assert [row for row, _ in found_rows] == np.lexsort((np.arange(20), -expected)).tolist()
    assert index.nearest(np.zeros((1, 16), np.float32), 5) == [[]]


def test_many_vectors_are_compressed_and_nearly_as_well_found(tmp_path: Path) -> None:
    stored = vectors(3000)
    rows = np.arange(3000, dtype=np.uint32)
    index = DenseIndex.build(tmp_path, stored, rows, 3000, DenseSettings(exact_up_to=0, num_probes=55))
    found_itself = [row in [other for other, _ in near] for row, near in enumerate(index.nearest(stored[:100], 10))]
    assert sum(found_itself) >= 90
    assert not (tmp_path / "vectors.npy").exists()
    alone = [index.nearest(stored[number : number + 1], 10)[0] for number in range(9)]
    assert index.nearest(stored[:9], 10) == alone


@pytest.mark.parametrize("exact_up_to", [3000, 0])
def test_any_entity_is_compared_with_a_query(tmp_path: Path, exact_up_to: int) -> None:
    stored, query = vectors(3000), vectors(1, seed=1)[0]
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(1500, dtype=np.uint32), 2))
    index = DenseIndex.build(tmp_path, stored, rows, 1600, DenseSettings(exact_up_to=exact_up_to, num_probes=55))
    found = index.similarities(query, [7, 1550, 3])
    expected = {row: float((stored[rows == row] @ query).max()) for row in (7, 3)}
    assert found == pytest.approx(expected, abs=1e-4 if exact_up_to else 0.3)
    assert index.similarities(query, [1550]) == {}
    nearest = dict(index.nearest(query[None], 3000)[0])
    assert index.similarities(query, list(nearest)) == pytest.approx(nearest, abs=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("exact_up_to", [0, 5000])
def test_a_gpu_finds_what_a_cpu_finds(device: str, tmp_path: Path, exact_up_to: int) -> None:
    """Without a GPU, an index that is to be moved to one stays as it is."""
    stored, queries = vectors(3000, width=64), vectors(20, width=64, seed=1)
    index = DenseIndex.build(
        tmp_path, stored, np.arange(3000, dtype=np.uint32) // 2, 1500, DenseSettings(exact_up_to=exact_up_to)
    )
    expected = index.nearest(queries, 50)
    index.move_to_gpu()
    assert (index._search is index._on_cpu) is (device == "cpu")
    for found, on_cpu in zip(index.nearest(queries, 50), expected, strict=True):
        assert [value for _, value in found] == pytest.approx([value for _, value in on_cpu], abs=2e-5)
        values = dict(found)
        assert all(values[row] == pytest.approx(value, abs=2e-5) for row, value in on_cpu[:40] if row in values)
        assert len({row for row, _ in on_cpu[:40]} - set(values)) <= 1, "rounding may exchange neighbours"


def test_compressed_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    rows = np.arange(500, dtype=np.uint32)
    DenseIndex.build(good, vectors(500), rows, 500, DenseSettings(exact_up_to=0))
    shutil.copytree(good, bad)
    lists = (bad / "lists.bin").read_bytes()
    (bad / "lists.bin").write_bytes(lists[:-1])
    with pytest.raises(ArtifactError, match="does not fit"):
        DenseIndex.open(bad)
    (bad / "lists.bin").write_bytes(b"\x7f" * len(lists))
    with pytest.raises(ArtifactError, match="of 500"):
        DenseIndex.open(bad).nearest(vectors(1), 5)


def test_impossible_settings_of_vectors_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_probes 0"):
        DenseSettings(num_probes=0)


def test_pictures_are_compared_after_standardising(tmp_path: Path) -> None:
    features = np.array([[1e3, 1.0], [1e3, 2.0], [1e3, 3.0]], np.float32)
    index = PictureIndex.build(tmp_path, features, np.arange(3, dtype=np.uint32), 3)
    found_rows, nothing = index.nearest([np.array([1e3, 3.5], np.float32), None], 3)
    assert found_rows[0][0] == 2
    assert not nothing


def test_the_counts_of_a_group_can_be_left_out() -> None:
    forms = FormStatistics(["Paris", "paris", "PARIS", "Rome"], [1, 1, 2, 3], ["a", "b", "a", "c"], vectors(4))
    assert forms.entities("paris") == [(1, 2), (2, 1)]
    assert forms.entities("paris", "a") == [(1, 1)]
    assert forms.entities("oslo") == []
    assert (forms.frequency(1), forms.frequency(1, "a"), forms.frequency(9)) == (2, 1, 0)
    assert [row for row, _ in forms.nearest(vectors(4)[3:], 9)[0]] == [3, 1, 2]
    assert [row for row, _ in forms.nearest(vectors(4)[3:], 9, ["c"])[0]] == [1, 2]


@pytest.mark.parametrize("exact_up_to", [0, 200_000])
def test_an_index_merged_finds_what_one_built_anew_finds(tmp_path: Path, exact_up_to: int) -> None:
    settings, generator = DenseSettings(exact_up_to=exact_up_to, num_probes=64), np.random.default_rng(1)
    features = generator.normal(size=(1000, 16)).astype(np.float32)
    rows = np.repeat(np.arange(500, dtype=np.uint32), 2)
    more, of_more = generator.normal(size=(10, 16)).astype(np.float32), np.arange(490, 500, dtype=np.uint32)
    new_rows = np.arange(500) - 10  # the first ten entities go
    new_rows[:10] = -1
    base = PictureIndex.build(tmp_path / "base", features, rows, 500, settings)
    assert base.index.is_exact == (exact_up_to > 0)
    merged = PictureIndex.merge(tmp_path / "merged", tmp_path / "base", new_rows, more, of_more, 500)
    everything, of_all = np.concatenate([features[20:], more]), np.concatenate([rows[20:] - 10, of_more])
    anew = PictureIndex.build(tmp_path / "anew", everything, of_all.astype(np.uint32), 500, settings)
    assert merged.index.num_vectors == anew.index.num_vectors == 990
    queries, expected = [*features[100:110], *more], [*(rows[100:110] - 10).tolist(), *of_more.tolist()]
    found = [[row for row, _ in of_query] for of_query in merged.nearest(queries, 20)]
    assert all(row in of_query for row, of_query in zip(expected, found, strict=True))
    if exact_up_to:
        assert merged.nearest(queries, 20) == anew.nearest(queries, 20)
    assert [merged.features_of(row) is None for row in (0, 499, 500)] == [False, False, True]
    np.testing.assert_array_equal(merged.features, anew.features)


def test_a_merged_index_without_further_vectors_or_kept_ones_is_searched(tmp_path: Path) -> None:
    settings = DenseSettings(exact_up_to=0, num_probes=64)
    known, rows = vectors(300), np.arange(300, dtype=np.uint32)
    DenseIndex.build(tmp_path / "base", known, rows, 300, settings)
    nothing = np.zeros((0, known.shape[1]), np.float32), np.zeros(0, np.uint32)
    same = DenseIndex.merge(tmp_path / "same", tmp_path / "base", np.arange(300), *nothing, 300)
    assert same.nearest(known[:3], 1) == DenseIndex.open(tmp_path / "base").nearest(known[:3], 1)
    other = DenseIndex.merge(tmp_path / "other", tmp_path / "base", np.full(300, -1), known[:2], rows[:2], 2)
    assert [[row for row, _ in found] for found in other.nearest(known[:2], 1)] == [[0], [1]]


def test_characters_without_width_do_not_tell_names_apart() -> None:
    for form in ("Pa\u200bris", "\ufeffParis", "Par\u200dis", "Pa\u00adris\u200e"):
        assert normal_form(form) == "paris"
    assert normal_form("\u0645\u06cc\u200c\u062e") == normal_form("\u0645\u06cc\u062e")
