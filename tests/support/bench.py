"""Where runs are disturbed and continued: a small recipe with its complete token store, and the run that never was
disturbed.

The recipe has 60 steps over an epoch boundary, with a checkpoint every 5. A disturbed run is continued by the same
command, and what is expected at its end is the undisturbed run, bit for bit: final weights, optimizer state, random
states, samples and metrics.jsonl, timing fields apart.
"""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from support.disturbances import Disturbance
from support.hub_fixtures import english_documents
from support.runs import timeless_metrics, write_json_lines, write_tiny_recipe
from support.warm_start import Job, WarmStart

from clm_owt.reports.record import read_metrics

RUN = "support.disturbances:run_disturbed"
STEPS = 60
SAVE_STEPS = 5
BLOCKS_PER_STEP = 8
CHANGES = {
    "validation_documents": 3,
    "n_layer": 1,
    "effective_batch_size": BLOCKS_PER_STEP,
    "max_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "max_steps": STEPS,
    "eval_steps": 20,
    "save_steps": SAVE_STEPS,
    "sample_steps": 30,
    "sample_max_new_tokens": 4,
    "save_total_limit": 3,
}


class Bench:
    """Runs of the recipe, each in a folder of its own, its `home`."""

    def __init__(self, folder: Path, warm: WarmStart, optimizer: str):
        self.folder, self.warm = folder, warm
        self.cache = folder / "cache"
        data = write_json_lines(folder / "documents.jsonl", english_documents()[900:943])
        self.recipe = write_tiny_recipe(folder, str(data), self.cache, "small", optimizer=optimizer, **CHANGES)
        self.reference, _ = self.undisturbed("reference", 1)  # builds the store
        rows = read_metrics(self.run_of(self.reference) / "metrics.jsonl")
        assert max(row.get("epoch", 0) for row in rows) > 1, "the run crosses no epoch boundary"
        _, self.cpu_seconds = self.undisturbed("measured", 1)

    @functools.cached_property
    def undisturbed_of_two(self) -> tuple[Path, list[float]]:
        return self.undisturbed("reference-2", 2)

    def undisturbed(self, name: str, processes: int) -> tuple[Path, list[float]]:
        """An undisturbed run: its home, and the seconds of CPU time of each of its processes."""
        home = self.folder / name
        jobs = self.start_several(home, processes)
        for job in jobs:
            assert job.wait() == 0, job.text
        return home, [job.cpu_seconds for job in jobs]

    @staticmethod
    def run_of(home: Path) -> Path:
        """The run's folder."""
        return home / "runs" / "small"

    def checkpoints_of(self, home: Path) -> Path:
        return self.run_of(home) / "checkpoints"

    def argv(self, *options: str) -> list[str]:
        return ["--recipe", str(self.recipe), *options]

    def start(self, home: Path, *disturbances: Disturbance, options: Sequence[str] = (), **more: object) -> Job:
        return self.warm.start(RUN, self.argv(*options), disturbances, cwd=home, **more)

    def start_several(
        self, home: Path, processes: int, *disturbances: Disturbance, options: Sequence[str] = ()
    ) -> list[Job]:
        return self.warm.start_ranks(processes, RUN, self.argv(*options), disturbances, cwd=home)

    def interrupt(self, home: Path, *disturbances: Disturbance, options: Sequence[str] = ()) -> None:
        """A run that its disturbances kill."""
        job = self.start(home, *disturbances, options=options)
        assert job.wait() == -9, f"status {job.status}\n{job.text}"

    def instant(self, draw: Random, most: float = 1.0, rank: int = 0, processes: int = 1) -> float:
        """Seconds of CPU time into a run, of one of its one or two processes: however busy the machine is, they spread
        over the run."""
        cpu_seconds = self.cpu_seconds if processes == 1 else self.undisturbed_of_two[1]
        return draw.uniform(0.0, most * cpu_seconds[rank])

    def finish(self, home: Path, processes: int = 1, options: Sequence[str] = ()) -> str:
        """Continue by the same command, to the end, which must be that of the undisturbed run of so many processes;
        gives what was printed."""
        jobs = self.start_several(home, processes, options=options)
        for job in jobs:
            assert job.wait() == 0, f"the same command ended with status {job.status}\n{job.text}"
        self.compare(home, self.reference if processes == 1 else self.undisturbed_of_two[0])
        return jobs[0].text

    def compare(self, home: Path, reference: Path) -> None:
        """Everything that two runs leave is the same, bit for bit."""
        found, wanted = self.run_of(home), self.run_of(reference)
        assert timeless_metrics(found) == timeless_metrics(wanted)
        last = f"checkpoints/step-{STEPS:08d}"
        for name in ("samples.md", "model/model.safetensors", f"{last}/model.safetensors",
                     f"{last}/optimizer.safetensors", f"{last}/random_states.json"):  # fmt: skip
            assert (found / name).read_bytes() == (wanted / name).read_bytes(), f"{name} differs"
        states = [json.loads((run / last / "state.json").read_text()) for run in (found, wanted)]
        for state in states:
            del state["elapsed_seconds"]
        assert states[0] == states[1]
        assert sorted(found.rglob("*.partial")) == []  # nothing is left behind


def last_step(job: Job) -> str:
    """The last step that a run printed."""
    steps = re.findall(r"^step \d+", job.text, re.MULTILINE)
    return steps[-1] if steps else "before the first step"


def what_was_said(*jobs: Job) -> str:
    """The line with which a stopped run ended, after the last of its steps was saved."""
    text = "".join(job.text for job in jobs)
    said = [line for line in jobs[0].text.splitlines() if line.startswith("Stopped by")]
    assert len(said) == 1 and said[0].endswith("; the same command continues"), text
    assert "Traceback" not in text, text
    assert "saved up to" not in said[0], text
    return said[0]


def assert_continued(said: str, text: str) -> None:
    """`text`, of the next session, takes up where the last one `said` it was."""
    steps = re.findall(r" step (\d+)", said)
    continued = f"Continuing after step {steps[-1]}," in text if steps else "Continuing" not in text
    finished = text.startswith("Finished")  # all but the last word was said
    assert continued or finished, f"{said}, but then: {text[:2000]}"


def campaign(cases: Sequence, short: int) -> list:
    """The parameters of a test: the first `short` are for every day, the others for `make test-faults`."""
    return [
        pytest.param(case, id=str(i), marks=[pytest.mark.faults] if i >= short else []) for i, case in enumerate(cases)
    ]
