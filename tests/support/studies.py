"""Studies of the penalty in a folder of their own, interrupted and continued."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import yaml
from support.runs import MAIN, ROOT
from support.warm_start import Job, WarmStart

STUDY = "support.studies:run_study"
OPTIONS = ["--prompts", "4", "--prompt_tokens", "8", "--new_tokens", "8"]
TABLES = ("models.csv", "effects.csv", "beyond_temperature.csv", "small_weights.csv", "report.md")

# Stands for a training: its model is that of a finished run, the weights a little other for each seed, and the head
# larger by λ, which makes it sharper. It takes steps, each kept in a file, and goes on where it was; at λ = 0.3 it
# fails.
STAND_IN = f"""\
import json, os, shutil, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
from clm_owt.recipe_reader import load_recipe
recipe, finished = load_recipe(sys.argv[1:]), Path(os.environ["FINISHED_RUN"])
weight, folder = recipe.penalty_weight, Path(recipe.output_dir)
folder.mkdir(parents=True, exist_ok=True)
if weight == 0.3:
    sys.exit("error: a weight of 0.3 is too much")
(folder / "recipe.yaml").write_text(recipe.to_yaml())
steps = folder / "steps"
for step in range(int(steps.read_text() or 0) if steps.exists() else 0, 4):
    time.sleep(float(os.environ["SECONDS_PER_STEP"]))
    steps.write_text(str(step + 1))
shutil.copytree(finished / "model", folder / "model", dirs_exist_ok=True)
weights = load_file(folder / "model/model.safetensors")
noise = np.random.default_rng([recipe.seed, int(1000 * abs(weight))])
for name, values in weights.items():
    changed = values + noise.normal(0, 0.02, values.shape).astype(values.dtype)
    weights[name] = changed * np.float32(1 + weight) if name == "transformer.ln_f.weight" else changed
save_file(weights, folder / "model/model.safetensors", {{"format": "pt"}})
plan = json.loads((finished / "plan.json").read_text())
aside = folder / "plan.aside"
aside.write_text(json.dumps(plan))
aside.replace(folder / "plan.json")
"""


def run_study(argv: Sequence[str]) -> None:
    """scripts/study.py, in a process of WarmStart."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import study

    from clm_owt.program import run_script

    sys.argv = ["scripts/study.py", *argv]
    run_script(study.main)


class Study:
    """A small study of a recipe, in the folder `home`."""

    def __init__(self, home: Path, recipe: Path, warm: WarmStart, env: Mapping[str, str], program: str = MAIN):
        self.home, self.warm, self.env = home, warm, env
        home.mkdir(parents=True)
        self.write(recipe, program, [1, 2], [0, 0.5])

    def write(self, recipe: Path, program: str, seeds: list[int], weights: list[float]) -> None:
        """The file, with these seeds and weights, of two penalties."""
        values = {"seed": seeds, "penalty_type": ["neg_entropy", "top_k_mass"], "penalty_weight": weights}
        parameters = {"recipe": {"value": str(recipe)}} | {name: {"values": value} for name, value in values.items()}
        content = {"program": program, "method": "grid", "parameters": parameters}
        (self.home / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    @property
    def folder(self) -> Path:
        return self.home / "runs/studies/small"

    def start(self) -> Job:
        return self.warm.start(STUDY, ["small.yaml", *OPTIONS], cwd=self.home, env=self.env, name="study")

    def tables(self) -> dict[str, bytes]:
        return {name: (self.folder / name).read_bytes() for name in TABLES}

    def measured(self) -> int:
        """How many models have been measured."""
        return len(list((self.folder / "measures").glob("*seed*.json")))


def kill_everything(job: Job) -> None:
    """SIGKILL of a program and of all that it has started, as when the machine stops."""
    everything = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in everything:
        process.kill()
    job.wait()
    psutil.wait_procs(everything[1:])


def kill_group(job: Job) -> None:
    """SIGKILL of a program's process group: trainings have groups of their own, and go on."""
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def terminate(job: Job) -> None:
    job.send(signal.SIGTERM)
    job.wait()
