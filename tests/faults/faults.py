"""Faults injected into real runs, and what became of them: `python tests/faults.py [--short] [SCENARIO ...]`.

Each scenario disturbs runs of a small recipe (60 steps, a checkpoint every 5, over an epoch boundary) and continues
them by the same command. What is expected at the end is the run that was never disturbed, bit for bit: final weights,
optimizer state, random states, samples and metrics.jsonl, timing fields apart. Instants are drawn from `--seed`, in
seconds of CPU time, so that they spread over a run however busy the machine is. Prints a table in Markdown; status 1
if anything was lost.
"""

import argparse
import contextlib
import errno
import functools
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from support.hub_fixtures import english_documents
from support.runs import PYTHON, environment, launcher, timeless_metrics, write_json_lines
from support.warm_start import (
    PROCESS_GROUP_TIMEOUT,
    Job,
    checkpoint,
    fork_builders,
    loop,
    modeling,
    start,
    start_several,
)

from clm_owt.reports.record import read_metrics

STEPS = 60
SAVE_STEPS = 5
RECIPE = {
    "dataset_name": "json",
    "validation_documents": 3,
    "train_tokenizer_vocab_size": 400,
    "block_size": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "effective_batch_size": 8,
    "max_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "max_steps": STEPS,
    "logging_steps": 1,
    "eval_steps": 20,
    "save_steps": SAVE_STEPS,
    "sample_steps": 30,
    "sample_max_new_tokens": 8,
    "save_total_limit": 3,
}
SHORT = {"n_layer": 1, "sample_max_new_tokens": 2, "eval_steps": 30}  # for the short form, which is to take a minute
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


class Lost(AssertionError):
    """What a fault cost that it must not cost."""


def expect(condition: object, what: str, *jobs: Job) -> None:
    if not condition:
        raise Lost("\n".join([what, *(f"  | {line}" for job in jobs for line in job.text.splitlines()[-25:])]))


@dataclass
class Bench:
    """Where runs are disturbed: a recipe with its data and complete token store, and the run that never was."""

    folder: Path
    draw: random.Random
    short: bool
    recipe: Path = field(init=False)
    cpu_seconds: float = field(init=False)  # of an undisturbed run
    trials: int = 0

    def __post_init__(self) -> None:
        data = write_json_lines(self.folder / "documents.jsonl", english_documents()[900:943])
        content = (
            RECIPE
            | (SHORT if self.short else {})
            | {"data_files": str(data), "data_cache_dir": str(self.folder / "cache")}
        )
        self.recipe = self.folder / "small.yaml"
        self.recipe.write_text(yaml.safe_dump(content))
        self.reference = self.undisturbed("reference", 1)  # builds the store
        expect(
            max(
                row["epoch"]
                for row in read_metrics(self.run_of(self.reference) / "metrics.jsonl")
                if row["split"] == "train"
            )
            > 1,
            "the run crosses no epoch boundary",
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.undisturbed("measured", 1)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    @functools.cached_property
    def reference_of_two(self) -> Path:
        return self.undisturbed("reference-2", 2)

    def undisturbed(self, name: str, processes: int) -> Path:
        home = self.folder / name
        for job in self.start(home, processes):
            expect(job.wait() == 0, f"{name}: status {job.status}", job)
        return home

    def argv(self, *options: str) -> list[str]:
        return ["--recipe", str(self.recipe), *options]

    def home(self) -> Path:
        self.trials += 1
        return self.folder / f"trial-{self.trials}"

    @staticmethod
    def run_of(home: Path) -> Path:
        return home / "runs" / "small"

    def start(
        self, home: Path, processes: int = 1, before: Callable[[], None] = lambda: None, options=(), env=None
    ) -> list[Job]:
        if processes == 1:
            return [start(self.argv(*options), home, before, env)]
        return start_several(self.argv(*options), home, processes, before)

    def instant(self, most: float = 1.0) -> float:
        """Seconds of CPU time into a run."""
        return self.draw.uniform(0.0, most * self.cpu_seconds)

    def finish(self, home: Path, reference: Path | None = None, processes: int = 1, options=()) -> str:
        """Continue by the same command, to the end, which must be the reference's; gives what was printed."""
        jobs = self.start(home, processes, options=options)
        for job in jobs:
            expect(job.wait() == 0, f"the same command ended with status {job.status}", *jobs)
        self.compare(home, reference or self.reference, jobs)
        text = jobs[0].text
        shutil.rmtree(home)
        return text

    def compare(self, home: Path, reference: Path, jobs: list[Job]) -> None:
        found, wanted = self.run_of(home), self.run_of(reference)
        expect(timeless_metrics(found) == timeless_metrics(wanted), "metrics.jsonl differs", *jobs)
        last = f"checkpoints/step-{STEPS:08d}"
        for name in ("samples.md", "model/model.safetensors", f"{last}/model.safetensors",
                     f"{last}/optimizer.safetensors", f"{last}/random_states.json"):  # fmt: skip
            expect((found / name).read_bytes() == (wanted / name).read_bytes(), f"{name} differs", *jobs)
        states = [json.loads((run / last / "state.json").read_text()) for run in (found, wanted)]
        for state in states:
            del state["elapsed_seconds"]
        expect(states[0] == states[1], f"state.json differs: {states}", *jobs)
        left = sorted(found.rglob("*.partial"))
        expect(not left, f"left behind: {left}", *jobs)


def wait_for_cpu(job: Job, seconds: float) -> None:
    """Until the process has used so much CPU time, or is gone."""
    ticks = os.sysconf("SC_CLK_TCK")
    while job.poll() is None:
        fields = Path(f"/proc/{job.pid}/stat").read_text().rsplit(")", 1)[1].split()
        if (int(fields[11]) + int(fields[12])) / ticks >= seconds:
            return
        time.sleep(0.002)


def wait_for_handlers(job: Job) -> None:
    """Until the process listens to signals, which Python itself does not, or is gone."""
    while job.poll() is None:
        caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{job.pid}/status").read_text())[1], 16)
        if caught >> (signal.SIGUSR1 - 1) & 1:
            return
        time.sleep(0.002)


def at_step(number: int, action: Callable[[], None]) -> Callable[[], None]:
    """For `before`: `action` is called when step `number` begins, and what was to be saved before it is saved."""

    def patch() -> None:
        original = loop.train_step

        def train_step(run, state, guard):
            if state.step + 1 == number:
                run.checkpoints.wait()
                action()
            return original(run, state, guard)

        loop.train_step = train_step

    return patch


def kill_myself(signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


def slow_saves(seconds: float) -> Callable[[], None]:
    """For `before`: a save, of four files, takes so many seconds."""

    def patch() -> None:
        fingerprint = checkpoint.fingerprint
        checkpoint.fingerprint = lambda file: time.sleep(seconds / 4) or fingerprint(file)

    return patch


def slow_snapshots(seconds: float) -> None:
    take_snapshot = loop.take_snapshot
    loop.take_snapshot = lambda *arguments: time.sleep(seconds) or take_snapshot(*arguments)


def last_step(job: Job) -> str:
    """The last step that a run told of."""
    steps = re.findall(r"^step \d+", job.text, re.MULTILINE)
    return steps[-1] if steps else "before the first step"


def wait_until(job: Job, text: str) -> None:
    deadline = time.monotonic() + 240
    while text not in job.text:
        expect(job.poll() is None and time.monotonic() < deadline, f"it did not come to '{text}'", job)
        time.sleep(0.01)


# Scenarios: each yields one line of what happened per fault, and raises Lost.


def killed(bench: Bench) -> Iterator[str]:
    """SIGKILL at a random instant, continued"""
    for _ in range(2 if bench.short else 40):
        while True:  # a run that had ended was not killed: another instant
            home, instant = bench.home(), bench.instant()
            (job,) = bench.start(home)
            wait_for_cpu(job, instant)
            job.kill()
            if job.status == -signal.SIGKILL:
                break
        told, whole = last_step(job), checkpoint.checkpoints(bench.run_of(home) / "checkpoints")
        bench.finish(home)
        yield f"after {instant:.2f} s of CPU time, {told}, {whole[0].name if whole else 'no checkpoint yet'}"


def killed_over_and_over(bench: Bench) -> Iterator[str]:
    """SIGKILL of each of several sessions in a row, one after the epoch boundary"""
    for steps in [(14, 33)] if bench.short else [(7, 8, 9), (14, 33, 52), (3, 31, 58), (29, 30, 31, 32)]:
        home = bench.home()
        for step in steps:
            (job,) = bench.start(home, before=at_step(step, kill_myself))
            expect(job.wait() == -signal.SIGKILL, f"status {job.status}", job)
        text = bench.finish(home)
        expect("Continuing after step" in text or steps[-1] <= SAVE_STEPS, "it did not continue")
        yield from (f"in step {step}" for step in steps)


def killed_of_two(bench: Bench) -> Iterator[str]:
    """SIGKILL of one of 2 processes, or both"""
    for i in range(1 if bench.short else 40):
        victims = ((0,), (1,), (0, 1))[i % 3]
        while True:
            home, instant = bench.home(), bench.instant()
            jobs = bench.start(home, 2)
            wait_for_cpu(jobs[victims[0]], instant)
            for victim in victims:
                jobs[victim].kill()
            if any(jobs[victim].status == -signal.SIGKILL for victim in victims):
                break
            for job in jobs:
                job.wait()
        began = time.monotonic()
        for job in jobs:
            expect(job.wait(PROCESS_GROUP_TIMEOUT + 40) is not None, "the survivor hangs", *jobs)
        took = time.monotonic() - began
        told = last_step(jobs[0])
        bench.finish(home, bench.reference_of_two, 2)
        yield f"rank {' and '.join(map(str, victims))} after {instant:.2f} s, {told}; all had ended {took:.1f} s later"


def killed_during_a_save(bench: Bench) -> Iterator[str]:
    """SIGKILL between any two file operations of a save"""
    operations = [
        (checkpoint, "save_file"), (checkpoint, "fingerprint"), (checkpoint, "flush_to_disk"), (os, "unlink"),
        (checkpoint.shutil, "rmtree"), (Path, "rename"), (Path, "write_text"), (Path, "mkdir"),
    ]  # fmt: skip

    def patch(number: int, save: int) -> None:
        """Be killed before the `number`-th operation of the `save`-th save, if it has so many."""
        calls, saves, counting = 0, 0, False
        write = checkpoint.CheckpointWriter._write

        def counted(original):
            def call(*arguments, **more):
                nonlocal calls
                if counting:
                    calls += 1
                    if calls == number:
                        kill_myself()
                return original(*arguments, **more)

            return call

        def counted_write(writer, snapshot):
            nonlocal saves, counting
            saves += 1
            counting = saves == save
            write(writer, snapshot)
            counting = False

        for owner, name in operations:
            setattr(owner, name, counted(getattr(owner, name)))
        checkpoint.CheckpointWriter._write = counted_write

    # The fourth save is the first that prunes; after the last one no other tidies up.
    last = STEPS // SAVE_STEPS
    for save in [last] if bench.short else [4, last]:
        for number in [22] if bench.short else itertools.count(1):
            home = bench.home()
            (job,) = bench.start(home, before=functools.partial(patch, number, save))
            if job.wait() == 0 and number > 20:
                break  # there is no such operation any more
            expect(job.status == -signal.SIGKILL, f"status {job.status}", job)
            left = sorted(path.name for path in (bench.run_of(home) / "checkpoints").iterdir())
            bench.finish(home)
            yield f"save {save}, before operation {number}, leaving {', '.join(left)}"


def killed_while_building(bench: Bench) -> Iterator[str]:
    """SIGKILL while the token store is built"""
    for i in range(0 if bench.short else 6):
        home = bench.home()
        cache = home / "cache"
        options = ["--data_cache_dir", str(cache)]
        (job,) = bench.start(home, options=options)
        delay = bench.draw.uniform(0.0, 12.0)
        if i % 2:
            while job.poll() is None and not list(cache.rglob("*.lock")):
                time.sleep(0.002)
            delay = bench.draw.uniform(0.0, 1.0)
        deadline = time.monotonic() + delay
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        job.kill()
        found = sorted({path.name for path in cache.rglob("*") if path.is_file()})
        (again,) = bench.start(home, options=options)
        expect(again.wait() == 0, f"status {again.status}", again)
        bench.compare(home, bench.reference, [again])
        stores = [
            sorted((p.name, p.read_bytes()) for p in (c / "stores").rglob("*.arrow"))
            for c in (cache, bench.folder / "cache")
        ]
        expect(stores[0] == stores[1], "the token stores differ", again)
        shutil.rmtree(home)
        yield f"with {', '.join(found) or 'nothing'} in the cache"


def interrupted_at(bench: Bench, step: int, home: Path) -> None:
    (job,) = bench.start(home, before=at_step(step, kill_myself))
    expect(job.wait() == -signal.SIGKILL, f"status {job.status}", job)


def damaged(bench: Bench) -> Iterator[str]:
    """A file of the newest checkpoint truncated, emptied, flipped in one bit, removed"""
    origin = bench.home()
    interrupted_at(bench, 38, origin)
    names = ("model.safetensors", "optimizer.safetensors", "random_states.json", "state.json", checkpoint.MARKER)
    harms = ("truncated", "emptied", "flipped in one bit", "removed")
    cases = [(name, harm) for name in names for harm in harms]
    for name, harm in bench.draw.sample(cases, 1) if bench.short else cases:
        home = bench.home()
        shutil.copytree(origin, home)
        newest = checkpoint.checkpoints(bench.run_of(home) / "checkpoints")[0]
        file, content = newest / name, bytearray((newest / name).read_bytes())
        if harm == "removed":
            file.unlink()
        else:
            if harm == "flipped in one bit":
                content[bench.draw.randrange(len(content))] ^= 1 << bench.draw.randrange(8)
            keep = {"truncated": bench.draw.randrange(1, len(content)), "emptied": 0}.get(harm)
            file.write_bytes(content[:keep])
        text = bench.finish(home)
        expect(
            f"Passed over runs/small/checkpoints/{newest.name}: " in text,
            "not said",
        )
        expect("Continuing after step 30" in text, "not the one before")
        yield f"{name} {harm}: " + next(line for line in text.splitlines() if line.startswith("Passed over"))
    for newest in checkpoint.checkpoints(bench.run_of(origin) / "checkpoints"):
        (newest / "state.json").unlink()
    (job,) = bench.start(origin)
    expect(job.wait() == 2 and "no whole checkpoint" in job.text and "Traceback" not in job.text, "not refused", job)
    yield "all of them: refused"


def signalled(bench: Bench) -> Iterator[str]:
    """SIGTERM, SIGINT, SIGUSR1 at a random instant, continued"""
    for signum, status in STATUS.items():
        for _ in range(1 if bench.short else 20):
            while True:
                home, instant = bench.home(), bench.instant(0.9)
                (job,) = bench.start(home)
                wait_for_cpu(job, instant)
                wait_for_handlers(job)
                began = time.monotonic()
                job.send(signum)
                job.wait(60)
                took = time.monotonic() - began
                if "Finished" not in job.text:  # a signal after the run's last word is none to the run
                    break
            expect(job.status == status, f"{signum.name} after {instant:.2f} s: status {job.status}", job)
            expect("the same command continues" in job.text and "Traceback" not in job.text, "not said", job)
            said = what_was_said(job)
            expect_continuation(said, bench.finish(home))
            yield f"{said} ({took:.1f} s)"


def what_was_said(job: Job) -> str:
    said = [line for line in job.text.splitlines() if line.startswith("Stopped by")]
    expect(len(said) == 1 and said[0].endswith("; the same command continues"), f"said: {said}", job)
    expect("Traceback" not in job.text, "a traceback", job)
    expect("saved up to" not in said[0], "the last step is not saved", job)
    return said[0]


def expect_continuation(said: str, text: str) -> None:
    """`text`, of the next session, takes up where the last one `said` it was."""
    steps = re.findall(r" step (\d+)", said)
    continued = f"Continuing after step {steps[-1]}," in text if steps else "Continuing" not in text
    finished = text.startswith("Finished")  # all but the last word was said
    expect(continued or finished, f"{said}, but then: {text[:2000]}")


def signalled_of_two(bench: Bench) -> Iterator[str]:
    """A signal to one of 2 processes, or to both, at a random instant, continued"""
    for i in range(0 if bench.short else 18):
        signum, status = list(STATUS.items())[i % 3]
        victims = ((1,), (0, 1), (0,))[i // 3 % 3]
        while True:
            home, instant = bench.home(), bench.instant(0.9 if i < 9 else 0.15)
            jobs = bench.start(home, 2)
            wait_for_cpu(jobs[victims[0]], instant)
            for job in jobs:
                wait_for_handlers(job)
            for victim in victims:
                jobs[victim].send(signum)
            await_as_a_launcher(jobs)
            if "Finished" not in jobs[0].text:
                break
        statuses = [job.status for job in jobs]
        expect(set(statuses) <= {status, 143} and status in statuses, f"statuses {statuses}", *jobs)
        expect("Traceback" not in jobs[1].text, "a traceback", jobs[1])
        said = what_was_said(jobs[0])
        expect_continuation(said, bench.finish(home, bench.reference_of_two, 2))
        yield f"rank {' and '.join(map(str, victims))}: {said}"
    home = bench.home()  # told again by the launcher as soon as one of them leaves
    before, options = lambda: (slow_snapshots(1.2), slow_saves(2.0)()), ["--save_steps", "1000"]
    jobs = bench.start(home, 2, before, options)
    wait_until(jobs[0], "step 14/")
    for job in jobs:
        job.send(signal.SIGUSR1)
    await_as_a_launcher(jobs)
    said = what_was_said(jobs[0])
    expect([job.status for job in jobs] == [138, 138], f"statuses {[job.status for job in jobs]}", *jobs)
    expect_continuation(said, bench.finish(home, bench.reference_of_two, 2))
    yield f"both, with a save that takes seconds: {said}"


def await_as_a_launcher(jobs: list[Job]) -> None:
    """Wait for all; once one has failed, tell the others to stop, as torchrun does."""
    while all(job.poll() in (None, 0) for job in jobs) and any(job.poll() is None for job in jobs):
        time.sleep(0.005)
    for job in jobs:
        job.send(signal.SIGTERM)
    for job in jobs:
        expect(job.wait(60) is not None, "hangs", *jobs)


def signalled_where_it_takes_long(bench: Bench) -> Iterator[str]:
    """A signal in the midst of validation, sampling, the search for a batch size, a wait for data, the export"""

    def in_validation() -> None:
        forward, calls = modeling.GPT2ForPretraining.forward, 0

        def patched(model, *arguments, **more):
            nonlocal calls
            calls += not model.training and more.get("labels") is not None
            if calls == 6:
                kill_myself(signal.SIGTERM)
            return forward(model, *arguments, **more)

        modeling.GPT2ForPretraining.forward = patched

    def in_sampling() -> None:
        sample, rounds = loop.sample, 0

        def patched(*arguments, check, **more):
            nonlocal rounds
            rounds += 1  # the third is the last, after all steps
            return sample(*arguments, check=lambda: (rounds == 3 and kill_myself(signal.SIGINT), check()), **more)

        loop.sample = patched

    def in_restoring() -> None:
        checkpoint.restore = lambda *arguments: kill_myself(signal.SIGTERM) or time.sleep(60)

    def in_search() -> None:
        from clm_owt.training import micro_batch_search as batching

        probe = batching.probe

        def patched(*arguments):
            probe(*arguments)
            kill_myself(signal.SIGUSR1)

        batching.probe = patched

    def in_wait_for_data() -> None:
        from clm_owt.data.token_store import TokenStore

        TokenStore.wait_for_rows = lambda store, rows, check: (kill_myself(signal.SIGTERM), check("rows"))

    def in_wait_for_data_later() -> None:
        from clm_owt.data.order import TrainingBlocks

        wait_for = TrainingBlocks.wait_for

        def patched(blocks, stop):
            wait_for(blocks, stop)
            if stop > 20 * RECIPE["effective_batch_size"] and os.environ.get("RANK", "0") == "0":
                kill_myself(signal.SIGTERM)
                blocks.check("a shard")

        TrainingBlocks.wait_for = patched

    def in_export() -> None:
        def patched(*arguments, **more):
            kill_myself(signal.SIGINT)
            time.sleep(60)

        modeling.GPT2ForPretraining.save_pretrained = patched

    cases = {
        "validation": (in_validation, 143),
        "export": (in_export, 130),
        "sampling": (in_sampling, 130),
        "search for a batch size": (in_search, 138),
        "restoring": (in_restoring, 143),
        "first wait for data": (in_wait_for_data, 143),
        "later wait for data": (in_wait_for_data_later, 143),
    }
    for name, (before, status) in list(cases.items())[:2] if bench.short else cases.items():
        home = bench.home()
        if name == "restoring":
            interrupted_at(bench, 33, home)
        (job,) = bench.start(home, before=before)
        expect(job.wait(60) == status, f"{name}: status {job.status}", job)
        said = what_was_said(job)
        expect_continuation(said, bench.finish(home))
        yield f"{name}: {said}"


def signalled_twice(bench: Bench) -> Iterator[str]:
    """A second signal while the save of the first is written"""

    for _ in range(1 if bench.short else 5):
        home = bench.home()
        options = ["--save_steps", "1000"]
        interrupted_at(bench, 12, home)
        (job,) = bench.start(home, before=at_step(13, slow_saves(20.0)), options=options)
        wait_until(job, "step 14/")
        job.send(signal.SIGTERM)
        time.sleep(1.2)
        began = time.monotonic()
        job.send(signal.SIGTERM)
        job.wait(30)
        took = time.monotonic() - began
        expect(job.status == 143 and took < 5.0, f"status {job.status} after {took:.1f} s", job)
        whole = checkpoint.checkpoints(bench.run_of(home) / "checkpoints")
        expect(all(checkpoint.damage(path) is None for path in whole), "a checkpoint is damaged", job)
        bench.finish(home)
        yield f"ended {took:.2f} s after the second, {whole[0].name} whole"


def launched(bench: Bench) -> Iterator[str]:
    """Signals to `accelerate launch` with 1 and with 2 processes, or to these alone; SIGKILL of the launcher"""
    cases = [
        (1, signal.SIGTERM, "launcher"), (1, signal.SIGKILL, "launcher"), (1, signal.SIGUSR1, "process"),
        (2, signal.SIGTERM, "launcher"), (2, signal.SIGINT, "launcher"), (2, signal.SIGKILL, "launcher"),
        (2, signal.SIGTERM, "processes"), (2, signal.SIGUSR1, "first process"), (2, signal.SIGINT, "last process"),
        (2, signal.SIGKILL, "last process"),
    ]  # fmt: skip
    for processes, signum, victim in [] if bench.short else cases:
        home = bench.home()
        home.mkdir()
        config = "cpu.yaml" if processes == 1 else "cpu_2proc.yaml"
        command = [*launcher(config), *bench.argv()]
        # A save takes seconds.
        (home / "sitecustomize.py").write_text(
            "import hashlib, time\ndigest = hashlib.file_digest\n"
            "hashlib.file_digest = lambda *arguments: time.sleep(0.5) or digest(*arguments)\n"
        )
        env = environment(home, ACCELERATE_USE_CPU="true", PYTHONPATH=str(home))
        job = Job(0, home / "job.out", home / "job.err")
        with job.output.open("w") as output, job.errors.open("w") as errors:
            process = subprocess.Popen(command, cwd=home, env=env, stdout=output, stderr=errors)
        try:
            deadline = time.monotonic() + 240
            while "step 8/" not in job.text:
                expect(process.poll() is None and time.monotonic() < deadline, "it did not come to step 8", job)
                time.sleep(0.02)
            workers = [
                p
                for p in psutil.Process(process.pid).children(recursive=True)
                if "run_clm_owt.py" in " ".join(p.cmdline())
            ]
            began = time.monotonic()
            workers.sort(key=lambda worker: int(worker.environ().get("RANK", "0")))
            victims = {"launcher": [process], "first process": workers[:1], "last process": workers[-1:]}
            for one in victims.get(victim, workers):
                one.send_signal(signum)
            process.wait(60)
            _, alive = psutil.wait_procs(workers, timeout=60)
            took = time.monotonic() - began
            expect(not alive, "workers live on", job)
        finally:
            process.kill()
        reference = bench.reference if processes == 1 else bench.reference_of_two
        said = [line for line in job.text.splitlines() if line.startswith("Stopped by")]
        expect(len(said) == 1, "not said", job)
        lost = "saved up to" in said[0]
        expect(not lost or (signum, victim) == (signal.SIGKILL, "last process"), "the last step is not saved", job)
        expect_continuation(said[0], bench.finish(home, reference, processes))
        yield f"{signum.name} to the {victim} (of {processes}): {said[0]} ({took:.1f} s)"


def not_finite(bench: Bench) -> Iterator[str]:
    """NaN in the embedded data, in the loss, in a gradient: one step, three in a row"""

    def inject(kind: str, steps: range) -> None:
        original = loop.forward_and_backward

        def patched(run, state, piece, **more):
            if state.step + 1 not in steps:
                return original(run, state, piece, **more)
            if kind == "data":
                hook = run.model.transformer.drop.register_forward_hook(
                    lambda module, inputs, output: output * float("nan")
                )
                try:
                    return original(run, state, piece, **more)
                finally:
                    hook.remove()
            if kind == "loss":
                forward = run.model.forward

                def broken(*arguments, **options):
                    output = forward(*arguments, **options)
                    output.loss = output.loss * float("nan")
                    return output

                run.model.forward = broken
                try:
                    return original(run, state, piece, **more)
                finally:
                    del run.model.forward
            sums = original(run, state, piece, **more)
            next(run.model.parameters()).grad.view(-1)[7] = float("inf")
            return sums

        loop.forward_and_backward = patched

    weights = set()
    for kind in ("data", "loss", "gradient"):
        home = bench.home()
        (job,) = bench.start(home, before=functools.partial(inject, kind, range(23, 24)))
        expect(job.wait() == 0, f"status {job.status}", job)
        skipped = [row for row in read_metrics(bench.run_of(home) / "metrics.jsonl") if "skipped" in row]
        expect([row["step"] for row in skipped] == [23], f"skipped {skipped}", job)
        expect(len(skipped[0]["block_ids"]) == 8 and skipped[0]["skipped"] == "not finite", f"{skipped}", job)
        expect("step 23: skipped (not finite)" in job.text, "not said", job)
        weights.add((bench.run_of(home) / "model/model.safetensors").read_bytes())
        yield f"{kind}, step 23: skipped"
        if bench.short and kind != "loss":
            continue
        home = bench.home()
        (job,) = bench.start(home, before=functools.partial(inject, kind, range(24, 60)))
        expect(job.wait() == 1, f"status {job.status}", job)
        expect("step 26: " in job.text and "Traceback" not in job.text, "not said", job)
        newest = checkpoint.checkpoints(bench.run_of(home) / "checkpoints")[0]
        expect(newest.name == "step-00000020", f"the last checkpoint is {newest.name}", job)
        bench.finish(home)  # without the fault
        yield f"{kind}, from step 24: ended after 3 steps, the last checkpoint is of step 20"
    expect(len(weights) == 1, "a skipped step left something in the weights")


def outliers(bench: Bench) -> Iterator[str]:
    """A gradient a thousand times too large, with skip_outliers; killed before and after it"""

    def inject() -> None:
        loop.OutlierGuard.WINDOW, loop.OutlierGuard.LIMIT = 20, 4.0  # 60 steps do not fill its own
        original = loop.forward_and_backward

        def patched(run, state, piece, **more):
            sums = original(run, state, piece, **more)
            if state.step + 1 == 33:
                for parameter in run.model.parameters():
                    parameter.grad *= 1000.0
            return sums

        loop.forward_and_backward = patched

    options = ["--skip_outliers", "true", "--output_dir", "runs/small"]
    homes = [bench.home(), bench.home()]
    for home, kills in zip(homes, ((), (32, 36)), strict=True):
        for step in kills:
            (job,) = bench.start(
                home, before=lambda step=step: (inject(), at_step(step, kill_myself)()), options=options
            )
            expect(job.wait() == -signal.SIGKILL, f"status {job.status}", job)
        (job,) = bench.start(home, before=inject, options=options)
        expect(job.wait() == 0, f"status {job.status}", job)
        skipped = [row for row in read_metrics(bench.run_of(home) / "metrics.jsonl") if "skipped" in row]
        expect([(row["step"], row["skipped"]) for row in skipped] == [(33, "outlier")], f"skipped {skipped}", job)
        told = "step 33: skipped (outlier)" in job.text or kills  # then a session before has told it
        expect(len(skipped[0]["block_ids"]) == 8 and told, f"{skipped}", job)
        bench.compare(home, homes[0], [job])
        yield f"step 33: skipped; killed in {kills or 'no step'}: the same"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own. Raises OSError where this user may not mount one."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        raise OSError(errno.EPERM, mounted.stderr.decode().strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Fill a disk to its last byte."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def full_disk(bench: Bench) -> Iterator[str]:
    """A full disk: during saves and logging, for a while and for good; during export and data building"""

    def full_between(disk: Path, first: int, last: int) -> None:
        at_step(first, lambda: fill(disk))()
        at_step(last, lambda: (disk / "filler").unlink())()

    def on_disk(home: Path) -> list[Job]:
        jobs = bench.start(home)
        for job in jobs:
            expect(job.wait() == 0, f"status {job.status}", job)
        bench.compare(home, bench.reference, jobs)
        return jobs

    with small_disk(bench.home(), "8m") as home:  # also its standard output is on this disk
        (job,) = bench.start(home, before=functools.partial(full_between, home, 12, 23))
        expect(job.wait() == 0, f"status {job.status}", job)
        bench.compare(home, bench.reference, [job])
        yield "full from step 12 to 22: 2 saves failed and no line is lost"
    with small_disk(bench.home(), "8m") as home:
        (job,) = bench.start(home, before=at_step(12, lambda: fill(home)))
        expect(job.wait() == 1, f"status {job.status}", job)
        whole = checkpoint.checkpoints(bench.run_of(home) / "checkpoints")
        expect([p.name for p in whole] == ["step-00000010", "step-00000005"], f"{whole}", job)
        (home / "filler").unlink()
        on_disk(home)
        yield "full from step 12 on: ended with an error after 3 failed saves, step 10 whole, continued"
    if bench.short:
        return
    with small_disk(bench.home(), "8m") as home:
        (job,) = bench.start(home, before=at_step(58, lambda: fill(home)))
        expect(job.wait() == 1, f"status {job.status}", job)
        (home / "filler").unlink()
        on_disk(home)
        yield "full at the end: ended with an error, continued"
    with small_disk(bench.home(), "8m") as home:

        def stop_when_full():
            at_step(12, lambda: fill(home))()
            at_step(17, lambda: kill_myself(signal.SIGTERM))()

        (job,) = bench.start(home, before=stop_when_full)
        expect(job.wait() == 143, f"status {job.status}", job)
        (home / "filler").unlink()
        on_disk(home)
        yield "full and told to stop: continued from the last save"
    with small_disk(bench.home(), "8m") as home:
        original = modeling.GPT2ForPretraining.save_pretrained

        def full_for_export():
            modeling.GPT2ForPretraining.save_pretrained = lambda *a, **k: (fill(home), original(*a, **k))

        (job,) = bench.start(home, before=full_for_export)
        expect(job.wait() == 1 and "Traceback" not in job.text, f"status {job.status}", job)
        (job,) = bench.start(home)
        expect(job.wait() == 2 and "are free there" in job.text, f"status {job.status}", job)
        (home / "filler").unlink()
        on_disk(home)
        yield "full during the export, and still when continued: ended with an error, refused, continued"
    with small_disk(bench.home(), "16k") as disk:
        home = bench.home()
        options = ["--data_cache_dir", str(disk / "cache")]
        (job,) = bench.start(home, options=options)
        expect(job.wait() == 1 and "No space left" in job.text, f"status {job.status}", job)
        expect("Traceback" not in job.text, "a traceback", job)
        said = job.text.strip().splitlines()[-1].replace(str(bench.folder), "")
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        bench.finish(home, options=options)
        yield f"full during data building: {said}"


def other_topology(bench: Bench) -> Iterator[str]:
    """1 -> 2 -> 1 processes, another micro-batch, at resumes"""
    home = bench.home()
    wanted = {
        row["step"]: row["loss"] for row in timeless_metrics(bench.run_of(bench.reference)) if row["split"] == "train"
    }
    sessions = (
        [(1, 4, 20), (2, 2, 40), (1, 3, None)] if bench.short else [(1, 4, 20), (2, 2, 30), (2, 4, 40), (1, 3, None)]
    )
    for processes, micro_batch, stop_in in sessions:
        options = ["--auto_batch_size", "false", "--max_batch_size", str(micro_batch)]
        before = at_step(stop_in, lambda: kill_myself(signal.SIGTERM)) if stop_in else lambda: None
        jobs = bench.start(home, processes, before, options)
        for job in jobs:
            expect(job.wait() == (143 if stop_in else 0), f"status {job.status}", *jobs)
    found = {row["step"]: row["loss"] for row in timeless_metrics(bench.run_of(home)) if row["split"] == "train"}
    expect(found.keys() == wanted.keys(), "other steps", *jobs)
    worst = max(abs(found[step] / wanted[step] - 1) for step in wanted)
    expect(worst <= 2e-6, f"losses differ by {worst:.1e}", *jobs)
    for processes, micro_batch, _ in sessions[1:]:
        yield f"{processes} process(es), micro-batch {micro_batch}: losses differ by at most {worst:.1e} in any step"


def shared_cache(bench: Bench) -> Iterator[str]:
    """Two runs at once that share an empty cache"""
    for _ in range(0 if bench.short else 1):
        cache = bench.home() / "cache"
        homes = [bench.home(), bench.home()]
        options = ["--data_cache_dir", str(cache)]
        jobs = [bench.start(home, options=options)[0] for home in homes]
        for job, home in zip(jobs, homes, strict=True):
            expect(job.wait() == 0, f"status {job.status}", *jobs)
            bench.compare(home, bench.reference, [job])
        yield "both equal the undisturbed run"


def resumed_late(bench: Bench) -> Iterator[str]:
    """Continuing at step 30,000 of a plan of 40,000, against step 10"""
    origin = bench.home()
    options = ["--max_steps", "40000"]
    run = Path("runs") / "small,max_steps=40000"
    (job,) = bench.start(origin, before=at_step(13, kill_myself), options=options)
    expect(job.wait() == -signal.SIGKILL, f"status {job.status}", job)
    late = bench.home()
    shutil.copytree(origin, late)
    folder = late / run / "checkpoints"
    early = checkpoint.checkpoints(folder)[0]
    state = json.loads((early / "state.json").read_text())
    early_step = state["step"]  # 10, or 5 where the kill was before the last save was whole
    blocks = RECIPE["effective_batch_size"]
    state |= {"step": 30_000, "position": 30_000 * blocks, "validated_step": 30_000, "sampled_step": 30_000}
    (early / "state.json").write_text(json.dumps(state))
    listing = {f.name: checkpoint.fingerprint(f) for f in early.iterdir() if f.name != checkpoint.MARKER}
    (early / checkpoint.MARKER).write_text(json.dumps({"files": listing}))
    early.rename(folder / "step-00030000")
    metrics = late / run / "metrics.jsonl"
    rows = [line for line in metrics.read_text().splitlines() if '"train"' in line]
    with metrics.open("a") as file:
        for step in range(20, 30_001, 10):
            file.write(json.dumps(json.loads(rows[-1]) | {"step": step}) + "\n")

    def seconds(home: Path, step: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        copy = bench.home()
        shutil.copytree(home, copy)
        (job,) = bench.start(copy, before=at_step(step + 1, kill_myself), options=options)
        expect(job.wait() == -signal.SIGKILL and f"Continuing after step {step:,}" in job.text, "not continued", job)
        shutil.rmtree(copy)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    pairs = [(seconds(origin, early_step), seconds(late, 30_000)) for _ in range(1 if bench.short else 5)]
    early_median, late_median = (sorted(column)[len(pairs) // 2] for column in zip(*pairs, strict=True))
    expect(late_median < early_median + 1.0, f"{late_median:.2f} s against {early_median:.2f} s")
    yield (
        f"{late_median:.2f} s of CPU time to the next step, without imports, against {early_median:.2f} s "
        f"(of {len(pairs)}); with a metrics.jsonl of 3,000 rows"
    )


def malformed_recipes(bench: Bench) -> Iterator[str]:
    """Malformed recipes, generated"""
    from support.malformed import recipes

    content = yaml.safe_load(bench.recipe.read_text())
    for i, (name, text) in enumerate(recipes(content, bench.draw, 8 if bench.short else 100)):
        home = bench.folder / f"bad-recipe-{i}"
        home.mkdir()
        file = bench.folder / f"bad-{i}.yaml"
        file.write_bytes(text)
        (job,) = [start(["--recipe", str(file)], home)]
        refused(job, name, home)
        yield name


def malformed_data(bench: Bench) -> Iterator[str]:
    """Malformed data sets, generated"""
    from support.malformed import data_sets

    for i, (name, options, write) in enumerate(data_sets(bench.draw, 4 if bench.short else 40)):
        home, data = bench.folder / f"bad-data-{i}", bench.folder / f"data-{i}"
        data.mkdir()
        write(data)
        argv = bench.argv(*[option.format(data=data) for option in options], "--data_cache_dir", str(home / "cache"))
        refused(start(argv, home, before=fork_builders), name, home)
        yield name


def refused(job: Job, name: str, home: Path) -> None:
    expect(job.wait() == 2, f"{name}: status {job.status}", job)
    expect("Traceback" not in job.text and job.text.startswith("error: "), f"{name}: not told", job)
    left = [path for path in home.rglob("*") if path not in (job.output, job.errors) and "hf" not in path.parts]
    expect(not [path for path in left if path.is_file()], f"{name}: left behind {left}", job)


def secrets(bench: Bench) -> Iterator[str]:
    """Tokens and keys in the environment, looked for in every file and line"""
    fakes = {"HF_TOKEN": "hf_FAKEfakeFAKEfake0123456789abcdefgh", "WANDB_API_KEY": "0fake1" * 6 + "abcd",
             "HUGGING_FACE_HUB_TOKEN": "hf_OLDFAKEoldfake0123456789abcdefgh"}  # fmt: skip
    cases = {
        "a run with W&B (offline) and TensorBoard": (["--report_to", "wandb", "tensorboard"], 0, {}),
        "a run that fails with a traceback": ([], 1, {"CLM_FAIL": "1"}),
    }
    for name, (options, status, more) in cases.items():
        home = bench.home()

        def fail():
            raise RuntimeError("on purpose")

        before = at_step(5, fail) if more else lambda: None
        (job,) = bench.start(home, before=before, options=options, env=fakes | {"WANDB_MODE": "offline"})
        expect(job.wait() == status, f"{name}: status {job.status}", job)
        files = [path for path in home.rglob("*") if path.is_file()]
        for file in files:
            content = file.read_bytes()
            for variable, fake in fakes.items():
                expect(fake.encode() not in content, f"{variable} is in {file}", job)
        yield f"{name}: in none of {len(files)} files"


SCENARIOS = {
    function.__name__: function
    for function in (
        killed, killed_over_and_over, killed_of_two, killed_during_a_save, killed_while_building, damaged, signalled,
        signalled_where_it_takes_long, signalled_of_two, signalled_twice, launched, not_finite, outliers, full_disk,
        other_topology, shared_cache, resumed_late, malformed_recipes, malformed_data, secrets,
    )
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="few faults of each kind")
    parser.add_argument("--seed", type=int, default=6)
    options = parser.parse_args(argv)
    print(f"seed {options.seed}, {PYTHON[0]}", flush=True)
    lost, rows = 0, []
    folder = tempfile.mkdtemp(prefix="faults-")  # whose removal is not left to an exit, which each child has too
    try:
        began = time.monotonic()
        bench = Bench(Path(folder), random.Random(options.seed), options.short)
        print(f"an undisturbed run takes {bench.cpu_seconds:.1f} s of CPU time", flush=True)
        for name in options.scenarios or SCENARIOS:
            scenario, done, problem = SCENARIOS[name], 0, ""
            bench.draw = random.Random(f"{options.seed} {name}")  # the same alone as among the others
            began_scenario = time.monotonic()
            try:
                for line in scenario(bench):
                    done += 1
                    print(f"{name}: {line}", flush=True)
            except Lost as error:
                problem = str(error)
                lost += 1
                print(f"{name}: LOST: {problem}", flush=True)
            except PermissionError as error:  # no disk could be mounted
                problem = f"not run here: {error}"
                print(f"{name}: {problem}", flush=True)
            took = time.monotonic() - began_scenario
            if done or problem:
                outcome = problem.splitlines()[0] if problem else "nothing"
                rows.append(f"| {scenario.__doc__} | {done} | {outcome} | {took:.0f} s |")
        print("\n| fault | injected | lost | time |\n|---|---|---|---|\n" + "\n".join(rows))
        print(f"\nseed {options.seed}, {time.monotonic() - began:.0f} s")
    finally:
        shutil.rmtree(folder)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
