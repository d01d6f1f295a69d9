"""The trie against sets of tuples, and saved tries against damage."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.trouble import damage, edit_manifest

from gemel_engine.errors import ArtifactError
from gemel_engine.knowledge_base.trie import PrefixTrie

pytestmark = pytest.mark.unit

LARGE_TOKEN = 128_255  # of a vocabulary that 16 bits can't number

Names = list[tuple[int, ...]]

# Few tokens and short names, so that names share prefixes, are prefixes of each other, and repeat.
NAMES = st.lists(
    st.lists(st.sampled_from([0, 1, 2, 65_535, LARGE_TOKEN]), min_size=1, max_size=5).map(tuple),
    min_size=1,
    max_size=30,
)
AWKWARD_NAMES: Names = [(7, 8), (7,), (7, 8, 9), (7, 8), (3,)]


def build(names: Names) -> tuple[PrefixTrie, np.ndarray]:
    offsets = np.cumsum([0, *map(len, names)])
    return PrefixTrie.build(np.array([token for name in names for token in name], np.uint32), offsets)


def prefixes_of(names: Names) -> list[tuple[int, ...]]:
    return sorted({name[:length] for name in names for length in range(len(name) + 1)})


def continuations(names: Names, prefix: tuple[int, ...]) -> list[int]:
    return sorted({name[len(prefix)] for name in names if name[: len(prefix)] == prefix and len(name) > len(prefix)})


def assert_same(left: PrefixTrie, right: PrefixTrie) -> None:
    for field in fields(PrefixTrie):
        expected, actual = getattr(left, field.name), getattr(right, field.name)
        assert expected.dtype == actual.dtype, field.name
        np.testing.assert_array_equal(expected, actual)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build(AWKWARD_NAMES)[0].save(tmp_path)
    return tmp_path


@given(NAMES)
@example(AWKWARD_NAMES)
@example([(5,)])
def test_every_node_agrees_with_the_set_of_names(names: Names) -> None:
    trie, _ = build(names)
    for prefix in prefixes_of(names):
        node = trie.walk(prefix)
        allowed, first_child = trie.children(node)
        assert allowed.tolist() == continuations(names, prefix)
        assert trie.num_children(node) == len(allowed)
        assert [trie.child(node, int(token)) for token in allowed] == list(
            range(first_child, first_child + len(allowed))
        )
        assert all(trie.parent(child) == node for child in range(first_child, first_child + len(allowed)))
        assert trie.is_terminal(node) == (prefix in names)
        below = [len(name) - len(prefix) for name in names if name[: len(prefix)] == prefix]
        assert trie.longest(node) == max(below)


@given(NAMES)
@example(AWKWARD_NAMES)
def test_names_are_numbered_breadth_first(names: Names) -> None:
    trie, name_of_sequence = build(names)
    distinct = sorted(set(names), key=lambda name: (len(name), name))
    assert trie.num_names == len(distinct)
    assert [distinct[number] for number in name_of_sequence] == names
    for number, name in enumerate(distinct):
        assert trie.name_index(trie.walk(name)) == number
        assert trie.name_tokens(number) == list(name)


@given(NAMES)
def test_nodes_are_all_prefixes(names: Names) -> None:
    assert build(names)[0].num_nodes == len(prefixes_of(names))


@given(NAMES)
@example(AWKWARD_NAMES)
def test_from_sequences_equals_build(names: Names) -> None:
    trie, name_of_sequence = build(names)
    quick_trie, quick_name_of_sequence = PrefixTrie.from_sequences(names)
    assert_same(trie, quick_trie)
    np.testing.assert_array_equal(name_of_sequence, quick_name_of_sequence)


@given(NAMES, st.data())
def test_allowed_tokens_of_a_batch_equal_those_of_each_node(names: Names, data: st.DataObject) -> None:
    trie, _ = build(names)
    nodes = data.draw(st.lists(st.integers(0, trie.num_nodes - 1), max_size=10))
    tokens, row_offsets = trie.allowed_tokens(np.array(nodes, np.int64))
    assert len(row_offsets) == len(nodes) + 1
    assert row_offsets[-1] == len(tokens)
    for row, node in enumerate(nodes):
        assert tokens[row_offsets[row] : row_offsets[row + 1]].tolist() == trie.children(node)[0].tolist()


@given(NAMES, st.lists(st.integers(0, LARGE_TOKEN), min_size=1, max_size=6).map(tuple))
def test_what_no_name_starts_with_is_refused(names: Names, path: tuple[int, ...]) -> None:
    assume(path not in prefixes_of(names))
    with pytest.raises(ValueError, match="no name continues"):
        build(names)[0].walk(path)


def test_arrays_are_as_narrow_as_their_values() -> None:
    short, _ = build([(1, 2), (65_535,)])
    assert (short.tokens.dtype.name, short.heights.dtype.name) == ("uint16", "uint8")
    wide, _ = build([(65_536,), (1,) * 300])
    assert (wide.tokens.dtype.name, wide.heights.dtype.name) == ("uint32", "uint16")
    assert wide.longest(0) == 300


def test_a_token_beyond_the_stored_type_is_only_not_allowed() -> None:
    trie, _ = build([(1, 2)])
    assert trie.child(0, LARGE_TOKEN) is None
    assert trie.child(trie.walk([1, 2]), 2) is None


def test_a_node_inside_a_name_has_no_name_index() -> None:
    trie, _ = build([(1, 2)])
    with pytest.raises(ValueError, match="no name ends at node 1"):
        trie.name_index(1)


@pytest.mark.parametrize(
    ("token_ids", "offsets"),
    [([], [0]), ([], []), ([1], [0, 1, 1]), ([1, 2], [0, 1]), ([1, 2], [1, 2]), ([1, 2], [0, 2, 1, 2]), ([-1], [0, 1])],
)
def test_sequences_that_are_none_are_refused(token_ids: list[int], offsets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sequence|tokens"):
        PrefixTrie.build(np.array(token_ids, np.int64), np.array(offsets, np.int64))


@pytest.mark.parametrize("sequences", [[], [[]], [[1], []]])
def test_empty_candidates_are_refused(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        PrefixTrie.from_sequences(sequences)


@pytest.mark.parametrize("names", [AWKWARD_NAMES, [(5,)], [(LARGE_TOKEN, 1)]])
@pytest.mark.parametrize("verify", [False, True])
def test_a_saved_trie_opens_read_only_and_equal(tmp_path: Path, names: Names, verify: bool) -> None:
    trie, _ = build(names)
    trie.save(tmp_path / "trie")
    opened = PrefixTrie.open(tmp_path / "trie", verify=verify)
    assert_same(trie, opened)
    assert not any(getattr(opened, field.name).flags.writeable for field in fields(opened))


def test_a_missing_trie_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"trie\.json does not exist"):
        PrefixTrie.open(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 1}', "[" * 100_000])
def test_another_manifest_is_refused(saved: Path, content: str) -> None:
    (saved / "trie.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"trie\.json"):
        PrefixTrie.open(saved)


@pytest.mark.parametrize("name", [field.name for field in fields(PrefixTrie)])
@pytest.mark.parametrize("size", [None, 0, 30, -1])
def test_a_missing_or_truncated_file_is_refused(saved: Path, name: str, size: int | None) -> None:
    path = saved / f"{name}.npy"
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size])
    with pytest.raises(ArtifactError, match=rf"{name}\.npy is missing or damaged"):
        PrefixTrie.open(saved)


@pytest.mark.parametrize("name", [field.name for field in fields(PrefixTrie)])
def test_a_file_of_another_trie_is_refused(saved: Path, name: str) -> None:
    np.save(saved / f"{name}.npy", np.zeros(99, np.uint32))
    with pytest.raises(ArtifactError, match=rf"{name}\.npy is not the array"):
        PrefixTrie.open(saved)


def test_pickled_objects_are_refused(saved: Path) -> None:
    np.save(saved / "tokens.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"tokens\.npy is missing or damaged"):
        PrefixTrie.open(saved)


def test_signed_integers_are_refused_even_where_the_manifest_has_them(saved: Path) -> None:
    np.save(saved / "heights.npy", np.zeros(5, np.int8))
    files = json.loads((saved / "trie.json").read_text())["files"]
    files["heights.npy"] |= {"dtype": "|i1", "shape": [5]}
    edit_manifest(saved / "trie.json", {"files": files})
    with pytest.raises(ArtifactError, match=r"heights\.npy holds int8, not uint8"):
        PrefixTrie.open(saved)


def test_a_changed_byte_is_found_by_its_checksum(saved: Path) -> None:
    path = saved / "tokens.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    PrefixTrie.open(saved)
    with pytest.raises(ArtifactError, match=r"checksum of .*tokens\.npy"):
        PrefixTrie.open(saved, verify=True)


# The nodes of AWKWARD_NAMES: root, 3, 7, 7 8, 7 8 9.
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("first_child", [1, 3, 3, 4, 5, 4]),
        ("first_child", [0, 3, 3, 4, 5, 5]),
        ("first_child", [1, 1, 1, 1, 1, 5]),  # its own child
        ("first_child", [1, 3, 5, 4, 5, 5]),
        ("first_child", [1, 3, 3, 4, 5, 2**32 - 1]),
        ("first_child", [1, 3, 3, 9, 9, 5]),
        ("terminals", [1, 2, 4, 3]),
        ("terminals", [0, 1, 2, 4]),
        ("terminals", [1, 2, 3, 5]),
        ("terminals", [1, 2, 3, 2**32 - 1]),
    ],
)
def test_numbers_that_lead_out_of_the_arrays_or_back_are_refused(
    tmp_path: Path, name: str, values: list[int], verify: bool
) -> None:
    trie, _ = build(AWKWARD_NAMES)
    replace(trie, **{name: np.array(values, np.uint32)}).save(tmp_path)
    with pytest.raises(ArtifactError, match="do not form a prefix trie"):
        PrefixTrie.open(tmp_path, verify=verify)


def test_a_cycle_is_found_wherever_it_is(tmp_path: Path) -> None:
    trie, _ = PrefixTrie.build(np.arange(200_000), np.arange(0, 200_001, 2))
    assert trie.num_nodes == 200_001
    for node in (1, 65_535, 65_536, 65_537, 131_072, 150_000):
        first_child = np.where(
            np.arange(len(trie.first_child)) <= node, np.minimum(trie.first_child, node), trie.first_child
        )
        replace(trie, first_child=first_child.astype(np.uint32)).save(tmp_path)
        with pytest.raises(ArtifactError, match="do not form a prefix trie"):
            PrefixTrie.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokens", [0, 7, 3, 8, 9]),
        ("tokens", [0, 7, 7, 8, 9]),
        ("heights", [3, 0, 2, 1, 1]),
        ("terminals", [1, 2, 3]),
    ],
)
def test_arrays_that_form_no_trie_are_refused(tmp_path: Path, name: str, values: list[int]) -> None:
    trie, _ = build(AWKWARD_NAMES)
    replace(trie, **{name: np.array(values, getattr(trie, name).dtype)}).save(tmp_path)
    with pytest.raises(ArtifactError, match="do not form a prefix trie"):
        PrefixTrie.open(tmp_path, verify=True)


@pytest.mark.parametrize("dtype", [">u4", "<u8", "<i4", "<f4", "<M8[s]", "V4", "S4", "?"])
def test_numbers_of_another_type_are_refused(tmp_path: Path, dtype: str) -> None:
    trie, _ = build(AWKWARD_NAMES)
    replace(trie, first_child=trie.first_child.astype(dtype)).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"first_child\.npy"):
        PrefixTrie.open(tmp_path)


@settings(max_examples=200)
@given(
    name=st.sampled_from([field.name for field in fields(PrefixTrie)]),
    changes=st.lists(st.tuples(st.integers(-40, 150), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_damaged_bytes_give_an_error_or_a_trie_in_which_every_path_ends(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    build(AWKWARD_NAMES)[0].save(directory)
    path = directory / f"{name}.npy"
    if damage(path, changes):
        with pytest.raises(ArtifactError):
            PrefixTrie.open(directory, verify=True)
    try:
        trie = PrefixTrie.open(directory)
    except ArtifactError:
        return
    for node in range(trie.num_nodes):
        _, first_child = trie.children(node)
        assert node < first_child <= trie.num_nodes
    assert all(len(trie.name_tokens(number)) < trie.num_nodes for number in range(trie.num_names))


@given(names=NAMES, some=st.lists(st.integers(0, 29), max_size=9))
def test_sequences_are_what_the_trie_was_built_from(names: Names, some: list[int]) -> None:
    trie, numbers = build(names)
    token_ids, offsets = trie.sequences(numbers)
    assert token_ids.tolist() == [token for name in names for token in name]
    assert offsets.tolist() == np.cumsum([0, *map(len, names)]).tolist()
    chosen = np.array([number % trie.num_names for number in some], int)
    token_ids, offsets = trie.sequences(chosen)
    assert [part.tolist() for part in np.split(token_ids, offsets[1:])[:-1]] == list(map(trie.name_tokens, chosen))


@pytest.mark.parametrize("name", [field.name for field in fields(PrefixTrie)])
def test_arrays_of_unfitting_lengths_are_refused(tmp_path: Path, name: str) -> None:
    trie, _ = build(AWKWARD_NAMES)
    replace(trie, **{name: np.zeros(9, np.uint32)}).save(tmp_path)
    with pytest.raises(ArtifactError, match="do not form a prefix trie"):
        PrefixTrie.open(tmp_path)
