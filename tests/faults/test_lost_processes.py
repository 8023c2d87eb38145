"""Runs whose launcher starts their processes again, without a person."""

import functools
import json
import socket
import time
from pathlib import Path

import psutil
import pytest
from support.bench import campaign
from support.hub_fixtures import english_documents
from support.restarted_runs import (
    assert_same_run,
    printed_steps,
    restarting_launcher,
    started_in,
    wait_for_steps,
    workers,
)
from support.runs import ROOT, Background, write_json_lines, write_tiny_recipe

pytestmark = [pytest.mark.faults, pytest.mark.xdist_group("restarts")]

KILLS = 15  # of one run
MOST_STEPS = 40  # from one kill to the next: the last one comes before the run's end
SECONDS = 60.0  # within which a run is to go on
LENGTH = {"max_steps": 800, "save_steps": 20, "eval_steps": 400, "sample_steps": 400}


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, optimizer):
    """The file of a recipe whose run lasts some seconds, beside its imports; its token store is shared."""
    folder = tmp_path_factory.mktemp("restarts")
    data = write_json_lines(folder / "documents.jsonl", english_documents()[:400])
    return write_tiny_recipe(folder, str(data), folder / "cache", optimizer=optimizer, **LENGTH)


@pytest.fixture(scope="session")
def undisturbed(recipe, tmp_path_factory):
    """Gives the folder of the undisturbed run of so many processes."""

    @functools.cache
    def folder_of(processes: int) -> Path:
        home = tmp_path_factory.mktemp("undisturbed") / "home"
        with started_in(home, restarting_launcher(0, processes=processes), "--recipe", str(recipe)) as job:
            assert job.process.wait(300) == 0, job.text
        return home / "runs/tiny"

    return folder_of


CASES = [(backend, processes) for processes in (1, 2) for backend in ("static", "c10d")]


@pytest.mark.parametrize("case", campaign(CASES, short=0))
def test_a_run_goes_on_by_itself_whatever_process_is_killed(recipe, undisturbed, home, draw, record_fault, case):
    """SIGKILL of one of the processes of `accelerate launch --max_restarts`, at random instants"""
    backend, processes = case
    command = restarting_launcher(KILLS, backend, processes)
    with started_in(home, command, "--recipe", str(recipe)) as job:
        wait_for_steps(job, 0, draw.randint(1, MOST_STEPS), SECONDS)
        for left in reversed(range(KILLS)):
            victim = draw.randrange(processes)
            where, killed_at = f"{backend}, process {victim} of {processes}", time.monotonic()
            kill(job, victim, processes)
            printed = len(job.text)
            if left and draw.random() < 0.4:  # and again while they start, or look for each other
                again_at = time.monotonic() + draw.uniform(0.0, 8.0)
                while time.monotonic() < again_at and not printed_steps(job, printed):
                    time.sleep(0.02)
                record_fault(f"{where}: and again {time.monotonic() - killed_at:.1f} s later")
            else:
                wait_for_steps(job, printed, 1, SECONDS)
                took = time.monotonic() - killed_at
                assert took < SECONDS, job.text[-4000:]
                record_fault(f"{where}: {took:.1f} s to the next step")
                wait_for_steps(job, printed, draw.randint(1, MOST_STEPS), SECONDS)
        assert job.process.wait(300) == 0, job.text[-4000:]
    assert_same_run(home / "runs/tiny", undisturbed(processes))


def kill(job: Background, victim: int, processes: int) -> None:
    """Kill one of the processes, once all are there, and wait for the others, which may print a last step."""
    job.wait_until(lambda: len(workers(job)) == processes, SECONDS)
    running = workers(job)
    running[victim].kill()
    psutil.wait_procs(running, SECONDS)


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_a_run_on_two_machines_goes_on_by_itself(recipe, undisturbed, home, draw, record_fault, backend):
    """SIGKILL of the process of one of two machines, each with a launcher, under --max_restarts"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config = home / "machine.yaml"
    home.mkdir(parents=True)
    shipped = (ROOT / "accelerate_configs/cpu_2proc.yaml").read_text()
    if backend == "c10d":  # as the head of multi_node.yaml says
        shipped = shipped.replace("same_network: true", "same_network: false")
    config.write_text(shipped)
    options = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--config_file", str(config), "--machine_rank"]
    commands = [restarting_launcher(KILLS, backend, 2, *options, str(rank), port=port) for rank in (0, 1)]
    with started_in(home, commands[0], "--recipe", str(recipe)) as main:
        time.sleep(3.0)  # machine 0 is to hold the store, as with machines that are two
        with started_in(home, commands[1], "--recipe", str(recipe)) as other:
            for machine in (1, 0, 1):
                wait_for_steps(main, len(main.text), draw.randint(1, MOST_STEPS), SECONDS)
                killed_at, others = time.monotonic(), workers((other, main)[machine])
                kill((main, other)[machine], 0, 1)
                psutil.wait_procs(others, SECONDS)
                wait_for_steps(main, len(main.text), 1, SECONDS)
                took = time.monotonic() - killed_at
                assert took < SECONDS, main.text[-4000:]
                record_fault(f"{backend}, of machine {machine}: {took:.1f} s to the next step")
            assert main.process.wait(300) == other.process.wait(60) == 0, main.text[-4000:]
    assert_same_run(home / "runs/tiny", undisturbed(2))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_would_fail_again_uses_up_its_restarts_in_seconds(recipe, home, record_fault, processes):
    """A run that cannot succeed, under --max_restarts 10"""
    command = restarting_launcher(10, processes=processes)
    options = ["--recipe", str(recipe), "--learning_rate", "1e30", "--warmup_steps", "0", "--max_grad_norm", "1e30"]
    with started_in(home, command, *options) as job:
        assert job.process.wait(300) != 0
        text = job.text
    state = json.loads(next((home / "runs").glob("*/run_state.json")).read_text())
    assert state["state"] == "failed" and state["final"] and "not finite for 3 steps" in state["error"]
    # Not 10 times: where another process leaves first, the launcher may end the one that says so before it does.
    assert text.count("Not started again: RunFailed: step") >= 1
    assert text.count(": importing torch") == 1, text  # by the first try alone
    seconds = time.time() - state["written_at"]
    assert seconds < 60
    record_fault(f"{processes} process(es): all 10 restarts had passed {seconds:.0f} s after the failure")
