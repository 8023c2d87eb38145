"""The main job on this machine: resumed, out of memory, compiled, sampled, exported; and on several GPUs."""

import functools
import json
import math
from pathlib import Path

import evaluate_model
import pytest
from support.gpu_table import Machine
from support.hub_fixtures import english_documents
from support.runs import (
    MAIN,
    ON_CPU,
    environment,
    launcher,
    run,
    timeless_metrics,
    write_json_lines,
    write_tiny_recipe,
)
from support.watched_run import go_back

from clm_owt.reports.record import read_metrics

pytestmark = pytest.mark.gpu

STEPS, BATCH = 8, 22
ACCEPTED = str(Path(__file__).parents[1] / "support/accepted_run.py")
SIZES = {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "train_tokenizer_vocab_size": 4096}
TINY_SIZES = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 64, "train_tokenizer_vocab_size": 512}
CHANGES = {
    "effective_batch_size": BATCH,
    "max_batch_size": 10,  # 8 + 8 + 6, and after a step down 6 + 6 + 6 + 4
    "learning_rate": 1e-3,
    "max_steps": STEPS,
    "eval_steps": 4,
    "save_steps": 4,
    "sample_steps": 4,
    "sample_max_new_tokens": 16,
}
SAME_RUN = 5e-3  # relative, of a step's loss in bf16 or fp16 after a few steps of other roundings
FLOAT32_EVALUATION = 5e-3  # relative, of a loss evaluated in bf16 or fp16


class Runs:
    """Runs of one recipe on this machine, each in a process of its own as its user starts it, in one folder."""

    def __init__(self, machine: Machine, folder: Path):
        self.machine, self.folder = machine, folder
        data = write_json_lines(folder / "documents.jsonl", english_documents())
        sizes = TINY_SIZES if machine.dry_run else SIZES
        self.recipe = write_tiny_recipe(folder, str(data), folder / "cache", "accepted", **CHANGES, **sizes)

    def start(
        self, name: str, *options: str, program: str = MAIN, config: str | None = None, processes: int = 1
    ) -> Path:
        """Run to the end; gives the run's folder."""
        command = self.launcher(config, processes, program)
        argv = ["--recipe", str(self.recipe), "--output_dir", str(self.folder / name), *options]
        if program == ACCEPTED:
            argv = [self.spec(name, argv)]
        more = ON_CPU if self.machine.dry_run and processes > 1 else {}
        # Freed memory goes back at once, so that a limit means something on a CPU.
        env = environment(self.folder, MALLOC_MMAP_THRESHOLD_="65536", **more)
        result = run(command, *argv, cwd=self.folder, env=env, timeout=300)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return self.folder / name

    def launcher(self, config: str, processes: int, program: str) -> list[str]:
        if self.machine.dry_run:
            name = "cpu.yaml" if processes == 1 else "cpu_2proc.yaml"
            return launcher(name, "--num_processes", str(processes), program=program)
        options = ["--num_processes", str(processes), "--mixed_precision", self.machine.precision]
        return launcher(config, *options, program=program)

    def spec(self, name: str, argv: list[str]) -> str:
        spec, dry_run = self.folder / f"{name}-spec.json", self.machine.dry_run
        record = str(self.folder / f"{name}-record.json")
        argv = [*argv, "--torch_compile", "true"]
        spec.write_text(json.dumps({"argv": argv, "tight_step": 6, "stand_in": dry_run, "record": record}))
        return str(spec)

    @functools.cached_property
    def deterministic(self) -> Path:
        return self.start("deterministic", "--deterministic", "true")

    @functools.cached_property
    def disturbed(self) -> Path:
        """With a step that ran out of memory, compiled code counted (accepted_run.py)."""
        return self.start("disturbed", program=ACCEPTED)

    @property
    def record(self) -> dict:
        return json.loads(self.disturbed.with_name("disturbed-record.json").read_text())


@pytest.fixture(scope="module")
def runs(machine, tmp_path_factory) -> Runs:
    return Runs(machine, tmp_path_factory.mktemp("accepted"))


def losses(folder: Path, split: str = "train") -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if row["split"] == split]


def farthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def test_a_resumed_run_is_the_same_bit_for_bit(runs, finding):
    """A run resumed in the middle, with deterministic: true: metrics, samples and weights bit for bit."""
    resumed = runs.folder / "resumed"
    go_back(str(runs.deterministic), STEPS // 2, resumed)
    # The recipe of the copied folder names the first folder.
    recipe = resumed / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(runs.deterministic), str(resumed)))
    runs.start("resumed", "--deterministic", "true")
    same = {
        "metrics": timeless_metrics(resumed) == timeless_metrics(runs.deterministic),
        "samples": (resumed / "samples.md").read_bytes() == (runs.deterministic / "samples.md").read_bytes(),
        "weights": weights(resumed) == weights(runs.deterministic),
    }
    finding(", ".join(f"{what} {'equal' if equal else 'DIFFER'}" for what, equal in same.items()), "equal")
    assert all(same.values())


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def test_the_loss_falls_and_the_samples_are_text(runs, finding):
    """Training and samples: finite losses that fall, a continuation of each prompt at each interval."""
    train = losses(runs.deterministic)
    text = (runs.deterministic / "samples.md").read_text()
    finding(f"loss {train[0]:.3f} to {train[-1]:.3f} in {STEPS} steps; {len(text):,} characters of samples", "falls")
    assert all(map(math.isfinite, train)) and train[-1] < train[0]
    assert all(f"tep {step}" in text for step in (0, STEPS // 2, STEPS))


def test_the_exported_model_has_the_loss_that_the_run_measured(runs, machine, finding, capsys):
    """The exported model, loaded by transformers in float32, against the run's last validation."""
    folder = runs.deterministic
    evaluate_model.main(["--model", str(folder / "model"), "--recipe", str(folder / "recipe.yaml"), "--json"])
    loss, expected = json.loads(capsys.readouterr().out)["loss"], losses(folder, "validation")[-1]
    bound = 1e-5 if machine.dry_run else FLOAT32_EVALUATION
    finding(f"{loss:.5f}, the run {expected:.5f}: {abs(loss / expected - 1):.1e}", f"{bound:g}")
    assert abs(loss / expected - 1) < bound


def test_a_step_that_runs_out_of_memory_is_repeated_smaller(runs, machine, finding):
    """A step that really runs out of memory is repeated with smaller micro-batches."""
    rows = [row for row in read_metrics(runs.disturbed / "metrics.jsonl") if row["split"] == "train"]
    sizes = [row["micro_batch"] for row in rows]
    apart = farthest(losses(runs.disturbed), losses(runs.deterministic))
    bound = 1e-4 if machine.dry_run else SAME_RUN
    finding(f"micro-batch {sizes[0]}, then {sizes[-1]}; losses {apart:.1e} from undisturbed", f"smaller; {bound:g}")
    assert sizes[:5] == [sizes[0]] * 5 and sizes[5] < sizes[0] and len(rows) == STEPS
    assert apart < bound


def test_every_block_of_every_micro_batch_runs_compiled(runs, finding):
    """Compiled code after probe, validation, samples and a step down: every block, and nothing compiled any more."""
    record = runs.record
    pieces, blocks, calls = len(record["micro_batches"]), record["blocks"], record["compiled_calls"]
    new = record["compiled"][1] - record["compiled"][0]
    finding(f"{calls} compiled calls in the last step", f"at least {pieces} × {blocks}")
    finding(f"{new} graphs compiled in the last step, {record['compiled'][0]} before", "0")
    assert calls >= pieces * blocks
    assert new == 0 and record["compiled"][0] > 0


@pytest.mark.parametrize("config", ["multi_gpu.yaml", "fsdp2.yaml"])
def test_several_gpus_do_the_same_run(config, runs, machine, finding):
    """The same run on two GPUs."""
    if machine.dry_run and config == "fsdp2.yaml":
        pytest.skip(f"{config}: Accelerate shards on GPUs only; tests/training/test_fsdp2.py does on a CPU")
    if not machine.dry_run and machine.gpus < 2:
        pytest.skip(f"{config}: one GPU here")
    folder = runs.start(config.removesuffix(".yaml"), config=config, processes=2)
    apart = farthest(losses(folder), losses(runs.deterministic))
    bound = 1e-4 if machine.dry_run else SAME_RUN
    finding(f"{config}: losses {apart:.1e} from one GPU's", f"{bound:g}")
    assert apart < bound
