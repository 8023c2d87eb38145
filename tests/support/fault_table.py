"""The table of faults at the end of a session: fault, injected, lost, time.

A test of a kind of fault takes the fixture `record_fault`, names its kind there, and says what happened for each fault
that it injected and saw through. With pytest-xdist the records travel with the reports of the tests.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clm_owt.optimizers import OPTIMIZERS


def pytest_addoption(parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--seed", type=int, default=6, help="of the instants and places that faults are drawn for")
    # A run with Muon has the state of AdamW as well, for all but the matrices.
    group.addoption("--optimizer", choices=OPTIMIZERS, default="muon", help="of the disturbed runs (default: muon)")
    group.addoption("--faults-table", metavar="PATH", type=Path, help="write the table of faults there too")


@pytest.fixture
def draw(request) -> random.Random:
    """Random numbers for this test: the same alone as among others."""
    return random.Random(f"{request.config.getoption('seed')} {request.node.nodeid.partition('@')[0]}")


@pytest.fixture
def record_fault(request) -> Callable[[str], None]:
    """Record what became of an injected fault. Its kind is the first line of the test's docstring."""
    kind = request.function.__doc__.splitlines()[0]
    request.node.user_properties.append(("kind of fault", kind))
    return lambda what: request.node.user_properties.append(("fault", what))


@dataclass
class Kind:
    """What became of all faults of one kind."""

    faults: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, name: str) -> str:
        lost = "; ".join(dict.fromkeys(self.losses + self.not_run)) or "nothing"
        return f"| {name} | {len(self.faults) + len(self.losses)} | {lost} | {self.seconds:.0f} s |"


def pytest_terminal_summary(terminalreporter, config) -> None:
    kinds: dict[str, Kind] = {}
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for report in reports:
        name = dict(getattr(report, "user_properties", ())).get("kind of fault")
        if name is None or report.when != "call":
            continue
        kind = kinds.setdefault(name, Kind())
        kind.seconds += report.duration
        kind.faults += [what for key, what in report.user_properties if key == "fault"]
        if report.failed:
            kind.losses.append(f"LOST: {report.nodeid.partition('::')[2]}")
        if report.skipped:
            kind.not_run.append(f"not run here: {report.longrepr[2]}")
    if not kinds:
        return
    table = ["| fault | injected | lost | time |", "|---|---|---|---|"]
    table += [kind.row(name) for name, kind in kinds.items()]
    terminalreporter.section("faults")
    terminalreporter.write_line("\n".join(table))
    terminalreporter.write_line(f"seed {config.getoption('seed')}; time is that of the tests' own part")
    if path := config.getoption("faults_table"):
        details = [f"- {name}: {what}" for name, kind in kinds.items() for what in kind.faults]
        path.write_text("\n".join([*table, "", f"Seed {config.getoption('seed')}.", "", *details, ""]))
