"""The table of faults at the end of a session: fault, injected, with each optimizer, lost, time.

A test of a kind of fault takes the fixture `record_fault`, names its kind there, and says what happened for each fault
that it injected and saw through. With pytest-xdist the records travel with the reports of the tests.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clm_owt.formatting import markdown_table
from clm_owt.optimizers import OPTIMIZERS


def pytest_addoption(parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--seed", type=int, default=6, help="of the instants and places that faults are drawn for")
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
    if "optimizer" in request.fixturenames:
        request.node.user_properties.append(("optimizer", request.getfixturevalue("optimizer")))
    return lambda what: request.node.user_properties.append(("fault", what))


@dataclass
class Kind:
    """What became of all faults of one kind. A fault has the optimizer of its run, None where that plays no part."""

    faults: list[tuple[str | None, str]] = field(default_factory=list)
    losses: list[tuple[str | None, str]] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, name: str) -> list[object]:
        injected = [optimizer for optimizer, _ in self.faults + self.losses]
        lost = "; ".join(dict.fromkeys([what for _, what in self.losses] + self.not_run)) or "nothing"
        of_each = [injected.count(optimizer) for optimizer in OPTIMIZERS]
        return [name, len(injected), *of_each, lost, f"{self.seconds:.0f} s"]


def pytest_terminal_summary(terminalreporter, config) -> None:
    kinds: dict[str, Kind] = {}
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for report in reports:
        properties = dict(getattr(report, "user_properties", ()))
        name, optimizer = properties.get("kind of fault"), properties.get("optimizer")
        if name is None or report.when != "call":
            continue
        kind = kinds.setdefault(name, Kind())
        kind.seconds += report.duration
        kind.faults += [(optimizer, what) for key, what in report.user_properties if key == "fault"]
        if report.failed:
            kind.losses.append((optimizer, f"LOST: {report.nodeid.partition('::')[2]}"))
        if report.skipped:
            kind.not_run.append(f"not run here: {report.longrepr[2]}")
    if not kinds:
        return
    total = Kind(
        faults=[fault for kind in kinds.values() for fault in kind.faults],
        losses=[loss for kind in kinds.values() for loss in kind.losses],
        seconds=sum(kind.seconds for kind in kinds.values()),
    )
    rows = [kind.row(name) for name, kind in kinds.items()]
    lost = f"{len(total.losses)} lost" if total.losses else "nothing"
    rows.append([*total.row("all")[:-2], lost, f"{total.seconds:.0f} s"])
    table = markdown_table(("fault", "injected", *(f"with {name}" for name in OPTIMIZERS), "lost", "time"), rows)
    seed = f"Seed {config.getoption('seed')}. Time is that of the tests' own part."
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{table}\n{seed}")
    if path := config.getoption("faults_table"):
        details = [
            f"- {name}{f', {optimizer}' if optimizer else ''}: {what}"
            for name, kind in kinds.items()
            for optimizer, what in kind.faults
        ]
        path.write_text("\n".join([table, "", seed, "", *details, ""]))
