import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from clm_owt.plan import Data, count_parameters, describe, make_plan
from clm_owt.recipe import InputError, load_recipe

NOTHING_KNOWN = Data(None, None, None, None)


def owt(*changes: str):
    return load_recipe(["--recipe", "recipes/owt_512.yaml", *changes])


def plan(recipe, data=NOTHING_KNOWN, processes=1, micro_batch=32):
    return make_plan(recipe, data, vocab_size=50257, processes=processes, micro_batch=micro_batch)


def test_the_plan_of_openwebtext_before_it_is_read():
    p = plan(owt(), processes=8)
    assert (p.total_steps, p.tokens_per_step, p.total_tokens) == (34_480, 524_288, 34_480 * 524_288)
    assert p.train_blocks == 8_827_040 and p.train_blocks_expected
    assert p.steps_per_epoch == 17_240.3125
    assert p.warmup_share == 2000 / 34_480
    assert p.parameters == 124_439_808
    assert (p.learning_rate_peak, p.learning_rate_floor) == (3e-3, pytest.approx(3e-4))
    assert p.batch_arithmetic == "512 = 8 processes × 2 micro-batches of 32"


def test_the_number_of_steps_comes_from_the_expected_blocks_even_when_the_real_count_is_known():
    assert plan(owt(), Data(8_012_769, 1000, 8_827_000, 1100)).total_steps == 34_480


def test_without_an_expectation_it_comes_from_the_real_count():
    recipe = owt("--expected_train_blocks", "none", "--warmup_steps", "10")
    assert plan(recipe, Data(9, 1, 100_000, 5)).total_steps == int(2 * 100_000 / 512)
    with pytest.raises(InputError, match="num_train_epochs: the number of training blocks is not known"):
        plan(recipe)


def test_max_steps_wins_over_epochs():
    assert plan(owt("--max_steps", "3000")).total_steps == 3000


def test_a_warmup_that_outlasts_the_run_is_refused_with_the_numbers_once_the_blocks_are_counted():
    recipe = owt("--expected_train_blocks", "none")
    with pytest.raises(InputError, match=r"2000 does not end before the run does, after 1757 steps.*0\.00264"):
        plan(recipe, Data(1, 1, 450_000, 1))


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(InputError, match="effective_batch_size: 2 blocks cannot be shared out over 3 processes"):
        plan(owt("--effective_batch_size", "2"), processes=3)


@pytest.mark.parametrize(("vocab", "layers", "width", "length"), [(100, 2, 16, 32), (257, 3, 24, 8)])
def test_the_parameters_are_counted_as_they_are(vocab, layers, width, length):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab, n_layer=layers, n_embd=width, n_head=2, n_positions=length, bos_token_id=0, eos_token_id=0)
    )
    sizes = f"--n_layer {layers} --n_embd {width} --n_head 2 --block_size {length}"
    assert count_parameters(owt(*sizes.split()), vocab) == sum(p.numel() for p in model.parameters())


def test_the_plan_is_told_in_lines_that_name_what_is_not_known():
    text = "\n".join(describe(plan(owt()), owt()))
    assert "34,480 steps of 524,288 tokens, 2.00 epochs of 17,240.3 steps; 18,077,450,240 tokens in all" in text
    assert "8,827,040 training blocks expected (still being read)" in text
    assert "training documents not counted yet" in text
    assert "peak 0.003 after 2,000 steps of warm-up (5.8% of the run), floor 0.0003" in text
    assert "runs/owt_512" in text
