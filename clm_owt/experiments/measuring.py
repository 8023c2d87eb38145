"""Measuring the models of finished runs, in processes of their own, on the places on which the runs were trained."""

import json
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from clm_owt.experiments.execution import error_in, execute
from clm_owt.experiments.study import MeasuredRun, Measurement
from clm_owt.files import write_text
from clm_owt.formatting import format_clock, format_duration

AT_A_TIME = 12  # models that a process measures: its imports take as long as one


class Measuring:
    """Measures on each of `places`, as LocalSweep trains on them. `program`: is given a JSON file with a list of
    measurements, and does one after the other; `failed`: what could not be measured."""

    def __init__(
        self, program: Sequence[str], folder: Path, places: Sequence[str | None], interrupted: threading.Event
    ):
        self.program = program
        self.folder, self.interrupted = folder, interrupted
        self.free: queue.Queue[str | None] = queue.Queue()
        for place in places:
            self.free.put(place)
        self.places = len(places)
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
        with ThreadPoolExecutor(self.places) as pool:
            for measurements in missing:
                size = min(AT_A_TIME, -(-len(measurements) // self.places) or 1)
                list(pool.map(self.measure, (measurements[i : i + size] for i in range(0, len(measurements), size))))

    def measure(self, batch: list[Measurement]) -> None:
        """Some models, on the next free place."""
        place = self.free.get()
        try:
            if self.interrupted.is_set():
                return
            name = "measuring" if place is None else f"measuring-{place}"
            tasks, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
            print(f"measuring {batch[0].name} and {len(batch) - 1} more, output in {log}", flush=True)
            write_text(tasks, json.dumps([asdict(measurement) for measurement in batch], indent=1))
            written_before, began = log.stat().st_size if log.exists() else 0, time.monotonic()
            variables = {} if place is None else {"CUDA_VISIBLE_DEVICES": place}
            execute([*self.program, str(tasks)], log, variables, self.interrupted)
            seconds = time.monotonic() - began
            lacking = [measurement for measurement in batch if measurement.kept() is None]
            self.left -= len(batch)
            if self.interrupted.is_set():
                return
            self.failed += lacking
            self.seconds.append(seconds / len(batch))
            left = statistics.fmean(self.seconds) * self.left / self.places
            time_left = f"; about {format_duration(left)} left" if self.left else ""
            print(f"measured {len(batch) - len(lacking)} models, {format_clock(seconds)}{time_left}", flush=True)
            if lacking:
                error = error_in(log.read_bytes()[written_before:].decode(errors="replace"))
                print(*(f"    {line}" for line in error.splitlines()), sep="\n", flush=True)
        finally:
            self.free.put(place)
