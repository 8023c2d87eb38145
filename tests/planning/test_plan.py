import dataclasses
import os
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clm_owt.errors import InputError, RecipeError
from clm_owt.planning.devices import DEVICES, Hardware, find_device
from clm_owt.planning.disks import Disk, find_disk
from clm_owt.planning.memory import count_parameters
from clm_owt.planning.plan import Data, Plan, make_plan, plan_lines
from clm_owt.planning.step_time import SLOWEST, step_parts
from clm_owt.recipe_reader import load_recipe
from clm_owt.schedule import Schedule, is_due, times_due
from clm_owt.training.optim import build_schedule

NOTHING_KNOWN = Data(None, None, None, None)
RECIPES = sorted(Path("recipes").glob("*.yaml"))
PRESETS = sorted(Path("recipes").glob("owt_*.yaml"))


def owt(*changes: str):
    return load_recipe(["--recipe", "recipes/owt_512.yaml", *changes])


def tiny(**changes):
    """A recipe of round numbers that gives no warning: 1,000 steps of 10 blocks of 1,025 tokens."""
    settings = {
        "dataset_name": "me/data",
        "tokenizer_name": "me/tokenizer",
        "block_size": 1025,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "effective_batch_size": 10,
        "learning_rate": 1e-3,
        "warmup_steps": 20,
        "max_steps": 1000,
        "eval_steps": 500,
    } | changes
    return load_recipe([word for name, value in settings.items() for word in (f"--{name}", str(value))])


def plan(recipe, data=NOTHING_KNOWN, *, vocab_size=50257, micro_batch=32, disks=(), **hardware) -> Plan:
    hardware = {"device_type": "cuda" if "device_name" in hardware else "cpu"} | hardware
    return make_plan(recipe, data, vocab_size, micro_batch, Hardware(**hardware), *disks)


# Worked out by hand from facts.md's counts: 2 epochs of 8,827,040 expected blocks of 1,024 tokens.
#   batch, processes, micro-batch -> steps, tokens a step, tokens, validations, saves, the cut
OWT_PLANS = {
    ("owt_32", 1, 32): (551_690, 32_768, 18_077_777_920, 70, 35, "32 = 1 process × 1 micro-batch of 32"),
    ("owt_128", 4, 16): (137_922, 131_072, 18_077_712_384, 70, 35, "128 = 4 processes × 2 micro-batches of 16"),
    ("owt_512", 1, 32): (34_480, 524_288, 18_077_450_240, 70, 35, "512 = 1 process × 16 micro-batches of 32"),
    ("owt_512", 8, 24): (
        34_480,
        524_288,
        18_077_450_240,
        70,
        35,
        "512 = 8 processes × (2 micro-batches of 24 + 1 micro-batch of 16)",
    ),
    ("owt_512", 3, 64): (
        34_480,
        524_288,
        18_077_450_240,
        70,
        35,
        "512 = (2 micro-batches of 64 + 1 micro-batch of 42) + (2 micro-batches of 64 + 1 micro-batch of 43)"
        " + (2 micro-batches of 64 + 1 micro-batch of 43)",
    ),
    ("owt_2048", 64, 32): (8_620, 2_097_152, 18_077_450_240, 70, 35, "2048 = 64 processes × 1 micro-batch of 32"),
    ("owt_medium", 8, 16): (34_480, 524_288, 18_077_450_240, 70, 87, "512 = 8 processes × 4 micro-batches of 16"),
    ("owt_xl", 8, 4): (17_240, 1_048_576, 18_077_450_240, 70, 69, "1024 = 8 processes × 32 micro-batches of 4"),
}


@pytest.mark.parametrize(("case", "expected"), OWT_PLANS.items(), ids=str)
def test_the_plans_of_openwebtext_are_those_worked_out_by_hand(case, expected):
    name, processes, micro_batch = case
    p = plan(load_recipe(["--recipe", f"recipes/{name}.yaml"]), processes=processes, micro_batch=micro_batch)
    assert (p.total_steps, p.tokens_per_step, p.total_tokens, p.evaluations, p.saves, p.batch_arithmetic) == expected
    assert p.train_blocks == 8_827_040 and p.train_blocks_expected


def test_odd_sizes_are_planned_as_worked_out_by_hand():
    recipe = tiny(block_size=3, effective_batch_size=7, max_steps="none", num_train_epochs=1.5, warmup_steps=0,
                  eval_steps=4, save_steps=7, sample_steps=5, logging_steps=10)  # fmt: skip
    p = plan(recipe, Data(90, 9, 100, 8), vocab_size=70_000, processes=2, micro_batch=2)
    assert p.total_steps == 21  # floor(150 / 7)
    assert p.total_tokens == 441
    assert p.epochs == 1.47 and p.steps_per_epoch == 100 / 7
    assert p.evaluations == 7  # after 0, 4, 8, 12, 16, 20, 21
    assert p.saves == 3  # after 7, 14, 21
    assert p.samples == 6  # after 0, 5, 10, 15, 20, 21
    assert p.batch_arithmetic == "7 = (1 micro-batch of 2 + 1 micro-batch of 1) + (2 micro-batches of 2)"
    assert p.evaluation_share == 7 * 8 * 3 / 3 / 441
    assert p.data_bytes == 108 * 3 * 4  # ids above 65,536 take four bytes
    assert (p.warmup_share, p.learning_rates["0%"]) == (0.0, 1e-3)
    # 3 checkpoints of 12 bytes a parameter (2 kept, 1 being written), 4 for the model; 10 rows of 450 bytes; 6 rounds
    # of 3 samples of 100 tokens.
    assert p.output_bytes == (3 * 12 + 4) * p.parameters + 450 * 10 + 6 * 3 * 100 * 5


def test_rates_work_and_time_of_owt_512_are_those_worked_out_by_hand():
    p = plan(owt(), device_name="NVIDIA A100-SXM4-80GB", device_type="cuda", mixed_precision="bf16")
    rates = {"0%": 0.0, "25%": 0.00273257744, "50%": 0.00178037377, "75%": 0.00074267001, "100%": 0.0003}
    assert p.learning_rates == pytest.approx(rates, abs=1e-11)
    assert (p.linear_scaled_rate, p.square_root_scaled_rate) == (pytest.approx(9.6e-3), pytest.approx(2.4e-3))
    assert p.parameters == 124_439_808
    assert p.train_flops == 15_544_529_311_959_613_440  # 18,077,450,240 tokens of 859,885,056 FLOP
    step = sum(step_parts(owt(), 50_257, 32, find_device("a100-80gb")).values())
    assert p.seconds == (pytest.approx(34_480 * step), pytest.approx(34_480 * step * SLOWEST))
    assert p.data_bytes == 8_827_040 * 2048
    assert p.checkpoint_bytes == 1_493_277_696
    assert p.memory["weights"] == p.memory["gradients"] == 497_759_232
    assert p.memory["optimizer"] == 995_518_464
    eight = plan(owt(), processes=8, device_name="NVIDIA A100-SXM4-80GB", mixed_precision="bf16").seconds[0]
    assert p.seconds[0] / 8 < eight < 1.02 * p.seconds[0] / 8  # gradients are summed
    validated = plan(owt(), Data(9, 9, 9, 1_100), device_name="NVIDIA A100-SXM4-80GB", mixed_precision="bf16")
    assert validated.seconds[0] == pytest.approx(p.seconds[0] * (1 + validated.evaluation_share))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("owt_512", 124_439_808), ("owt_medium", 354_823_168), ("owt_large", 774_030_080), ("owt_xl", 1_557_611_200)],
)
def test_gpt2s_sizes_have_their_published_numbers_of_parameters(name, parameters):
    assert plan(load_recipe(["--recipe", f"recipes/{name}.yaml"])).parameters == parameters


@pytest.mark.parametrize(("vocab", "layers", "width", "length"), [(100, 2, 16, 32), (257, 3, 24, 8)])
def test_the_parameters_are_counted_as_they_are(vocab, layers, width, length):
    config = {"vocab_size": vocab, "n_layer": layers, "n_embd": width, "n_head": 2, "n_positions": length}
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0))
    sizes = f"--n_layer {layers} --n_embd {width} --n_head 2 --block_size {length}"
    assert count_parameters(owt(*sizes.split()), vocab) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("warmup", "total", "floor"), [(0, 7, 0.1), (3, 50, 0.0), (10, 11, 0.5), (49, 50, 1.0)])
def test_the_planned_rate_is_the_schedules_at_every_step(warmup, total, floor):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = build_schedule(optimizer, Schedule(warmup, total, floor))
    for step in range(total + 3):
        assert 3e-3 * Schedule(warmup, total, floor).factor(step) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-12
        )
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("total", range(1, 13))
@pytest.mark.parametrize("interval", range(1, 13))
def test_how_often_something_is_due_is_what_the_loop_does(total, interval):

    steps = [step for step in range(total + 1) if is_due(step, interval, total)]
    assert times_due(total, interval, at_start=True) == len(steps)
    assert times_due(total, interval, at_start=False) == len([step for step in steps if step > 0])


def test_the_number_of_steps_comes_from_the_expected_blocks_even_when_the_real_count_is_known():
    assert plan(owt(), Data(8_012_769, 1000, 8_827_000, 1100)).total_steps == 34_480


def test_without_an_expectation_it_comes_from_the_real_count():
    recipe = owt("--expected_train_blocks", "none", "--warmup_steps", "10")
    assert plan(recipe, Data(9, 1, 100_000, 5)).total_steps == int(2 * 100_000 / 512)
    with pytest.raises(InputError, match="num_train_epochs: the number of training blocks is not known"):
        plan(recipe)


def test_max_steps_wins_over_epochs():
    assert plan(owt("--max_steps", "3000")).total_steps == 3000


# What cannot run, and what just can.


def test_a_warmup_that_never_ends_is_refused_with_the_rate_it_would_stop_at():
    recipe = owt("--expected_train_blocks", "none")
    with pytest.raises(InputError, match=r"2000 does not end before the run does, after 1757 steps.*0\.00264"):
        plan(recipe, Data(1, 1, 450_000, 1))
    with pytest.raises(InputError, match=r"2000 does not end before the run does, after 2000 steps"):
        plan(recipe, Data(1, 1, 512_000, 1))
    assert plan(recipe, Data(1, 1, 512_256, 1)).total_steps == 2001
    allowed = owt("--expected_train_blocks", "none", "--allow_incomplete_warmup", "true")
    assert plan(allowed, Data(1, 1, 450_000, 1)).learning_rates["100%"] == pytest.approx(3e-3 * 1757 / 2000)


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(InputError, match="effective_batch_size: 2 blocks cannot be shared out over 3 processes"):
        plan(owt("--effective_batch_size", "2"), processes=3)
    assert plan(owt("--effective_batch_size", "3"), processes=3, micro_batch=32).batch_arithmetic == (
        "3 = 3 processes × 1 micro-batch of 1"
    )


def test_a_run_without_a_whole_step_is_refused():
    recipe = tiny(max_steps="none", num_train_epochs=1, warmup_steps=0)
    with pytest.raises(InputError, match="total steps: 0; the training blocks give no whole step"):
        plan(recipe, Data(9, 1, 9, 1))
    assert plan(recipe, Data(10, 1, 10, 1)).total_steps == 1


def test_a_floor_above_the_peak_is_refused():
    with pytest.raises(RecipeError, match=r"min_lr_ratio: '1.01' does not work; expected in \[0, 1\]"):
        tiny(min_lr_ratio=1.01)
    assert plan(tiny(min_lr_ratio=1.0)).learning_rates["100%"] == 1e-3


def test_too_little_disk_is_refused():
    data = Data(9, 1, 1000, 24)
    p = plan(tiny(), data)

    def disk(free: int, present: int = 0, file_system: int = 1) -> Disk:
        return Disk("some/folder", free, present, file_system)

    plan(tiny(), data, disks=(disk(p.data_bytes), disk(p.output_bytes, file_system=2)))
    with pytest.raises(InputError, match=r"data_cache_dir: the run needs another 2.1 MB in some/folder .*free some"):
        plan(tiny(), data, disks=(disk(p.data_bytes - 1), None))
    with pytest.raises(InputError, match="output_dir: the run needs another"):
        plan(tiny(), data, disks=(None, disk(p.output_bytes - 1)))
    # On one file system both have to fit, less what is there already.
    both = p.data_bytes + p.output_bytes
    plan(tiny(), data, disks=(disk(both), disk(both)))
    with pytest.raises(InputError, match="data_cache_dir or output_dir"):
        plan(tiny(), data, disks=(disk(both - 1), disk(both - 1)))
    plan(tiny(), data, disks=(disk(both - 1, present=1), disk(both - 1)))


def test_the_disk_of_a_folder_is_found_before_the_folder_exists(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_bytes(b"12345")
    assert find_disk(tmp_path / "run").present == 5
    assert find_disk(tmp_path / "not" / "yet").present == 0
    assert find_disk(tmp_path / "not" / "yet").file_system == os.stat(tmp_path).st_dev
    assert find_disk(tmp_path).free > 0


# What is warned of, and what just is not.


def warnings(recipe, data=NOTHING_KNOWN, **machine):
    return plan(recipe, data, **machine).warnings


def test_a_warmup_of_more_than_a_tenth_of_the_run_is_warned_of():
    assert warnings(tiny(warmup_steps=100)) == ()
    [text] = warnings(tiny(warmup_steps=101))
    assert text == (
        "warmup_steps: 101 of 1,000 steps are 10.1% of the run, usual are 1-2 %; lower it to 20, or train longer"
    )


@pytest.mark.parametrize(
    ("name", "published", "above"),
    [
        ("owt_512", "1.8e-3", "1.81e-3"),
        ("owt_medium", "3e-4", "3.1e-4"),
        ("owt_large", "2.5e-4", "2.6e-4"),
        ("owt_xl", "6e-4", "6.1e-4"),
    ],
)
def test_a_rate_above_what_is_published_for_the_size_is_warned_of(name, published, above):
    def with_rate(rate):
        return warnings(load_recipe(["--recipe", f"recipes/{name}.yaml", "--learning_rate", rate]))

    assert with_rate(published) == ()
    [text] = with_rate(above)
    assert text.startswith(f"learning_rate: {float(above):g} is above what is published for")


def test_nothing_is_said_of_the_rate_of_a_model_smaller_than_gpt2():
    assert warnings(tiny(learning_rate=0.5)) == ()


def test_a_validation_set_too_small_for_the_precision_it_is_read_at_is_warned_of():
    assert warnings(tiny(), Data(9, 1000, 5000, 25)) == ()  # 25,600 predicted tokens: 3.2 / 160 = 0.02
    [text] = warnings(tiny(), Data(9, 1000, 5000, 24))
    assert text.startswith("validation_documents: 1,000 give 24,576 predicted tokens, and a loss good to about 0.02")
    assert "raise it to 1,042" in text  # 1000 · 25,600 / 24,576
    [text] = warnings(tiny(dataset_name="python-docs", validation_share=0.01), Data(9, 1000, 5000, 5))
    assert text.startswith("validation_share: 0.01 give 5,120 predicted tokens") and "5 times as many for 0.02" in text


def test_evaluations_that_cost_over_a_twentieth_of_the_run_are_warned_of():
    recipe = tiny(max_steps=100, warmup_steps=2, eval_steps=50)  # 1,000 blocks; validated after 0, 50 and 100
    assert warnings(recipe, Data(9, 1000, 5000, 50)) == ()  # 3 · 50 / 3 of 1,000
    [text] = warnings(recipe, Data(9, 1000, 5000, 51))
    assert text == (
        "eval_steps: validation costs 5.1% of the training, each as much as 1.7 steps; "
        "raise eval_steps (50), or lower validation_documents (1,000)"
    )


def test_a_save_interval_longer_than_an_hour_is_warned_of():
    a100 = {"device_name": "NVIDIA A100-SXM4-80GB", "mixed_precision": "bf16"}
    hour = int(3600 / sum(step_parts(owt(), 50_257, 32, find_device("a100-80gb")).values()))
    assert warnings(owt("--learning_rate", "6e-4", "--save_steps", str(hour)), **a100) == ()
    [text] = warnings(owt("--learning_rate", "6e-4", "--save_steps", str(hour + 1)), **a100)
    assert text.startswith(f"save_steps: {hour + 1:,} steps take 60 min at the least, as derived for this device")
    assert text.endswith(f"lower it to {hour:,}")
    assert warnings(owt("--learning_rate", "6e-4", "--save_steps", str(hour + 1)), processes=2, **a100) == ()
    assert warnings(owt("--learning_rate", "6e-4", "--save_steps", "30000"), device_name="Abacus 9000") == ()


# Recipes and devices.


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_planned_and_warns_only_of_what_its_head_says(path):
    recipe = load_recipe(["--recipe", str(path)])
    p = plan(recipe, Data(None, recipe.validation_documents, None, 1_100), device_name="NVIDIA H100 80GB HBM3")
    expected = {
        "owt_512": ["learning_rate"],
        "owt_2048": ["warmup_steps", "effective_batch_size", "learning_rate"],
        "owt_xl": ["save_steps"],  # on one H100
        "quickstart": ["eval_steps"],
        **{f"owt_penalty_{name}": ["learning_rate"] for name in ("neg_entropy", "neg_max_prob", "non_max_sum")},
        "owt_penalty_top_k_mass": ["learning_rate"],
    }.get(path.stem, [])
    if recipe.dataset_name not in ("Skylion007/openwebtext", "HuggingFaceFW/fineweb-edu"):
        expected = [w.split(":")[0] for w in p.warnings if w.startswith("eval_steps")]  # 1,100 blocks are not theirs
    assert [warning.split(":")[0] for warning in p.warnings] == expected
    assert len(plan_lines(p, recipe)) == 16 + len(expected)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_differs_from_owt_512_in_what_its_name_says(path):
    size = {"learning_rate", "warmup_steps", "eval_steps", "save_steps", "sample_steps", "logging_steps", "milestones"}
    may_differ = {
        "owt_512": set(),
        "owt_32": size | {"effective_batch_size"},
        "owt_128": size | {"effective_batch_size"},
        "owt_2048": size | {"effective_batch_size"},
        "owt_medium": size | {"n_layer", "n_head", "n_embd"},
        "owt_large": size | {"n_layer", "n_head", "n_embd"},
        "owt_xl": size | {"n_layer", "n_head", "n_embd", "effective_batch_size"},
        "owt_muon_512": {"optimizer", "learning_rate", "min_lr_ratio", "milestones"},
        "owt_adamw_tuned_512": {"learning_rate", "lr_schedule", "min_lr_ratio", "adam_beta2"},
    }.get(path.stem, {"penalty_type", "penalty_weight"})
    preset, base = load_recipe(["--recipe", str(path)]).to_dict(), owt().to_dict()
    differing = {key for key in base if preset[key] != base[key]} - {"run_name", "output_dir"}
    assert differing <= may_differ
    assert (differing != set()) == (path.stem != "owt_512")


@pytest.mark.parametrize(
    ("driver_name", "key"),
    [
        ("NVIDIA GeForce RTX 3060", "rtx-3060"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("Apple M1 Max", "m1-max"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GB200", None),
        ("Apple M2 Ultra", None),
    ],
)
def test_a_device_is_known_by_the_drivers_name_and_no_other_is_taken_for_it(driver_name, key):
    device = find_device(driver_name)
    assert (device and device.key) == key


def test_every_device_is_listed_once_with_a_source():
    assert len({device.key for device in DEVICES}) == len(DEVICES)
    assert all(find_device(device.key) is device and device.source for device in DEVICES)
    assert all(device.memory_rate > 1e10 and device.link_rate > 1e10 for device in DEVICES)


# How it reads.


def test_the_plan_is_told_in_lines_that_name_what_is_not_known():
    text = "\n".join(plan_lines(plan(owt()), owt()))
    assert "34,480 steps of 524,288 tokens, 2.00 epochs of 17,240.3 steps; 18,077,450,240 tokens in all" in text
    assert "8,827,040 training blocks expected (still being read)" in text
    assert "training documents not counted yet" in text
    assert "peak 0.003 after 2,000 steps of warm-up (5.8% of the run), cosine, floor 0.0003" in text
    assert "▁▅██████▇▇▇▇▆▆▆▅▅▅▄▄▄▃▃▃▃▂▂▂▂▂▂▂" in text
    assert "0.0006 at a batch of 32 is 0.0096 here by the linear rule, 0.0024 by the square root" in text
    assert "not estimated for this device" in text
    assert "warning    learning_rate: 0.003 is above what is published" in text
    assert "runs/owt_512" in text


def test_the_plan_is_kept_whole_for_machines():
    p = plan(owt(), device_name="NVIDIA A100-SXM4-80GB", mixed_precision="bf16")
    assert p.to_dict() == {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
    text = "\n".join(plan_lines(p, owt()))
    assert "on 1 x A100 80 GB: derived from bytes and FLOPs of the code" in text and "to 1.7 times that" in text


@pytest.mark.parametrize(("gib", "needless"), [(79.2, True), (39.4, False)])
def test_a_plan_says_when_a_model_need_not_be_sharded(gib, needless):
    """GPT-2 XL: weights, gradients and two moments are 25 GB."""
    xl = load_recipe(["--recipe", "recipes/owt_xl.yaml"])
    machine = {"device_name": "A100", "memory": int(gib * 2**30), "processes": 8, "mixed_precision": "bf16"}
    warnings = plan(xl, sharded=True, **machine).warnings
    assert any("accelerate_configs/multi_gpu.yaml" in text for text in warnings) == needless
    assert not any("multi_gpu.yaml" in text for text in plan(xl, **machine).warnings)
