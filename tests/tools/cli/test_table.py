"""Tables of text."""

import pytest

from carryon.tools.cli.table import format_table

ROWS = [("name", "value", "unit"), ("speed", "1,234", "tokens/s"), ("loss", ">= 0.5", "nats")]


def test_columns_are_aligned_and_numbers_end_at_the_right() -> None:
    assert format_table(ROWS).splitlines() == [
        "name    value  unit",
        "speed   1,234  tokens/s",
        "loss   >= 0.5  nats",
    ]


def test_markdown_has_a_rule_that_aligns_numbers_right() -> None:
    lines = format_table(ROWS, is_markdown=True).splitlines()
    assert lines[0] == "| name  |  value | unit     |"
    assert lines[1] == "|-------|-------:|----------|"
    assert len({len(line) for line in lines}) == 1


def test_rows_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        format_table([("a", "b"), ("c",)])
