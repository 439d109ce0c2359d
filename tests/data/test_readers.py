import decimal
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnf_lab.data.columns import check_columns, find_columns
from cnf_lab.data.readers import ParquetTable, Table, open_table
from cnf_lab.errors import ConfigError, DataError

ADVICE = "Type dataset.drop_columns={columns}."


def rows(count: int = 30, columns: int = 3, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, columns)).astype(dtype)


def named(array: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(array, columns=list("abcdefgh")[: array.shape[1]])


@pytest.fixture
def write(tmp_path):
    """Write an array under a name whose ending decides the form."""

    def written(array: np.ndarray, name: str) -> str:
        path = tmp_path / name
        with path.open("wb") as file:
            match path.suffix.lower():
                case ".npy":
                    np.save(file, array)
                case ".npz":
                    np.savez(file, x=array)
                case ".csv":
                    named(array).to_csv(file, index=False)
                case ".parquet":
                    named(array).to_parquet(file, row_group_size=7)
        return str(path)

    return written


@pytest.fixture
def text(tmp_path):
    def written(content: str, name: str = "rows.csv") -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return written


def everything(table: Table) -> np.ndarray:
    return table.read(np.arange(len(table)), range(len(table.column_names)))


# -- one interface -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.npy", "rows.npz", "rows.csv", "rows.parquet", "ROWS.NPY"])
def test_every_form_gives_the_same_rows(write, name):
    array = rows()
    table = open_table(write(array, name))
    assert len(table) == 30
    assert table.column_names == (["a", "b", "c"] if table.named else ["0", "1", "2"])
    np.testing.assert_allclose(everything(table), array, rtol=1e-15)
    chosen = np.array([29, 3, 3, 14])
    np.testing.assert_allclose(table.read(chosen, [2, 0]), array[chosen][:, [2, 0]], rtol=1e-15)
    np.testing.assert_allclose(np.concatenate(list(table.chunks([1]))), array[:, [1]], rtol=1e-15)
    copy = pickle.loads(pickle.dumps(table))
    np.testing.assert_allclose(everything(copy), array, rtol=1e-15)


@pytest.mark.parametrize("name", ["rows.npy", "rows.npz", "rows.parquet"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        ("int16", "float32"),
        ("int64", "float64"),
        ("bool", "float32"),
    ],
)
def test_no_value_loses_digits(write, name, dtype, expected):
    array = (100 * rows()).astype(dtype)
    table = open_table(write(array, name))
    assert table.dtype([0, 1, 2]) == expected
    values = everything(table)
    assert values.dtype == expected
    np.testing.assert_array_equal(values, array)


def test_byte_order_and_memory_order_do_not_matter(tmp_path):
    array = rows()
    np.save(tmp_path / "big.npy", np.asfortranarray(array.astype(">f8")))
    np.testing.assert_array_equal(everything(open_table(str(tmp_path / "big.npy"))), array)


def test_npy_is_mapped_and_pickled_by_name(write):
    table = open_table(write(rows(20000), "rows.npy"))
    assert isinstance(table.array, np.memmap)
    assert len(pickle.dumps(table)) < 2000


def test_chunks_are_bounded(write, monkeypatch):
    table = open_table(write(rows(10, 8), "rows.npy"))
    monkeypatch.setattr(type(table), "__len__", lambda self: 250_001)
    monkeypatch.setattr(type(table), "read", lambda self, rows, columns: np.empty((len(rows), 0)))
    assert [len(chunk) for chunk in table.chunks(range(8))] == [100_000, 100_000, 50_001]
    assert max(len(chunk) for chunk in table.chunks(range(1000))) == 2**23 // 1000


def test_npz_with_several_arrays_wants_a_key(tmp_path):
    np.savez(tmp_path / "rows.npz", train=rows(), labels=np.arange(5))
    path = str(tmp_path / "rows.npz")
    np.testing.assert_array_equal(everything(open_table(path, key="train")), rows())
    for key in (None, "trian"):
        with pytest.raises(ConfigError, match=f"got {key or 'null'}. Choose one of train, labels"):
            open_table(path, key=key)


# -- csv -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "names", "values"),
    [
        pytest.param("a,b\n1,2\n3,4\n", ["a", "b"], [[1, 2], [3, 4]], id="header"),
        pytest.param("1.5,2\n3,4\n", ["0", "1"], [[1.5, 2], [3, 4]], id="no-header"),
        pytest.param("0,1\n5,6\n", ["0", "1"], [[5, 6]], id="pandas-numbers"),
        pytest.param(",a,b\n0,1,2\n1,3,4\n", ["a", "b"], [[1, 2], [3, 4]], id="pandas-labels"),
        pytest.param("a;b\n1;2\n", ["a", "b"], [[1, 2]], id="semicolons"),
        pytest.param("a\tb\n1\t2\n", ["a", "b"], [[1, 2]], id="tabs"),
        pytest.param("\ufeffa, b\n1, 2\n", ["a", "b"], [[1, 2]], id="byte-order-mark-and-blanks"),
        pytest.param('"x,y",z\n1,2\n', ["x,y", "z"], [[1, 2]], id="quotes"),
        pytest.param("x\n1\n2\n", ["x"], [[1], [2]], id="one-column"),
        pytest.param("a,b\nTrue,1\nFalse,2\n", ["a", "b"], [[1, 1], [0, 2]], id="booleans"),
        pytest.param("a\n99999999999999999999999\n", ["a"], [[1e23]], id="huge-integers"),
    ],
)
def test_csv_headers_and_delimiters(text, content, names, values):
    table = open_table(text(content))
    assert table.column_names == names
    assert table.text_columns == {}
    np.testing.assert_array_equal(everything(table), values)


def test_csv_text_is_known_by_its_first_wrong_cell(text):
    table = open_table(text("a,b,c\n1,,x\n2,n/a,y\n3,?,z\n"))
    assert table.text_columns == {"b": "'?'", "c": "'x'"}


# -- parquet -------------------------------------------------------------------------------------------


def test_parquet_row_groups(write):
    table = open_table(write(rows(30), "rows.parquet"))
    assert table.group_starts.tolist() == [0, 7, 14, 21, 28]


def test_parquet_reads_a_group_once_for_rows_that_stay_in_it(write, monkeypatch):
    read = []
    original = ParquetTable.read_group
    monkeypatch.setattr(
        ParquetTable, "read_group", lambda self, number, columns: read.append(number) or original(self, number, columns)
    )
    table = open_table(write(rows(30), "rows.parquet"))
    for batch in ([8, 9, 13], [7, 0, 3], [1, 2, 29], [28]):
        np.testing.assert_array_equal(table.read(np.array(batch), [0, 1]), rows(30)[batch][:, :2])
    assert read == [1, 0, 4]


def test_parquet_types(tmp_path):
    frame = pd.DataFrame(
        {
            "small": np.arange(4, dtype="int16"),
            "decimal": [decimal.Decimal("1.5")] * 4,
            "missing": pd.array([1, None, 3, 4], dtype="Int64"),
            "flag": [True, False, True, True],
            "city": list("abcd"),
            "day": pd.date_range("2020-01-01", periods=4),
        },
        index=list("wxyz"),
    )
    frame.to_parquet(tmp_path / "rows.parquet")
    table = open_table(str(tmp_path / "rows.parquet"))
    assert table.column_names == ["small", "decimal", "missing", "flag", "city", "day"]  # no index
    assert set(table.text_columns) == {"city", "day"}
    assert table.dtype([0, 3]) == np.float32
    values = table.read(np.array([1, 3]), [0, 1, 2, 3])
    np.testing.assert_array_equal(values, [[1, 1.5, np.nan, 0], [3, 1.5, 4, 1]])


def test_parquet_with_empty_row_groups(tmp_path):
    schema = pa.schema([("a", pa.float64())])
    with pq.ParquetWriter(tmp_path / "rows.parquet", schema) as writer:
        for count in (3, 0, 2):
            writer.write_table(pa.table({"a": np.arange(count, dtype=float) + 10 * count}, schema=schema))
    table = open_table(str(tmp_path / "rows.parquet"))
    assert table.group_starts.tolist() == [0, 3]
    assert everything(table).flatten().tolist() == [30, 31, 32, 20, 21]


def test_parquet_columns_need_names_of_their_own(tmp_path):
    pq.write_table(
        pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0])], names=["a", "a"]), tmp_path / "rows.parquet"
    )
    with pytest.raises(DataError, match="to have its own name, got a, a"):
        open_table(str(tmp_path / "rows.parquet"))


# -- faults of files -------------------------------------------------------------------------------------


def test_unknown_endings_list_the_known_ones(text):
    with pytest.raises(ConfigError, match=r"ends in .npy, .npz, .csv, .parquet, got .*rows.xlsx"):
        open_table(text("", "rows.xlsx"))


@pytest.mark.parametrize("name", ["rows.npy", "rows.npz", "rows.csv", "rows.parquet"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(DataError, match=rf"got .*{name}, which is no file"):
        open_table(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.npy", "rows.npz", "rows.parquet"])
@pytest.mark.parametrize("keep", [0, 10, 0.5], ids=["empty", "start", "half"])
def test_damaged_files_are_named(write, tmp_path, name, keep):
    path = tmp_path / name
    write(rows(1000), name)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(
        DataError, match=rf"Expected .*{name} to be a whole \{path.suffix} file .* Write the file again"
    ):
        open_table(str(path))


def test_damage_inside_a_row_group_is_named(write, tmp_path):
    path = tmp_path / "rows.parquet"
    write(rows(1000), path.name)
    content = bytearray(path.read_bytes())
    content[4:300] = b"\xff" * 296
    path.write_bytes(content)
    with pytest.raises(DataError, match="to be a whole .parquet file"):
        everything(open_table(str(path)))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "No columns"),
        ("a,b\n1,2\n3,4,5,6\n", "Expected 2 fields in line 3"),
        ("a,b\n1,2,3\n4,5,6\n", "rows are longer than the header"),
    ],
)
def test_damaged_csv_files_are_named(text, content, cause):
    with pytest.raises(DataError, match=f"to be a whole .csv file .* {cause}"):
        open_table(text(content))


def test_text_in_another_encoding_is_named(tmp_path):
    (tmp_path / "rows.csv").write_bytes("größe,b\n1,2\n".encode("latin1"))
    with pytest.raises(DataError, match="to be a whole .csv file"):
        open_table(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), r"shape \(rows, columns\), got \(5,\). Reshape it, for one column with array\[:, None\]"),
        (np.zeros((2, 3, 4)), r"got \(2, 3, 4\)"),
        (np.zeros((0, 3)), "Expected rows and columns in .*, got 0 x 3"),
        (np.array([["a", "b"]]), "Expected numbers in .*, got dtype <U1"),
        (np.zeros((2, 2), dtype=complex), "Expected numbers in .*, got dtype complex128"),
        (np.array([[1, None]], dtype=object), "to be a whole .np[yz] file of numbers, got .*[Oo]bject"),
    ],
)
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_arrays_of_the_wrong_kind_are_refused(tmp_path, array, message, ending):
    path = tmp_path / f"rows.{ending}"
    if ending == "npy":
        np.save(path, array)
    else:
        np.savez(path, array)
    with pytest.raises(DataError, match=message):
        open_table(str(path))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_files_without_rows_are_refused(write, name):
    with pytest.raises(DataError, match="Expected rows and columns in .*, got 0 x 3"):
        open_table(write(np.zeros((0, 3)), name))


# -- columns -----------------------------------------------------------------------------------------------


def test_columns_are_found_by_name_and_by_number(text):
    table = open_table(text("a,2,c\n1,2,3\n"))
    assert find_columns(table, ["c", 0, "0", 2][:2], "dataset.columns") == [2, 0]
    assert find_columns(table, [2], "dataset.columns") == [1]  # a name goes before a number


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            ["heigth"],
            "Expected dataset.context to name columns of .*, got heigth. Type one of its 3 columns, such as height",
        ),
        ([3], "got 3. Type one of its 3 columns, such as age, height, weight"),
        ([-1], "got -1"),
        (["age", 0], r"to name each column once, got \[age,0\]"),
    ],
)
def test_wrong_columns_are_named(text, chosen, message):
    table = open_table(text("age,height,weight\n1,2,3\n"))
    with pytest.raises(ConfigError, match=message):
        find_columns(table, chosen, "dataset.context")


@pytest.mark.parametrize("name", ["rows.npy", "rows.npz", "rows.csv", "rows.parquet"])
def test_faulty_values_are_counted_in_every_form(write, name):
    array = rows(300, 4)
    array[250:253, 1], array[17, 2], array[19, 2], array[:, 3] = np.nan, np.inf, np.nan, 2.5
    table = open_table(write(array, name))
    b, c, d = table.column_names[1:]
    with pytest.raises(DataError) as error:
        check_columns(table, range(4), ADVICE)
    assert str(error.value) == (
        f"Expected finite, varying numbers in every column of {table.path}, got "
        f"column {b}: NaN (3 values, the first in row 250); "
        f"column {c}: NaN and infinities (2 values, the first in row 17); "
        f"column {d}: only the value 2.5. Type dataset.drop_columns=[{b},{c},{d}]."
    )
    assert check_columns(table, [0], ADVICE) == {}


def test_faults_are_found_in_any_chunk(write, monkeypatch):
    array = rows(50, 2)
    array[:40, 0], array[43, 1] = 1.0, np.inf  # constant at first only
    table = open_table(write(array, "rows.npy"))
    monkeypatch.setattr(
        type(table), "chunks", lambda self, columns: (self.read(part, columns) for part in np.split(np.arange(50), 5))
    )
    with pytest.raises(DataError, match=r"got column 1: infinities \(1 values, the first in row 43\)\. Type"):
        check_columns(table, [0, 1], ADVICE)


def test_text_columns_are_named_with_quotes_where_hydra_wants_them(text):
    table = open_table(text("a b,city,ok\n1,Paris,1\n1,Rome,2\n"))
    with pytest.raises(DataError, match=r"column city: text \('Paris'\); column a b: only .*=\[city,'a b'\]\."):
        check_columns(table, [0, 1, 2], ADVICE)
    assert check_columns(table, [0, 2], ADVICE, varying=False) == {"a b": 1}


def test_many_faults_stay_one_line(write):
    table = open_table(write(np.full((3, 8), np.nan), "rows.csv"))
    wide = open_table(write(np.full((3, 40), np.nan), "rows.npy"))
    with pytest.raises(DataError, match=r"column h: NaN"):
        check_columns(table, range(8), ADVICE)
    with pytest.raises(DataError, match=r"column 9: [^;]*; and 30 more. Type .*,38,39\]"):
        check_columns(wide, range(40), ADVICE)


def test_only_text_is_refused_without_reading_numbers(tmp_path):
    pd.DataFrame({"city": ["a", "b"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"column city: text \(.*string\)"):
        check_columns(open_table(str(tmp_path / "rows.parquet")), [0], ADVICE)


def test_discrete_columns_are_counted(write):
    array = rows(500, 4)
    array[:, 1], array[:, 2] = np.arange(500) % 3, np.arange(500) % 20
    assert check_columns(open_table(write(array, "rows.npy")), range(4), ADVICE) == {"1": 3}
    assert check_columns(open_table(write(rows(5), "few.npy")), range(3), ADVICE) == {}
