"""One clear line out of other libraries' errors, also of those that say nothing or quote too much."""

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from lib.problems import first_line, first_problem


class Row(BaseModel):
    """Refuses a pair that does not belong together, besides wrong values."""

    size: int
    text: str = ""

    @model_validator(mode="after")
    def _fits(self) -> "Row":
        if len(self.text) != self.size:
            raise ValueError("another length")
        return self


def test_an_error_is_told_by_its_first_line_or_by_its_kind():
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(ValueError("one"), 2) == "on"
    assert first_line(OSError()) == "OSError"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"size": "two"}, "size: Input should be a valid integer, unable to parse string as an integer, found 'two'"),
        ({}, "size: Field required"),
        ({"size": 2, "text": "a"}, "the row: Value error, another length"),
    ],
)
def test_the_first_problem_says_where_and_what(row, told):
    with pytest.raises(ValidationError) as caught:
        Row.model_validate(row)
    assert first_problem(caught.value, "the row") == told


def test_a_long_value_is_quoted_in_part():
    with pytest.raises(ValidationError) as caught:
        Row.model_validate({"size": "x" * 1000})
    assert first_problem(caught.value).endswith("found '" + 79 * "x")
