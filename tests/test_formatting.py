import pytest

from clm_owt.formatting import (
    format_bytes,
    format_clock,
    format_count,
    format_duration,
    format_value,
    markdown_table,
    text_table,
)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),  # and not 1e+03 kB
        (1_500_000, "1.5 MB"),
        (18_080_000_000, "18.1 GB"),
        (2e15, "2e+03 TB"),
    ],
)
def test_bytes_have_decimal_units_and_three_digits(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.5, "0.5 s"),
        (89, "89 s"),
        (90, "1.5 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (99_644, "28 h"),
        (3e5, "3.5 days"),
        (2e7, "231 days"),
    ],
)
def test_durations_are_rough(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3723, "1:02:03"), (float("nan"), "?"), (float("inf"), "?")]
)
def test_a_clock_shows_hours_minutes_and_seconds(seconds, text):
    assert format_clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1000, "1 k"), (2.5e6, "2.5 M"), (2_500_000_000, "2.5 B"), (-3e12, "-3 T")]
)
def test_counts_have_units(number, text):
    assert format_count(number) == text


def test_values_are_quoted_and_cut():
    assert format_value(None) == "null"
    assert format_value("a\n") == "'a\\n'"
    assert format_value("x" * 100) == "'" + "x" * 79 + "…"


def test_a_markdown_table_has_columns_of_one_width_and_escapes_bars():
    assert markdown_table(("", "value"), [("steps", 12), ("a|b", "long value")]) == (
        "|       | value      |\n"
        "| ----- | ---------- |\n"
        "| steps | 12         |\n"
        "| a\\|b  | long value |"
    )  # fmt: skip
    assert markdown_table(["n"], []) == "| n   |\n| --- |"


def test_a_text_table_aligns_numbers_to_the_right_and_all_else_to_the_left():
    rows = [["first", "1,024", "12 s", 0.5], ["second", "-", "1.5 min", ""], ["third"]]
    assert text_table(["run", "steps", "time", "loss"], rows) == (
        "run     steps  time     loss\n"
        "first   1,024  12 s      0.5\n"
        "second      -  1.5 min\n"
        "third"
    )  # fmt: skip
    assert text_table(["a", "b"], []) == "a  b"
