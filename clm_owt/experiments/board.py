"""The board of recorded results, `records/README.md`, which is made from their record.yaml files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clm_owt.experiments.recorded_result import (
    BOARD_MINUTES,
    BOARD_TOKENS,
    read_record,
    record_folders,
)
from clm_owt.files import write_text
from clm_owt.formatting import markdown_table

Record = Mapping[str, Any]  # what stands in a record.yaml

HEAD = """\
# Recorded results

What was measured with this repository, each result with its command (in `NAME/record.yaml`) and its runs. Losses are
validation cross-entropies in nats on the data of `recipes/quickstart.yaml`, and what is changed is
`recipes/quickstart_adamw.yaml`, unless the record says otherwise. A loss of several seeds is their mean, ± one
standard deviation. A difference is to the first setting of the same record, over equal seeds, with its 95 % interval;
that of one seed cannot be told from chance.

```bash
make reproduce RECORD=NAME              # runs the first run of a record again, and says whether it is the same
make reproduce RECORD=NAME RUNS=all     # every one
python scripts/record.py add --help     # records finished runs
python scripts/record.py board          # writes this file
```

A folder under `NAME/runs/` is read by all that reads a run's folder, as `scripts/plot_run.py` does. Of another form is
[fault_campaign](fault_campaign/README.md): `make test-faults`, with each fault that was injected.
"""

TOKENS = f"""\
## Loss after {BOARD_TOKENS / 1e6:.2f} M tokens on the quickstart's data
"""

MINUTES = f"""\
## Loss after {BOARD_MINUTES} minutes on two CPU cores

Of the last validation that ended within {BOARD_MINUTES} minutes of training. Validations, samples and saves count;
imports, tokenising and the search for the micro-batch do not. Nothing else ran on the cores.
"""

TRIED = """\
## Tried, and did not help
"""


def write_board(folder: Path) -> Path:
    """Write the board of the records in `folder`; gives its path."""
    path = folder / "README.md"
    write_text(path, board(folder))
    return path


def board(folder: Path) -> str:
    """The text of the board."""
    records = {path.name: read_record(path) for path in record_folders(folder)}
    parts = [HEAD]
    for heading, table, row_of, header in (
        (TOKENS, "tokens", result_row, RESULT_COLUMNS),
        (MINUTES, "minutes", result_row, RESULT_COLUMNS),
        (TRIED, "tried", tried_row, TRIED_COLUMNS),
    ):
        of_table = {name: record for name, record in records.items() if record["table"] == table}
        shown = sorted(rows_of(of_table), key=lambda row: row[2]["loss"])
        rows = [row_of(name, record, setting) for name, record, setting in shown]
        body = markdown_table(header, rows) if rows else "Nothing has been recorded yet."
        parts += [heading, f"{body}\n"]
        if table != "tried" and rows:  # there the claims stand in the table
            names = dict.fromkeys(name for name, _, _ in shown)
            parts.append("".join(f"{describe(name, of_table[name])}\n" for name in names))
    return "\n".join(parts)


RESULT_COLUMNS = ("loss", "seeds", "change to the recipe", "difference", "record")
TRIED_COLUMNS = ("what", "change to the recipe", "loss", "against", "difference", "record")


def rows_of(records: Mapping[str, Record]) -> list[tuple[str, Record, Mapping[str, Any]]]:
    """The settings that have a row, with their records: of something tried, not the reference; of a setting that
    several records have, the one with the most seeds."""
    rows = {}
    for name, record in records.items():
        settings = record["settings"]
        for setting in settings[1:] if record["table"] == "tried" and len(settings) > 1 else settings:
            known = rows.get(setting["name"])
            if known is None or len(known[2]["runs"]) < len(setting["runs"]):
                rows[setting["name"]] = name, record, setting
    return list(rows.values())


def describe(name: str, record: Record) -> str:
    """A record's claim, and by which runs its settings were chosen."""
    tuning = [f"{run['setting']}: {run['loss']:.4f} (seed {run['seed']})" for run in record.get("tuning", [])]
    return f"- {link(name)}: {record['claim']}." + (f" Chosen by: {'; '.join(tuning)}." if tuning else "")


def result_row(name: str, record: Record, setting: Mapping[str, Any]) -> list[str]:
    return [loss(setting), seeds(setting), setting["name"], difference(record, setting), link(name)]


def tried_row(name: str, record: Record, setting: Mapping[str, Any]) -> list[str]:
    reference = record["settings"][0]
    against = "" if setting is reference else f"{loss(reference)}, {seeds(reference)}"
    own = f"{loss(setting)}, {seeds(setting)}"
    return [record["claim"], setting["name"], own, against, difference(record, setting), link(name)]


def link(name: str) -> str:
    return f"[{name}]({name})"


def loss(setting: Mapping[str, Any]) -> str:
    own = len(setting["runs"]) > 1
    return f"{setting['loss']:.4f}" + (f" ± {setting['standard_deviation']:.4f}" if own else "")


def seeds(setting: Mapping[str, Any]) -> str:
    number = len(setting["runs"])
    return "one seed" if number == 1 else f"{number} seeds"


def difference(record: Record, setting: Mapping[str, Any]) -> str:
    """Of a setting to the reference of its record."""
    found = record.get("comparison", {}).get("differences", {}).get(setting["name"])
    if found is None:
        return ""
    interval = "" if found["interval_95"] is None else " [{:+.4f}, {:+.4f}]".format(*found["interval_95"])
    of = "" if found["pairs"] > 1 else ", one seed"
    verdict = "" if found["beyond_chance"] or of else ", cannot be told from chance"
    return f"{found['mean']:+.4f}{interval}{of}{verdict}"
