"""Multiple-choice items: what is read, how groups and ids are found, and every bad row."""

import json

import pytest
from conftest import write_rows

from moetools.errors import DataError
from moetools.items import Item, read_items


def test_items_are_read(tmp_path):
    row = {"id": "x", "question": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0}
    path = write_rows(tmp_path / "items.jsonl", [row])
    assert read_items(path) == [
        Item(question="1 + 1 =", choices=(" 2", " 3"), answer=0, where=f"{path} row 1", id="x")
    ]


GOOD = {"question": "q", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, "'question' holds ''"),
        ({"question": 3}, "'question' holds 3"),
        ({"choices": ["a"]}, "at least two"),
        ({"choices": "ab"}, "at least two"),
        ({"choices": ["a", ""]}, "at least two"),
        ({"answer": 2}, "'answer' holds 2. Write the index of the right choice, 0 to 1"),
        ({"answer": -1}, "0 to 1"),
        ({"answer": True}, "'answer' holds True"),
        ({"answer": "a"}, "'answer' holds 'a'"),
    ],
)
def test_bad_rows_name_file_row_and_remedy(tmp_path, change, message):
    path = write_rows(tmp_path / "items.jsonl", [GOOD, {**GOOD, **change}])
    with pytest.raises(DataError, match=message) as raised:
        read_items(path)
    assert f"{path} row 2" in str(raised.value)


def test_missing_columns_files_and_rows(tmp_path):
    path = write_rows(tmp_path / "items.jsonl", [{"question": "q", "choices": ["a", "b"]}])
    with pytest.raises(DataError, match="has no 'answer'"):
        read_items(path)
    with pytest.raises(DataError, match="no such file"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no items"):
        read_items(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text(json.dumps(GOOD) + "\n{")
    with pytest.raises(DataError, match=r"broken.jsonl row 2 is not valid JSON"):
        read_items(tmp_path / "broken.jsonl")
