"""The acceptance of a machine: on what its tests run, and the table and the file that they end with (tests/gpu/).

`--accept FILE` takes the machine's GPU and full sizes, and writes the findings to FILE as JSON. Without a GPU that is
a dry run; without the option, as in `make test`, the tests of tests/gpu/ take a CPU and tiny sizes as well.
"""

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from support.runs import ROOT

from clm_owt.formatting import markdown_table

DRY_RUN = "DRY RUN on a CPU with tiny sizes: it shows that the acceptance works, and says nothing of a GPU."


def pytest_addoption(parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--accept", metavar="FILE", type=Path, help="accept this machine's GPU; write the findings there")


@dataclass(frozen=True)
class Machine:
    """What the acceptance runs on. `precision`: Accelerate's mixed_precision, as the GPU has it."""

    device: torch.device
    precision: str

    @property
    def dry_run(self) -> bool:
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.precision == "fp16" else torch.bfloat16

    @property
    def gpus(self) -> int:
        return 0 if self.dry_run else torch.cuda.device_count()

    def describe(self) -> dict[str, object]:
        """For the head of the table and of the file."""
        name = platform.processor() or platform.machine() if self.dry_run else torch.cuda.get_device_name()
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        return {
            "dry_run": self.dry_run,
            "device": name,
            "gpus": self.gpus,
            "precision": self.precision,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": commit.stdout.strip() or None,
        }


def find_machine(accept: bool) -> Machine:
    if not accept or not torch.cuda.is_available():
        return Machine(torch.device("cpu"), "bf16")
    return Machine(torch.device("cuda"), "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")


@pytest.fixture(scope="session")
def machine(request) -> Machine:
    return find_machine(request.config.getoption("accept") is not None)


@pytest.fixture
def finding(request) -> Callable[[str, str], None]:
    """Note what was measured, and within what it had to be: a row of the table. A test may note several. Its check is
    the first line of the test's docstring."""
    request.node.user_properties.append(("check", request.function.__doc__.splitlines()[0].rstrip(".")))
    return lambda measured, bound: request.node.user_properties.append(("finding", (measured, bound)))


@dataclass(frozen=True)
class Row:
    """What a check found: `result` is passed, FAILED or not run."""

    check: str
    measured: str
    bound: str
    result: str
    seconds: float


def rows_of(report) -> list[Row]:
    """The rows of a test's report; none where it is no check, or did not come to its call."""
    properties = report.user_properties
    check = dict(properties).get("check")
    if check is None or (report.when != "call" and report.passed):
        return []
    found = [value for key, value in properties if key == "finding"]
    if report.skipped:
        found, result = [(report.longrepr[2].removeprefix("Skipped: "), "")], "not run"
    else:
        result = "passed" if report.passed else "FAILED"
    if report.failed and not found:
        found = [(str(report.longrepr).strip().splitlines()[-1], "")]
    return [Row(check, measured, bound, result, round(report.duration, 1)) for measured, bound in found]


def findings_table(rows: list[Row]) -> str:
    """As Markdown. The name and the time of a check with several rows stand in its first."""
    lines, before = [], None
    for row in rows:
        first = row.check != before
        lines.append([row.check * first, row.measured, row.bound, row.result, f"{row.seconds:.0f} s" * first])
        before = row.check
    return markdown_table(["check", "measured", "bound", "result", "time"], lines)


def write_findings(path: Path, machine: Machine, reports: list) -> str:
    """Write the file; gives what is printed."""
    reports = sorted((report for report in reports if hasattr(report, "start")), key=lambda report: report.start)
    rows = [row for report in reports for row in rows_of(report)]
    description = machine.describe()
    path.write_text(json.dumps(description | {"findings": [asdict(row) for row in rows]}, indent=2) + "\n")
    head = ", ".join(f"{key} {value}" for key, value in description.items())
    return "\n\n".join([DRY_RUN] * machine.dry_run + [head, findings_table(rows), f"written to {path}"])


def pytest_terminal_summary(terminalreporter, config) -> None:
    if path := config.getoption("accept"):
        reports = [report for found in terminalreporter.stats.values() for report in found]
        terminalreporter.section("acceptance")
        terminalreporter.write_line(write_findings(path, find_machine(accept=True), reports))
