"""Records: what is written is what was given, and what is read is checked."""

from dataclasses import field
from typing import Any, Literal

import pytest

from crrelu_llm.errors import InputError
from crrelu_llm.records import Record


class Inner(Record):
    name: str
    number: float | None = None


class Outer(Record):
    count: int
    kind: Literal["a", "b"] = "a"
    inners: list[Inner] = field(default_factory=list)
    by_name: dict[str, list[float]] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    mixed: float | str | None = None
    sure: bool = False


WHOLE = {
    "count": 3, "kind": "b", "inners": [{"name": "x"}, {"name": "y", "number": None}], "by_name": {"z": [1, 2.5]},
    "free": {"a": [{"b": None}]}, "mixed": "text", "sure": True,
}  # fmt: skip


def test_what_is_read_is_written_again():
    assert Outer.of(WHOLE).as_dict() == WHOLE and list(Outer.of(dict(reversed(WHOLE.items()))).as_dict()) == list(
        WHOLE
    )
    assert Outer.of(WHOLE).inners[1] == Inner(name="y")


def test_what_was_not_given_is_left_out_and_has_its_default():
    few = Outer(count=1)
    assert few.as_dict() == {"count": 1} and (few.inners, few.mixed) == ([], None)
    assert few.but(mixed=None, inners=[Inner(name="x")]).as_dict() == {
        "count": 1, "inners": [{"name": "x"}], "mixed": None
    }  # fmt: skip
    assert few.as_dict() == {"count": 1}, "a record does not change"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: no such field"),
        ({"count": "3"}, 'count: "3" is not a whole number'),
        ({"count": True}, "count: true is not a whole number"),
        ({"count": 1.5}, "count: 1.5 is not a whole number"),
        ({"kind": "c"}, 'kind: "c" is not one of a, b'),
        ({"inners": {}}, "inners: {} is not a list"),
        ({"inners": [{"name": "x"}, {}]}, "inners[1].name: missing"),
        ({"inners": [{"name": "x", "number": "1"}]}, 'inners[0].number: "1" is not a number or null'),
        ({"by_name": {"z": [1, None]}}, "by_name.z[1]: null is not a number"),
        ({"free": None}, "free: null is not an object"),
        ({"mixed": [1] * 50}, "mixed: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, … is not a number or a text or null"),
        ({"sure": 1}, "sure: 1 is not true or false"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(change, message):
    with pytest.raises(InputError) as error:
        Outer.of(WHOLE | change)
    assert str(error.value) == message


def test_a_document_of_another_kind_is_no_record():
    with pytest.raises(InputError, match=r"^\[1\] is not an object$"):
        Outer.of([1])
    with pytest.raises(InputError, match=r"^count: missing$"):
        Outer.of({})
