import base64
import os
import pickle
import zlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cnf_lab.data.pickled import read_frame
from cnf_lab.errors import DataError

# DataFrame(arange(20).reshape(5, 4) / 8, columns=[Time, Meth, R1, R2]).sample(frac=0.8, random_state=1)
# as to_pickle of old releases wrote it: the bytes of the files, compressed.
WRITTEN_LONG_AGO = {
    "pandas 0.20.3, Python 2.7": (
        "eNp1Us9P1EAUbrtlZQsKKgL+RkAt/qgsEuPBBGKMiTasycY5NpNpd2Aa2+6+dqpuYhM8gPpf+Sd49OjBgwcPxhiv+toOMUvkHe"
        "ZrZr6+973vvV0jGLCkxzIn6Kfc2U5ZzK1HTLLH1RfoK2/BKKBhkxaNuWQ9fALTgzFiUjkcQJO0yqvqPzhGxmhFGB9JGiaSpwmL"
        "Muth1A9ebLGE7fDUghbmtmwPJuxD9B5/zTPHZxm3aMJf0SfljQWTR9MU43gBJ2xiVhqmgiSPB8OaHOeRDFmasqFFUx70k0ymeS"
        "AtmK5ZFuatXuGkq+0R3X/XhVO2q7vmniL0sFv04zQxnt13NVdHwoztNoj+ptPpPP2DUR3uhvQ/eHAGVTwP0ZJZYm5xKWCOGN02"
        "zOO5Bme59ImZlI6d6+T7XTgv/t8aVuZpGGB38t66avFCARdtMSWmxT+ll2qlAsWFB+IuV+IejIrTUBxZMLQ6dIWmNhrSF7WuBe"
        "7BlZFKi1Ul19wva20f1Fo6otZ7sltn/LFR40+FvxT+VvhF4VeF3xR+V6htKsUKDYWNzVHlHxX/k8LPOA3mwbKYFLgaVw/7dk35"
        "NoMTu26LWTEn5kU5HdW/zQpYIc1Vp73utOFGATdxrAwnA7fEBGn65TZncNsDp4A7NhmPd1KKdxmsBpT6eYg7l1BqZVEY4Oq00S"
        "2z8muNNF+yKMc8d8VizvJM+rnv/AVf7QuU"
    ),
    "pandas 0.23.4, Python 3.6": (
        "eNp9U0FrFDEUntmdWWu1SMGiIoge1NXD4EopPQhbXRHq0BWK12XIzKbN0JnskklaFyzUQ6tCbn3+H3+CR48ePHjwICJe9SWTwm"
        "4t5pAvJO/l+97Ll4Pgw17Ts0MvjgkfkirKRoJGW4KUFPT5p0SSZ3Z9DPfewD60dZgMcRP00nR8ziUVnBQV6ItPilG2s0E42aai"
        "TmsPMO/qbPyQvqJVlJIKaeYTTveSdbOHCeyCDk/WhjBwfFyV40mdXqpC5kQIMkG+RNBsxCspVCYxRYc2EPQ5pLMhxxB7h9DzU3"
        "gLm9CO/Tg4BLakw6GcjE1luvFiFWNivz5vav819Pv9539w2CnuSkjfmyqCl7lpTLBBJcO8zY6ZHgLFcx1w06i+OsJb2IK+flbB"
        "qI2KPMOa17lcWZ6qky2yy+yKUcquTeu8oRv5KXWPTqnzjLrezUb9kp7vMPBmB2AYu1/rowM4gy4Ojizh1gwhW/2X7l3voL70R7"
        "fGnw5/Ofzt8IvDrw6/Ofzu0Ftzoh02HDbXZsV/dPGfHH7umnIIlrHALv2nfbfMs7Hb7A67y9p0qgNkH3TrQdRZjjq1zQi+D7B5"
        "3UqNgSsY2O3WLimUOXis58ptkeAZmnwuVTlakOMyrIo8o9Zk2EDbM0VUZQ2RoMHwFxkDn/yopKSSWEcPQKXRXxY8Lyk="
    ),
}
ROWS = np.array([[8, 9, 10, 11], [4, 5, 6, 7], [16, 17, 18, 19], [0, 1, 2, 3]]) / 8


@pytest.mark.parametrize("text", WRITTEN_LONG_AGO.values(), ids=WRITTEN_LONG_AGO)
def test_reads_what_old_releases_wrote(tmp_path, text):
    path = tmp_path / "frame.pickle"
    path.write_bytes(zlib.decompress(base64.b64decode(text)))
    names, columns = read_frame(path)
    assert names == ["Time", "Meth", "R1", "R2"]
    np.testing.assert_array_equal(columns, ROWS.T)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(allow_nan=False)),
    fortran=st.booleans(),
)
def test_reads_what_this_pandas_writes(tmp_path, protocol, rows, fortran):
    names = [f"R{number} \u00e9" for number in range(rows.shape[1])]
    frame = pd.DataFrame(np.asarray(rows, order="F" if fortran else "C"), columns=names)
    frame.to_pickle(tmp_path / "frame.pickle", protocol=protocol)
    found, columns = read_frame(tmp_path / "frame.pickle")
    assert found == names
    np.testing.assert_array_equal(columns, rows.T)


def test_columns_of_several_types_keep_their_order(tmp_path):
    frame = pd.DataFrame(ROWS, columns=list("abcd"))
    frame["b"] = np.arange(4)
    frame["d"] = frame["d"].astype(np.float32)
    frame = frame.sample(frac=1.0, random_state=0)
    frame.to_pickle(tmp_path / "frame.pickle")
    names, columns = read_frame(tmp_path / "frame.pickle")
    assert names == list("abcd")
    np.testing.assert_array_equal(columns, frame.to_numpy().T)


class Hostile:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile_pickles(mark):
    command = f"touch {mark}"
    yield "call", Hostile(os.system, command)
    yield "eval", Hostile(eval, f"open({str(mark)!r}, 'w')")
    yield "pandas", Hostile(pd.eval, "__import__('os')")
    yield "within", [pd.DataFrame(ROWS), Hostile(os.system, command)]
    frame = pd.DataFrame(ROWS)
    frame.attrs["x"] = Hostile(os.system, command)
    yield "frame", frame
    yield "numpy", Hostile(np.load, str(mark))


@pytest.mark.parametrize("name", ["call", "eval", "pandas", "within", "frame", "numpy"])
def test_nothing_in_a_hostile_pickle_runs(tmp_path, name):
    mark = tmp_path / "mark"
    path = tmp_path / "frame.pickle"
    path.write_bytes(pickle.dumps(dict(hostile_pickles(mark))[name]))
    with pytest.raises(DataError, match="was not run") as error:
        read_frame(path)
    assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        np.zeros((3, 2)),
        pd.Series([1.0, 2.0]),
        pd.DataFrame({"a": [1.0], "b": ["text"]}),
        pd.DataFrame({"a": [True]}),
        pd.DataFrame({"a": pd.to_datetime(["2020-01-01"])}),
    ],
    ids=["list", "array", "series", "text", "bool", "time"],
)
def test_only_frames_of_numbers(tmp_path, value):
    (tmp_path / "frame.pickle").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match="Expected a pickled pandas frame of numbers"):
        read_frame(tmp_path / "frame.pickle")


@pytest.mark.parametrize("length", [0, 10, 300, -1])
def test_damaged_pickle(tmp_path, length):
    path = tmp_path / "frame.pickle"
    pd.DataFrame(ROWS).rename(columns=str).to_pickle(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match="Delete the file"):
        read_frame(path)
