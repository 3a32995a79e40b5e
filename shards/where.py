"""Conditions on the columns of an index, such as `sex == 'female' and age >= 60`: parsed, checked, and never executed.

Python's grammar is used, and of it: names of columns (in backticks where they are no Python names), numbers, texts in
quotes, true and false; ==, !=, <, <=, >, >=, chains of these; `in (…)` and `not in (…)`; `is null` and `is not null`;
and, or, not, parentheses. A row without a value meets no condition on that value except `is null`, as in SQL.
"""

import ast
import re
import warnings
from typing import TYPE_CHECKING, Any

from shards.common.errors import UsageError, one_line

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_COMPARISONS: dict[type, str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_CONSTANTS = {"true": True, "false": False}
_NULL = ("null", "None")


def mask(where: str, table: "pa.Table") -> "np.ndarray":
    """(rows,) bool: which rows of a table meet the condition. Raises UsageError that says what is wrong with it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    quoted: dict[str, str] = {}

    def plain(found: re.Match[str]) -> str:
        if found[1] is None:  # a text in quotes
            return found[0]
        quoted[name := f"_backticks_{len(quoted)}"] = found[1]
        return name

    try:
        text = re.sub(r"'[^']*'|\"[^\"]*\"|`([^`]+)`", plain, where.strip())
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # about numbers such as 60and
            tree = ast.parse(text, mode="eval")
        found = _Condition(where, table, quoted).read(tree.body)
    except pa.ArrowException as error:
        raise UsageError(f"condition {one_line(where, 160)}: {one_line(error, 160)}") from None
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        given = one_line(where, 160) if where.strip() else "without text"
        raise UsageError(f"condition {given}: cannot be read; write it as in: sex == 'female' and age >= 60") from None
    if not isinstance(found, (pa.Array, pa.ChunkedArray)) or not pa.types.is_boolean(found.type):
        raise UsageError(f"condition {one_line(where, 160)}: is no comparison, as in: age >= 60")
    return pc.fill_null(found, False).to_numpy(zero_copy_only=False).astype(bool)


class _Condition:
    """A syntax tree → Arrow columns and Python values."""

    def __init__(self, where: str, table: "pa.Table", quoted: dict[str, str]) -> None:
        import pyarrow.compute

        self._where, self._table, self._quoted = where, table, quoted
        self._pc: Any = pyarrow.compute  # it makes its functions at run time

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"condition {one_line(self._where, 160)}: {what}")

    def read(self, node: ast.AST) -> Any:
        """The column or value that a node stands for. Raises UsageError for what conditions do not have."""
        pc = self._pc
        match node:
            case ast.BoolOp(op=op, values=parts):
                join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                found = self._flags(parts[0])
                for part in parts[1:]:
                    found = join(found, self._flags(part))
                return found
            case ast.UnaryOp(op=ast.Not(), operand=part):
                return pc.invert(self._flags(part))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=(int() | float())) as number):
                return -self.read(number)
            case ast.Constant(value=(str() | int() | float()) as value):
                if isinstance(value, int) and value >= 1 << 63:
                    raise self._wrong(f"'{one_line(str(value), 60)}' is above the largest whole number, 2^63 - 1")
                return value
            case ast.Name(id=name) if name in _CONSTANTS:
                return _CONSTANTS[name]
            case ast.Name(id=name):
                return self._column(self._quoted.get(name, name))
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                found = self._compare(sides[0], ops[0], sides[1])
                for number in range(1, len(ops)):
                    found = pc.and_kleene(found, self._compare(sides[number], ops[number], sides[number + 1]))
                return found
        raise self._wrong(f"'{one_line(ast.unparse(node), 60)}' is no column, number, text in quotes or comparison")

    def _column(self, name: str) -> Any:
        if name not in self._table.column_names:
            there = ", ".join(f"{field.name} ({_kind(field.type)})" for field in self._table.schema)
            raise self._wrong(f"no column {one_line(name, 60)}; there are {there}")
        return self._table[name]

    def _flags(self, node: ast.AST) -> Any:
        found = self.read(node)
        if _kind_of(found) != "bool" or isinstance(found, bool):
            raise self._wrong(f"'{one_line(ast.unparse(node), 60)}' is no comparison and no bool column")
        return found

    def _compare(self, left: ast.AST, op: ast.cmpop, right: ast.AST) -> Any:
        pc, one = self._pc, self.read(left)
        if isinstance(op, (ast.Is, ast.IsNot)):
            empty = isinstance(right, ast.Name) and right.id in _NULL
            if not (empty or (isinstance(right, ast.Constant) and right.value is None)):
                raise self._wrong("behind `is` and `is not` stands null; compare values with == and !=")
            return (pc.is_null if isinstance(op, ast.Is) else pc.is_valid)(one)
        if isinstance(op, (ast.In, ast.NotIn)):
            if not isinstance(right, (ast.Tuple, ast.List, ast.Set)) or not right.elts:
                raise self._wrong("behind `in` stands a list of values, as in: dx in ('mel', 'bcc')")
            found = None
            for part in right.elts:
                same = self._same(left, one, part, self.read(part), "equal")
                found = same if found is None else pc.or_kleene(found, same)
            return found if isinstance(op, ast.In) else pc.invert(found)
        return self._same(left, one, right, self.read(right), _COMPARISONS[type(op)])

    def _same(self, left: ast.AST, one: Any, right: ast.AST, other: Any, function: str) -> Any:
        """A comparison of two things of one kind, of which one at least is a column."""
        kinds = [_kind_of(one), _kind_of(other)]
        names = [one_line(ast.unparse(node), 60) for node in (left, right)]
        names = [self._quoted.get(name, name) for name in names]
        if kinds[0] != kinds[1]:
            raise self._wrong(f"{names[0]} is {kinds[0]} and {names[1]} is {kinds[1]}, which cannot be compared")
        if isinstance(one, (str, int, float)) and isinstance(other, (str, int, float)):
            raise self._wrong(f"{names[0]} and {names[1]} are both values, and one has to be a column")
        return getattr(self._pc, function)(one, other)


def _kind(kind: "pa.DataType") -> str:
    """A type for people: text, number or bool."""
    import pyarrow as pa

    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return "number" if is_number else "bool" if pa.types.is_boolean(kind) else "text"


def _kind_of(value: Any) -> str:
    if isinstance(value, (bool, str, int, float)):
        return {bool: "bool", str: "text"}.get(type(value), "number")
    return _kind(value.type)
