"""CSV tables."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weft.data import ArrayData, load
from weft.errors import DataError

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(text: str) -> str:
        (tmp_path / "table.csv").write_text(text, encoding="utf-8")
        return f"csv:{tmp_path / 'table.csv'}"

    return save


def stored(split: object) -> ArrayData:
    assert isinstance(split, ArrayData)
    return split


def features(data: ArrayData) -> torch.Tensor:
    assert isinstance(data.inputs, torch.Tensor)
    return data.inputs[data.rows]


TABLE = """size,colour,kind,part
1,red,cat,train
3,blue,dog,train
2,,cat,train
9,green,dog,val
,red,cat,test
"""


def test_columns_are_encoded_by_the_training_rows(write: Write) -> None:
    data = load(write(TABLE) + "#target=kind&split=part")
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (4,)
    deviation = (2 / 3) ** 0.5
    # size standardised, then colour as "", blue, red
    expected = [[-1 / deviation, 0, 0, 1], [1 / deviation, 0, 1, 0], [0, 1, 0, 0]]
    assert torch.allclose(features(stored(data.train)), torch.tensor(expected))
    # A colour that training never saw is all zeros; a missing number is the training mean.
    assert torch.allclose(features(stored(data.val)), torch.tensor([[7 / deviation, 0, 0, 0]]))
    assert features(stored(data.test)).tolist() == [[0, 0, 0, 1]]
    assert stored(data.val).labels.tolist() == [1]


def test_rows_are_split_by_class_where_no_column_says(write: Write) -> None:
    rows = "".join(f"{i},{'yes' if i % 4 == 0 else 'no'}\n" for i in range(40))
    data = load(write("x,answer\n" + rows) + "#target=answer", val=0.2, test=0.2)
    assert torch.bincount(stored(data.val).labels).tolist() == [6, 2]
    train = features(stored(data.train))
    assert abs(float(train.mean())) < 1e-6
    assert abs(float(train.std(correction=0)) - 1) < 1e-6


def test_a_constant_of_training_stays_finite_where_it_changes(write: Write) -> None:
    data = load(write("c,y,s\n2,a,train\n2,b,train\n5,a,val\n") + "#target=y&split=s")
    assert features(stored(data.train)).tolist() == [[0], [0]]
    assert features(stored(data.val)).tolist() == [[3]]


@pytest.mark.parametrize(
    ("target", "classes"),
    [
        ([str(i % 11) for i in range(40)], tuple(map(str, range(11)))),
        ([str(i) for i in range(40)], None),
        ([str(i / 4) for i in range(40)], None),
    ],
)
def test_what_a_target_of_numbers_means(
    write: Write, target: list[str], classes: tuple[str, ...] | None
) -> None:
    rows = "".join(f"{i},{y}\n" for i, y in enumerate(target))
    data = load(write("x,y\n" + rows) + "#target=y", val=0, test=0)
    assert data.classes == classes
    labels = stored(data.train).labels
    assert labels.tolist() == [float(y) for y in target]
    assert labels.dtype == (torch.float32 if classes is None else torch.int64)


def test_kind_and_drop_override(write: Write) -> None:
    spec = write("id,x,y\na,1,0\nb,2,1\n")
    data = load(spec + "#target=y&kind=number&drop=id", val=0, test=0)
    assert data.classes is None
    assert data.input_shape == (1,)
    assert load(spec + "#target=y", val=0, test=0).input_shape == (3,)


def test_semicolons_byte_order_marks_and_constant_columns(write: Write) -> None:
    data = load(write("\ufeffx;c;y\n1,5;2;a\n2,5;2;b\n") + "#target=y", val=0, test=0)
    # "1,5" is a text here: two categories, and a constant column of zeros in front.
    assert features(stored(data.train)).tolist() == [[0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("x,y\n1,2\n", "", "Add #target=COLUMN, one of: x, y"),
        ("x,label\n1,2\n", "#target=lable", "found target=lable; .*Close matches: label"),
        ("x,y\n1,2\n", "#target=y&drop=z", "found drop=z"),
        ("x,y\n1,2\n", "#target=y&split=z", "found split=z"),
        ("x,y\n1,2\n1,2,3\n", "#target=y", r"1 of 2 rows do not have the 2 cells .*rows 2;"),
        ("x,y\n1,\n2,a\n", "#target=y", r"1 of 2 rows have no target y \(rows 1\)"),
        ("x,y\n1,nan\n2,3\n", "#target=y", r"1 of 2 rows have no target y \(rows 1\)"),
        ("x,y\n1,a\n2,b\n", "#target=y&kind=number", "y holds texts"),
        ("x,y\n", "#target=y", "found 1 lines"),
        ("x,x,y\n1,2,3\n", "#target=y", "occur twice: x"),
        ("y\na\nb\n", "#target=y", "found no input column"),
        ("x,y,s\n1,a,trian\n", "#target=y&split=s", "split 'trian'.*Close matches: train"),
        ("x,y,s\n1,a,test\n", "#target=y&split=s", "found no training row"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    write: Write, text: str, options: str, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        load(write(text) + options)


def test_free_text_is_no_category(write: Write) -> None:
    rows = "".join(f"name {i},{i % 2}\n" for i in range(1001))
    with pytest.raises(DataError, match=r"1001 different texts; .*Leave it out with drop=who"):
        load(write("who,y\n" + rows) + "#target=y")


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("x,y\n1,\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match="not a UTF-8 table"):
        load(f"csv:{tmp_path / 't.csv'}#target=y")
