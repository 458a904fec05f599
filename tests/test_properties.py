"""Readers of attribute tables and label lists, on hundreds of generated and damaged files."""
import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from common.datasets import read_attributes, read_iclevr_lists
from common.files import UserError

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=8)
TABLES = st.lists(WORDS, min_size=1, max_size=4, unique=True).flatmap(lambda names: st.tuples(
    st.just(names), st.dictionaries(WORDS, st.lists(st.sampled_from("0 1 -1".split()), min_size=len(names),
                                                    max_size=len(names)), min_size=1, max_size=6)))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner,
                                                                                max_size=4), max_leaves=12)
OBJECTS = {"red cube": 0, "blue sphere": 1, "gray cylinder": 2}
SETS = st.lists(st.sampled_from(sorted(OBJECTS)), min_size=1, max_size=3, unique=True)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])  # those of Windows's editors
MANY = settings(deadline=None, max_examples=120)


def text_of(names: list[str], rows: dict[str, list[str]]) -> str:
    return "\n".join([str(len(rows)), " ".join(names), *(" ".join([k, *v]) for k, v in rows.items())]) + "\n"


@MANY
@given(TABLES, ENCODINGS, st.sampled_from(["\n", "\r\n"]), st.data())
def test_a_table_is_read_as_it_was_written_and_a_damaged_one_is_read_or_named(table, encoding, end, data):
    content = text_of(*table).replace("\n", end).encode(encoding)
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list_attr_celeba.txt"
        path.write_bytes(content)
        known, rows = read_attributes(path)
        assert known == tuple(table[0])
        assert rows == {name: [int(value == "1") for value in row] for name, row in table[1].items()}
        path = path.with_suffix(data.draw(st.sampled_from([".txt", ".csv"])))
        path.write_bytes(damaged[:data.draw(st.integers(0, len(content)))])
        try:
            known, rows = read_attributes(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert all(len(row) == len(known) and set(row) <= {0, 1} for row in rows.values())


@MANY
@given(st.dictionaries(WORDS, SETS, min_size=1, max_size=5), st.lists(SETS, min_size=1, max_size=4), JSON,
       st.sampled_from(["objects", "train", "test", "new_test", "none"]), ENCODINGS)
def test_lists_are_read_or_named_whatever_one_holds(train, test, odd, replaced, encoding):
    lists = {"objects": OBJECTS, "train": train, "test": test, "new_test": test} | {replaced: odd}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in lists.items():
            (Path(folder) / f"{name}.json").write_bytes(json.dumps(content).encode(encoding))
        try:
            ids, labels, tests = read_iclevr_lists(Path(folder))
        except UserError as error:
            assert f"{replaced}.json" in str(error) or replaced == "objects"  # or unknown objects
            assert "\n" not in str(error)
            return
    assert replaced == "none" or odd
    for ids_of in [*labels.values(), *tests["test"].tolist()]:
        assert len(ids_of) == 3 and ids_of == sorted(ids_of) and ids_of[0] < len(ids)
