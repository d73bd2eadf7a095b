import io

import pytest
import rich.console

from tests.report.examples import example_profiles
from tfcompress import report
from tfcompress.measure import Profile
from tfcompress.report.rows import bytes_text, compact, formatted

KEYS = [
    "model", "variant", "tool", "artefact", "accuracy", "params", "nonzeros", "bytes",
    "zipped_bytes", "latency_ms_b1", "latency_ms_b32", "speedup_b1", "size_ratio", "max_abs_diff",
]  # fmt: skip


def test_rows_have_exactly_the_documented_keys():
    assert all(list(row) == KEYS for row in report.rows(example_profiles()))


def test_ratios_are_relative_to_the_first_profile_of_the_model():
    found = report.rows(example_profiles())
    assert [(row["model"], row["size_ratio"], row["speedup_b1"]) for row in found] == [
        ("mlp", 1.0, 1.0),
        ("mlp", 1.0, 0.5),
        ("mlp", 4.0, 8.0),
        ("cnn", 1.0, 1.0),
        ("cnn", 5.0, 4.0),
    ]


def test_what_was_not_measured_is_none_and_shows_as_a_dash():
    (row,) = report.rows([Profile("mlp", "original", "keras")])
    unknown = {key for key, value in row.items() if value is None}
    assert unknown == {
        "artefact", "accuracy", "latency_ms_b1", "latency_ms_b32", "speedup_b1", "size_ratio",
        "max_abs_diff",
    }  # fmt: skip
    assert {formatted(row)[key] for key in unknown} == {"-"}


@pytest.mark.parametrize(
    ("count", "text", "size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (999.6, "1k", "1 kB"),
        (1234, "1.23k", "1.23 kB"),
        (999_700, "1M", "1 MB"),
        (12_345_678, "12.3M", "12.3 MB"),
        (5e12, "5e+03G", "5e+03 GB"),
    ],
)
def test_numbers_are_shown_to_three_digits(count, text, size):
    assert (compact(count), bytes_text(count)) == (text, size)


def test_the_terminal_table_fits_80_columns_and_shows_names_as_they_are():
    stream = io.StringIO()
    rich.console.Console(file=stream, width=80).print(report.table(example_profiles()))
    lines = stream.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    text = " ".join(stream.getvalue().split())
    for expected in ("mlp", "cnn", "92.0%", "4.0x", "8.0x", "0.50x", "109k", "[50%]"):
        assert expected in text
    assert "…" not in text
