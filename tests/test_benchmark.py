"""The benchmark: its ratios are ratios, and its command line answers."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "ablations"))
from benchmark import Ratio, pairs  # noqa: E402


def spin(rounds: int):
    return lambda: sum(i * i for i in range(rounds))


def test_a_ratio_says_how_many_times_as_fast_the_first_of_a_pair_is():
    values, _ = pairs(spin(100_000), spin(400_000), 7)
    assert len(values) == 7 and sorted(values)[3] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("values, at_most, met", [([1.0, 3.0, 2.5], False, True), ([1.0, 3.0, 1.5], False, False), ([1.0, 3.0, 1.5], True, True), ([9.0, 1.0, 2.5], True, False)])  # fmt: skip
def test_the_median_decides_whether_a_target_is_met(values, at_most, met):
    row = Ratio("x", "y", 2, values, at_most).row()
    assert row["met"] is met and (row["lowest"], row["highest"]) == (min(values), max(values))


def test_the_benchmark_runs_and_writes_its_table(tmp_path):
    command = [sys.executable, ROOT / "ablations" / "benchmark.py", "--pairs", "1", "--out", tmp_path / "rows.csv"]
    done = subprocess.run([*command, "--only", "dreams,fit"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "rows.csv")))
    assert len(rows) == 3 and all(0 < float(row["median"]) < 1 for row in rows)  # nothing is faster than its own matrix products
    done = subprocess.run([*command, "--only", "speed"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "'speed' is none of" in done.stderr
