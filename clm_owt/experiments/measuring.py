"""Measuring the models of finished runs, in processes of their own, on the places on which the runs were trained."""

import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from clm_owt.experiments.execution import Places, execute, print_error, size_of
from clm_owt.experiments.study import MeasuredRun, Measurement
from clm_owt.files import write_text
from clm_owt.formatting import format_clock, format_duration

AT_A_TIME = 12  # models that a process measures: its imports take as long as one


class Measuring:
    """Measures on each of `places`, as LocalSweep trains on them. `program`: is given a JSON file with a list of
    measurements, and does one after the other; `failed`: what could not be measured."""

    def __init__(self, program: Sequence[str], folder: Path, places: Places, interrupted: threading.Event):
        self.program, self.folder = program, folder
        self.places, self.interrupted = places, interrupted
        self.left = 0
        self.seconds: list[float] = []  # that a model took
        self.failed: list[Measurement] = []

    def measure_all(self, runs: Sequence[MeasuredRun]) -> None:
        """All that is not measured yet: the models, and then the controls, which need the entropies of these. Controls
        that are one model at several temperatures are measured one after the other."""
        models = [run.model for run in runs]
        controls = sorted((run.control for run in runs if run.control), key=lambda control: control.model)
        missing = [[m for m in measurements if m.kept() is None] for measurements in (models, controls)]
        self.left = sum(map(len, missing))
        print(f"Models to measure: {self.left}, others kept: {len(models) + len(controls) - self.left}", flush=True)
        for measurements in missing:
            size = min(AT_A_TIME, -(-len(measurements) // len(self.places)) or 1)
            batches = (measurements[i : i + size] for i in range(0, len(measurements), size))
            self.places.for_each(self.measure, batches)

    def measure(self, batch: list[Measurement]) -> None:
        """Some models, on the next free place."""
        with self.places.take() as (place, variables):
            if self.interrupted.is_set():
                return
            name = "measuring" if place is None else f"measuring-{place}"
            tasks, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
            print(f"measuring {batch[0].name} and {len(batch) - 1} more, output in {log}", flush=True)
            write_text(tasks, json.dumps([asdict(measurement) for measurement in batch], indent=1))
            written_before, began = size_of(log), time.monotonic()
            execute([*self.program, str(tasks)], log, variables, self.interrupted)
            seconds = time.monotonic() - began
            lacking = [measurement for measurement in batch if measurement.kept() is None]
            self.left -= len(batch)
            if self.interrupted.is_set():
                return
            self.failed += lacking
            self.seconds.append(seconds / len(batch))
            left = statistics.fmean(self.seconds) * self.left / len(self.places)
            time_left = f"; about {format_duration(left)} left" if self.left else ""
            print(f"measured {len(batch) - len(lacking)} models, {format_clock(seconds)}{time_left}", flush=True)
            if lacking:
                print_error(log, written_before)
