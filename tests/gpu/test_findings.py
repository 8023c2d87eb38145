"""The table and the file that `make test-gpu` ends with."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.gpu_table import DRY_RUN, Machine, write_findings


def report(number, *findings, outcome="passed", longrepr="", when="call", check="a check"):
    properties = [("check", check), *(("finding", finding) for finding in findings)]
    return SimpleNamespace(
        user_properties=properties, when=when, longrepr=longrepr, start=float(number), duration=2.0,
        passed=outcome == "passed", failed=outcome == "failed", skipped=outcome == "skipped",
    )  # fmt: skip


@pytest.fixture
def written(tmp_path):
    reports = [
        report(3, check="several GPUs", outcome="skipped", longrepr=("file", 1, "Skipped: one GPU here")),
        report(1, ("1e-7", "1e-5"), ("2e-7", "1e-4"), check="loss"),
        report(2, check="memory", outcome="failed", longrepr="trace\nE  RuntimeError: no GPU"),
        report(0, ("9", "1"), when="setup", check="loss"),  # of a test that went on
        SimpleNamespace(user_properties=[], when="collect"),
    ]
    text = write_findings(tmp_path / "found.json", Machine(torch.device("cpu"), "bf16"), reports)
    return text, json.loads((tmp_path / "found.json").read_text())


def test_every_finding_is_a_row_in_the_order_of_the_checks(written):
    text, found = written
    rows = [tuple(row[key] for key in ("check", "measured", "bound", "result")) for row in found["findings"]]
    assert rows == [
        ("loss", "1e-7", "1e-5", "passed"),
        ("loss", "2e-7", "1e-4", "passed"),
        ("memory", "E  RuntimeError: no GPU", "", "FAILED"),
        ("several GPUs", "one GPU here", "", "not run"),
    ]
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 6 and table[3].startswith("|   ")  # the second row of a check does not name it again


def test_a_dry_run_says_that_it_is_one_in_the_table_and_in_the_file(written):
    text, found = written
    assert text.startswith(DRY_RUN) and found["dry_run"] is True and found["gpus"] == 0
