"""Configurations of machines: what Accelerate reads in them, what is refused, and what runs on a CPU for real."""

import json
import os
import signal
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file
from support.runs import ON_CPU, ROOT, environment, launcher, run, started
from support.watched_fixtures import processes_marked
from torch import nn
from transformers import GPT2LMHeadModel

from clm_owt.errors import InputError, exit_with
from clm_owt.model import fp8
from clm_owt.model.gpt2 import build_model
from clm_owt.recipe_reader import load_recipe
from clm_owt.run_state import RunState
from clm_owt.training import checkpoint, cpu_precision
from clm_owt.training.launch import (
    ALLOCATOR_SETTINGS,
    asks_for_restarts,
    create_accelerator,
    let_segments_grow,
    refuse_slow_bf16,
)
from clm_owt.training.optim import build_adamw

CONFIGS = {  # name: (distributed type, machines, processes, precision, on a CPU)
    "cpu.yaml": ("NO", 1, 1, "no", True),
    "cpu_bf16.yaml": ("NO", 1, 1, "bf16", True),
    "cpu_2proc.yaml": ("MULTI_GPU", 1, 2, "no", True),
    "single_gpu.yaml": ("NO", 1, 1, "bf16", False),
    "single_gpu_fp16.yaml": ("NO", 1, 1, "fp16", False),
    "multi_gpu.yaml": ("MULTI_GPU", 1, 8, "bf16", False),
    "multi_node.yaml": ("MULTI_GPU", 2, 16, "bf16", False),
    "fsdp2.yaml": ("FSDP", 1, 8, "bf16", False),
    "fp8_hopper.yaml": ("NO", 1, 1, "fp8", False),
    "mps.yaml": ("NO", 1, 1, "no", False),
}


def test_all_configs_are_listed_here():
    assert {path.name for path in (ROOT / "accelerate_configs").glob("*.yaml")} == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_each_config_as_it_is_meant(name):
    path = ROOT / "accelerate_configs" / name
    config = load_config_from_file(str(path))
    found = (config.distributed_type, config.num_machines, config.num_processes, config.mixed_precision)
    assert (*found, config.use_cpu) == CONFIGS[name]
    head = path.read_text().split("compute_environment")[0]
    assert "accelerate launch --config_file accelerate_configs/" + name in head
    assert "# Run by the project: " in head


def test_the_launcher_takes_what_is_special_in_the_configs_for_fsdp2_and_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def arguments(name: str):
        options = ["--config_file", str(ROOT / "accelerate_configs" / name), "run_clm_owt.py"]
        return _validate_launch_command(launch_command_parser().parse_args(options))[0]

    fsdp2 = arguments("fsdp2.yaml")
    assert (fsdp2.use_fsdp, fsdp2.fsdp_version, fsdp2.fsdp_state_dict_type) == (True, 2, "FULL_STATE_DICT")
    assert fsdp2.fsdp_transformer_layer_cls_to_wrap == "GPT2Block"
    hopper = arguments("fp8_hopper.yaml")
    assert (hopper.mixed_precision, hopper.fp8_backend) == ("fp8", "AO")
    assert str(hopper.fp8_enable_fsdp_float8_all_gather) == "False"


SETTINGS_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("true", "FSDP2"),
    "ACCELERATE_USE_MEGATRON_LM": ("true", "Megatron"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", "parallelism_config"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "torch_compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "effective_batch_size"),
    "ACCELERATE_MIXED_PRECISION": ("fp16", "on a CPU take no"),
    "ACCELERATE_USE_FSDP": ("true", "cpu_2proc.yaml"),
    "WORLD_SIZE": ("2", "ACCELERATE_USE_CPU=true"),
}


@pytest.mark.parametrize("variable", SETTINGS_REFUSED)
def test_settings_that_cannot_keep_the_promise_are_refused_with_the_mend(variable, warm, tmp_path):
    """In a process of its own, since Accelerate remembers its first state."""
    value, mend = SETTINGS_REFUSED[variable]
    job = warm.start("test_machines:come_up", cwd=tmp_path, env={variable: value})
    assert job.wait() == 2, job.text
    assert "error: accelerate config:" in job.text
    assert mend in job.text


def come_up() -> None:
    """The start of a run."""
    argv = "--dataset_name python-docs --train_tokenizer_vocab_size 300 --effective_batch_size 16 --learning_rate 1 "
    argv += "--warmup_steps 0 --max_steps 1"
    try:
        create_accelerator(load_recipe(argv.split()))
    except InputError as error:
        exit_with(error)


@pytest.mark.parametrize("has", [None, "avx512_bf16", "amx_bf16"])
def test_bf16_on_a_cpu_that_has_no_instructions_for_it_is_refused_and_not_taken(has, monkeypatch, capsys):
    capabilities = dict.fromkeys(("avx512_f", "avx512_bf16", "amx_bf16"), False) | {has: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu_precision.main()
    assert capsys.readouterr().out == f"accelerate_configs/{'cpu_bf16' if has else 'cpu'}.yaml\n"
    if has:
        return refuse_slow_bf16()
    with pytest.raises(InputError, match=r"^accelerate config: .* neither AVX512_BF16 nor AMX .* take no, [^\n]*$"):
        refuse_slow_bf16()


def test_a_run_under_bf16_is_refused_on_a_cpu_without_it(warm, tmp_path):
    env = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    job = warm.start("test_machines:come_up_without_bf16", cwd=tmp_path, env=env)
    assert job.wait() == 2, job.text
    assert "cpu.yaml" in job.text


def come_up_without_bf16() -> None:
    torch.cpu.get_capabilities = lambda: {"avx2": True}
    come_up()


@pytest.mark.parametrize("own", [*ALLOCATOR_SETTINGS, None])
def test_segments_of_gpu_memory_grow_unless_the_user_has_set_the_allocator(own, monkeypatch):
    for variable in ALLOCATOR_SETTINGS:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)  # and whatever is set here is gone after the test
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    let_segments_grow()
    set_now = {variable: os.environ[variable] for variable in ALLOCATOR_SETTINGS if variable in os.environ}
    assert set_now == (
        {own: "max_split_size_mb:128"} if own else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    )


def test_processes_that_came_up_alone_are_refused_by_the_main_command(tiny_recipe, tmp_path):
    """cpu_2proc.yaml without ACCELERATE_USE_CPU in the environment, where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU these processes would use it")
    result = run(launcher("cpu_2proc.yaml"), "--recipe", str(tiny_recipe), cwd=tmp_path)
    assert result.returncode != 0
    assert "2 processes were launched but each came up alone" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        ("--max_restarts 3 run_clm_owt.py --recipe r.yaml", True),
        ("--config_file c.yaml --max-restarts=3 run_clm_owt.py", True),
        ("--config_file c.yaml run_clm_owt.py --run_name --max_restarts", False),
    ],
)
def test_a_launcher_that_is_asked_for_restarts_is_known_by_its_command(options, asks):
    """The one of one process passes over them in silence, and is refused."""
    assert asks_for_restarts(["/usr/bin/python3", "/usr/bin/accelerate", "launch", *options.split()]) == asks


@pytest.fixture
def small():
    argv = "--dataset_name python-docs --train_tokenizer_vocab_size 304 --block_size 32 --n_layer 2 --n_head 2 "
    argv += "--n_embd 32 --effective_batch_size 16 --learning_rate 1e-3 --warmup_steps 0 --max_steps 1"
    recipe = load_recipe(argv.split())
    return recipe, lambda: build_model(recipe, 304, 0)


def step(model, recipe, blocks):
    optimizer = build_adamw(model, recipe)
    output = model(input_ids=blocks, labels=blocks)
    output.loss.backward()
    optimizer.step()
    return output.loss.item(), optimizer


def one_process():
    return SimpleNamespace(rank=0, is_main=True, gather=lambda value: [value])


def test_conv1d_as_linear_is_the_same_model_and_is_saved_as_gpt2(small, tmp_path):
    recipe, build = small
    blocks = torch.arange(64).view(2, 32)
    plain, linear = build(), build()
    fp8.conv1d_to_linear(linear)
    assert sum(type(module) is nn.Linear for module in linear.transformer.modules()) == 8
    assert len(linear.transposed_weights) == 8
    (loss, optimizer), (plain_loss, plain_optimizer) = (step(model, recipe, blocks) for model in (linear, plain))
    assert loss == pytest.approx(plain_loss, rel=1e-6)

    state = checkpoint.TrainState(step=1)
    folders = {}
    for name, (model, own) in {"linear": (linear, optimizer), "plain": (plain, plain_optimizer)}.items():
        snapshot = checkpoint.take_snapshot(state, model, own, one_process())
        folders[name] = checkpoint.write_snapshot(snapshot, tmp_path / name)
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(folders["linear"] / file), load_file(folders["plain"] / file)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)

    # Either continues from the other's checkpoint.
    again = build()
    fp8.conv1d_to_linear(again)
    checkpoint.restore(folders["plain"], again, build_adamw(again, recipe), one_process())
    expected = plain(input_ids=blocks, labels=blocks).loss.item()
    assert again(input_ids=blocks, labels=blocks).loss.item() == pytest.approx(expected, rel=1e-6)

    weights = fp8.transpose_linear_weights(again, checkpoint.copy_to_host(dict(again.named_parameters()), keep=True))
    again.save_pretrained(tmp_path / "model", state_dict=weights)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.transformer.h[0].mlp.c_fc.weight, plain.transformer.h[0].mlp.c_fc.weight)


def test_a_conversion_to_fp8_that_converts_nothing_is_refused(small):
    _, build = small
    with pytest.raises(InputError, match="converted none of the 8 layers"):
        fp8.convert_blocks(build(), lambda blocks: None)

    class Converted(nn.Linear):
        pass

    def convert(blocks):
        for block in blocks:
            block.mlp.c_fc.__class__ = Converted

    assert fp8.convert_blocks(build(), convert) == (2, 8)


@pytest.mark.slow  # needs the extra [fp8], whose torchao slows every start
def test_torchao_converts_the_layers(small):
    """On a CPU they are only converted, and not run."""
    from accelerate.utils import convert_model_to_fp8_ao

    _, build = small
    # Accelerate leaves out the first and the last layer.
    assert fp8.convert_blocks(build(), convert_model_to_fp8_ao) == (6, 8)


def test_fp8_is_refused_on_a_device_that_has_none(small):
    _, build = small
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"needs an NVIDIA GPU.*single_gpu\.yaml"):
        fp8.convert(build(), accelerator)


STAND_INS = {  # for Slurm's commands, and for a launcher whose run fails
    "srun": '#!/bin/bash\nshift\nSLURM_NODEID=0 exec "$@"\n',
    "scontrol": '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SCONTROL_LOG"; fi\n',
    "accelerate": '#!/bin/bash\necho "$@" >> "$SCONTROL_LOG"; exit 1\n',
    "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job on one node with two GPUs, with stand-ins for srun and scontrol."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return environment(
        tmp_path,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        CONFIG="accelerate_configs/cpu_2proc.yaml",
        SCONTROL_LOG=str(tmp_path / "scontrol.log"),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="12345",
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="localhost",
        SLURM_GPUS_ON_NODE="2",
        **ON_CPU,
    )


def test_the_slurm_script_saves_before_the_time_limit_requeues_and_continues(batch_recipe, slurm, tmp_path):
    """Slurm's signal goes to the script, as `--signal=B:USR1@300` sends it."""
    mark = f"{tmp_path}-slurm"
    env = slurm | {"MARK_OF_THIS_TEST": mark, "ACCELERATE": launcher()[0]}
    output = tmp_path / "run"
    command = ["bash", str(ROOT / "scripts/launch.slurm"), "--recipe", str(batch_recipe), "--output_dir", str(output)]
    command += ["--max_steps", "100000", "--eval_steps", "100000"]
    with started(command, cwd=tmp_path, env=env) as job:
        job.wait_for("step 3/")
        assert job.stop(signal.SIGUSR1) == 0, job.text
    assert (tmp_path / "scontrol.log").read_text() == "requeue 12345\n"
    assert checkpoint.find_newest(output / "checkpoints")[0] is not None
    assert processes_marked(mark) == []

    with started(command, cwd=tmp_path, env=env) as job:
        job.wait_for("Continuing after step")
        assert job.stop(signal.SIGTERM) != 0  # a preemption: Slurm requeues by itself
    assert (tmp_path / "scontrol.log").read_text() == "requeue 12345\n"
    assert processes_marked(mark) == []


@pytest.mark.parametrize(
    ("run_state", "restarted", "requeued"),
    [
        (RunState("failed", "", 0, error="ValueError: x"), 9, True),
        (RunState("failed", "", 0, error="ValueError: x"), 10, False),  # as often as allowed
        (RunState("failed", "", 0, error="RunFailed: not finite", final=True), 0, False),
        (RunState("stopped", "", 0, error="stopped by stop_after 1h", final=True), 30, True),
        (None, 0, True),  # killed before it began
    ],
)
def test_the_slurm_script_requeues_a_run_that_failed_unless_it_would_fail_again(
    tiny_recipe, slurm, tmp_path, run_state, restarted, requeued
):
    output = tmp_path / "run"
    if run_state is not None:
        output.mkdir()
        (output / "run_state.json").write_text(json.dumps(asdict(run_state)))
    options = ["--recipe", str(tiny_recipe), "--output_dir", str(output)]
    env = slurm | {"ACCELERATE": str(tmp_path / "accelerate"), "SLURM_RESTART_COUNT": str(restarted)}
    result = run(["bash", str(ROOT / "scripts/launch.slurm"), *options], cwd=tmp_path, env=env)
    launched, *rest = (tmp_path / "scontrol.log").read_text().splitlines()
    assert f"--max_restarts 3 run_clm_owt.py --recipe {tiny_recipe}" in launched
    assert rest == (["requeue 12345"] if requeued else [])
    assert result.returncode == (0 if requeued else 1)
    assert ("it goes on in another job" if requeued else "not queued again") in result.stdout
