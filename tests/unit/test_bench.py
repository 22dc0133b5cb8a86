"""What benchmarks write: each section in its place, figures as they were found."""

from __future__ import annotations

import pytest

from bench.report import Section, paragraph, quantiles, spread, table, write
from bench.swarm_change import histogram_rows


def test_a_section_is_replaced_and_the_rest_stays(tmp_path):
    file = tmp_path / "benchmarks.md"
    file.write_text("# Benchmarks\nBy hand.\n")
    write(Section("one", "One", "first\n"), file=file)
    write(Section("two", "Two", r"back\slash \1"), file=file)
    write(Section("one", "One", "second"), file=file)
    text = file.read_text()
    assert text.startswith("# Benchmarks\nBy hand.\n")
    assert "first" not in text
    assert text.index("## One") < text.index("second") < text.index("## Two")
    assert r"back\slash \1" in text
    assert text.count("Measured on ") == 2


def test_a_missing_file_is_made(tmp_path):
    file = tmp_path / "benchmarks.md"
    write(Section("one", "One", "text"), file=file)
    assert file.read_text().startswith("# Benchmarks\n")


def test_figures():
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0–3.0)"  # noqa: RUF001
    assert quantiles([float(n) for n in range(1, 101)]) == ["100", "50.0", "99.0", "100.0"]
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert max(len(line) for line in paragraph("word " * 100).splitlines()) <= 100


@pytest.mark.parametrize(
    ("after", "rows"),
    [
        (
            {0.005: 1, 0.025: 5, 0.05: 5, float("inf"): 5},
            [["5", "0", "0.0%"], ["25", "4", "100.0%"]],
        ),
        (
            {0.005: 2, 0.025: 2, 0.05: 3, float("inf"): 5},
            [["5", "1", "25.0%"], ["25", "1", "25.0%"], ["50", "2", "50.0%"]],
        ),
        ({0.005: 1, 0.025: 1, 0.05: 1, float("inf"): 1}, []),
    ],
    ids=["all within 25 ms", "some beyond the last bound", "nothing new"],
)
def test_a_histogram_counts_what_came_between_two_looks(after, rows):
    before = {0.005: 1.0, 0.025: 1.0, 0.05: 1.0, float("inf"): 1.0}
    assert histogram_rows(before, after) == rows
