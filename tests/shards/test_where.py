"""Conditions on columns of an index: against pandas, what is refused and how, and a fraction of what meets one."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import ShardSet
from shards.common.errors import UsageError
from shards.where import mask

TABLE = pa.table(
    {
        "age": pa.array([None, 5, 60, 61.5, 80, 20], pa.float32()),
        "sex": ["female", "male", None, "female", 'it\'s "x" `y`', ""],
        "size": pa.array([1, 2, None, -4, 2**40, 6], pa.int64()),
        "biopsed": [True, False, None, True, True, False],
        "skin tone": [1, 2, 3, 4, 5, 6],
        "none": pa.array([None] * 6, pa.string()),
    }
)
PANDAS = TABLE.to_pandas()


def rows(where: str) -> list[int]:
    return np.flatnonzero(mask(where, TABLE)).tolist()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("sex == 'female' and age >= 60", [3]),
        ("age >= 60", [2, 3, 4]),
        ("60 <= age", [2, 3, 4]),
        ("not age >= 60", [1, 5]),
        ("age is null", [0]),
        ("age is not None and age < 60.5", [1, 2, 5]),
        ("20 < age < 80", [2, 3]),
        ("sex in ('female', \"male\")", [0, 1, 3]),
        ("sex not in ['female', 'male']", [4, 5]),
        ("sex in ('female',) or size == -4", [0, 3]),
        ("sex == ''", [5]),
        ('sex == "it\'s \\"x\\" `y`"', [4]),
        ("biopsed", [0, 3, 4]),
        ("not biopsed", [1, 5]),
        ("biopsed == true and `skin tone` > 1", [3, 4]),
        ("size == 1099511627776", [4]),
        ("size > `skin tone`", [4]),
        ("none == 'a' or none != 'a'", []),
        ("(age > 70) or (age < 10 and sex == 'male')", [1, 4]),
    ],
)
def test_conditions_select_the_rows_that_they_say(where, expected):
    assert rows(where) == expected


@given(
    st.sampled_from(["age", "size"]),
    st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
    st.integers(-5, 90),
    st.sampled_from(["and", "or"]),
    st.sampled_from(["female", "male", "other"]),
    st.booleans(),
)
def test_conditions_on_rows_with_all_values_are_those_of_pandas(column, operator, number, join, word, negated):
    whole = PANDAS.dropna(subset=["age", "size", "sex"])
    where = f"{'not ' * negated}({column} {operator} {number} {join} sex == '{word}')"
    assert [row for row in rows(where) if row in whole.index] == whole.query(where).index.tolist()


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("agee > 3", r"no column agee; there are age \(number\), sex \(text\), size \(number\), biopsed \(bool\)"),
        ("age == 'x'", "age is number and 'x' is text, which cannot be compared"),
        ("sex > 3", "sex is text and 3 is number"),
        ("`skin tone` == true", "skin tone is number and true is bool"),
        ("age", "is no comparison"),
        ("age and sex", "'age' is no comparison and no bool column"),
        ("not 3", "'3' is no comparison"),
        ("1 < 2", "1 and 2 are both values"),
        ("age = 3", "cannot be read"),
        (" ", "condition without text: cannot be read"),
        ("age > 1" + "0" * 400, "above the largest whole number"),
        ("age > -18446744073709551616", "above the largest whole number"),
        ("`a\nge` > 1", "no column a ge; there are"),
        ("age > 3; age", "cannot be read"),
        ("age > " + "(" * 5000 + "3" + ")" * 5000, "cannot be read"),
        ("__import__('os').system('true')", r"is no column, number, text in quotes or comparison"),
        ("age.real > 3", "'age.real' is no column"),
        ("age + 1 > 3", r"'age \+ 1' is no column"),
        ("[a for a in age]", "is no column"),
        ("(lambda: 1)() == 1", "is no column"),
        ("age in sex", "behind `in` stands a list of values"),
        ("age in ()", "behind `in` stands a list of values"),
        ("age is 3", "behind `is` and `is not` stands null"),
        ("age == None", "is no column, number"),
        ("age == 9223372036854775808", "'9223372036854775808' is above the largest whole number"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(where, text):
    with pytest.raises(UsageError, match=text) as caught:
        mask(where, TABLE)
    assert "\n" not in str(caught.value)


def test_a_fraction_is_one_of_the_images_that_meet_the_condition(tiny_shards: Path):
    data = ShardSet(tiny_shards)
    where = "age >= 40 and dx in ('mel', 'nv', 'bcc')"
    whole = data.select("train", where=where)
    table = pd.read_parquet(tiny_shards / "index.parquet")
    expected = table.query("split == 'train' and " + where).index.to_numpy()
    assert np.array_equal(whole.samples, expected) and whole.where == where
    parts = [data.select("train", fraction, where=where) for fraction in (0.3, 0.6, 1.0)]
    for smaller, larger in itertools.pairwise(parts):
        assert set(smaller.samples) < set(larger.samples)
    assert np.array_equal(parts[-1].samples, expected)
    assert len(parts[0]) >= 0.3 * len(expected)
    with pytest.raises(UsageError, match="no image of split 'val' meets the condition age > 500"):
        data.select("val", where="age > 500")
