"""The model against transformers' GPT-2 and against a plain PyTorch one; what it is built from and what it saves."""

import dataclasses
import functools
import json
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from plain_gpt2 import PlainGPT2
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, pipeline

from clm_owt.errors import InputError
from clm_owt.model.gpt2 import GPT2ForPretraining, build_model, check_initialisation
from clm_owt.model.losses import reference_linear_loss
from clm_owt.recipe import Recipe

V, T = 131, 24
RECIPE = Recipe(
    dataset_name="text",
    data_files=("corpus.txt",),
    tokenizer_name="tokenizer",
    block_size=T,
    n_layer=3,
    n_head=4,
    n_embd=32,
    effective_batch_size=4,
    learning_rate=1e-3,
    warmup_steps=1,
    max_steps=4,
)


def build(**changes) -> GPT2ForPretraining:
    return build_model(dataclasses.replace(RECIPE, **changes), V, eos_token_id=V - 1)


def blocks(m=4, seed=0, length=T) -> torch.Tensor:
    return torch.randint(V, (m, length), generator=torch.Generator().manual_seed(seed))


def relative_error(actual, expected) -> float:
    return ((actual.detach() - expected.detach()).norm() / expected.detach().norm()).item()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def train_steps(model, steps=5, m=4, length=T):
    """The losses and gradients of steps with a bare AdamW, on two batches in turn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses, all_gradients = [], []
    for step in range(steps):
        ids = blocks(m, seed=step % 2, length=length)
        loss = model(ids) if isinstance(model, PlainGPT2) else model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        all_gradients.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return losses, all_gradients


def without_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Attention does not depend on the key's bias: its gradient is rounding alone, and AdamW makes steps of that."""
    if name.endswith("c_attn.bias"):
        query, _, value = tensor.chunk(3)
        return torch.cat((query, value))
    return tensor


def test_five_steps_equal_a_plain_gpt2():
    # The gradients of the first step differ by 5e-7, both ways as far from float64. AdamW divides by their size, small
    # ones too, so that later ones differ by a few 1e-6, and the less the more tokens they are the sum of.
    size = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64}
    model = build(**size)
    plain = PlainGPT2(vocab_size=V, **size).load_gpt2(model.state_dict())
    losses, all_gradients = train_steps(model, m=8, length=64)
    plain_losses, plain_gradients = train_steps(plain, m=8, length=64)
    for loss, expected in zip(losses, plain_losses, strict=True):
        assert abs(loss / expected - 1) < 1e-5
    steps = [*zip(all_gradients, plain_gradients, strict=True)]
    steps.append((dict(model.named_parameters()), dict(plain.named_parameters())))
    for actual, expected in steps:
        for name, tensor in expected.items():
            own = actual[f"transformer.{name}"]
            own = own.t() if ".c_" in name and name.endswith("weight") else own
            assert relative_error(without_key_bias(name, own), without_key_bias(name, tensor)) < 1e-5, name


def test_loss_and_gradients_equal_those_of_transformers(tmp_path):
    model, ids = build(), blocks()
    labels = ids.clone()
    labels[1, 5:9] = -100
    model.save_pretrained(tmp_path)
    usual = GPT2LMHeadModel.from_pretrained(tmp_path).train()
    expected = usual(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(77)).loss
    expected.backward()
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=77).loss
    loss.backward()
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    for name, parameter in usual.named_parameters():
        own, theirs = without_key_bias(name, model.get_parameter(name).grad), without_key_bias(name, parameter.grad)
        assert relative_error(own, theirs) < 1e-5, name
    by_default = usual(input_ids=ids, labels=labels).loss
    assert abs(model(input_ids=ids, labels=labels).loss.item() / by_default.item() - 1) < 1e-6


@pytest.mark.parametrize("penalty_type", ["non_max_sum", "neg_entropy", "top_k_mass"])
def test_twenty_steps_give_the_losses_of_the_reference(penalty_type):
    changes = {"penalty_type": penalty_type, "penalty_weight": 0.1}
    losses, _ = train_steps(build(**changes), steps=20)

    model = build(**changes)
    model.linear_loss = lambda *inputs, round_logits, **settings: reference_linear_loss(*inputs, **settings)
    expected, _ = train_steps(model, steps=20)
    assert losses[-1] < losses[0]
    for loss, reference_loss in zip(losses, expected, strict=True):
        assert abs(loss / reference_loss - 1) < 1e-5


def test_the_output_has_statistics_and_no_logits():
    model, ids = build(penalty_weight=0.5), blocks()
    output = model(input_ids=ids, labels=ids)
    assert output._fields == ("loss", "ce_loss", "penalty", "max_prob", "entropy")
    torch.testing.assert_close(output.loss.detach(), output.ce_loss + 0.5 * output.penalty)
    with torch.no_grad():
        p = GPT2LMHeadModel.forward(model, ids).logits[:, :-1].softmax(-1)
    torch.testing.assert_close(output.max_prob, p.amax(-1).mean())
    torch.testing.assert_close(output.entropy, -(p * p.log()).sum(-1).mean())


def test_without_labels_it_is_the_parent():
    model, ids = build().eval(), blocks()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, GPT2LMHeadModel.forward(model, ids).logits)
        assert model(ids).past_key_values is not None


def test_with_labels_further_arguments_are_refused():
    ids = blocks()
    with pytest.raises(TypeError, match="attention_mask"):
        build()(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))


# Under bf16 each micro-batch rounds its part of a weight's gradient, to 2^-9 of each number.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_micro_batches_add_up_to_the_whole_batch(dtype, tolerance):
    model, ids = build(penalty_weight=0.1), blocks(m=5)
    precision = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    with precision():
        whole = model(input_ids=ids, labels=ids)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    total = 5 * (T - 1)
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        with precision():
            parts.append(model(input_ids=ids[rows], labels=ids[rows], num_items_in_batch=total))
        parts[-1].loss.backward()
    for added, expected_value in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(added), expected_value)
    for name, gradient in gradients(model).items():
        error = relative_error(without_key_bias(name, gradient), without_key_bias(name, expected[name]))
        assert error < tolerance, (name, error)


def test_gradients_are_dense_and_repeatable():
    results = []
    for _ in range(2):
        model, ids = build(), blocks()
        ids[:] = ids[:1]  # the same ids in several rows: their embedding's gradients are summed
        model(input_ids=ids, labels=ids).loss.backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        assert gradient.layout == torch.strided
        assert torch.equal(gradient, results[1][name]), name


def test_a_step_never_reads_a_tensor_of_the_device():
    model = build().to("meta")
    ids = blocks().to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.transformer.parameters())


def test_no_logits_of_the_batch_are_built(monkeypatch):
    model, ids = build(), blocks()
    monkeypatch.setattr(model.lm_head, "forward", None)  # called, it raises
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build().state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = build().state_dict()
    other = build(seed=RECIPE.seed + 1).state_dict()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_the_configuration_is_gpt2s_but_for_the_recipe():
    model = build(dropout=0.2)
    expected = GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_layer=3,
        n_head=4,
        n_embd=32,
        resid_pdrop=0.2,
        embd_pdrop=0.2,
        attn_pdrop=0.2,
        bos_token_id=V - 1,
        eos_token_id=V - 1,
        activation_function="gelu_pytorch_tanh",
    )
    assert model.config.to_diff_dict() == expected.to_diff_dict()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.training and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    assert build_model(RECIPE, 50257, 50256).num_parameters() == 50257 * 32 + T * 32 + 3 * (12 * 32**2 + 13 * 32) + 64


def test_initialisation_follows_gpt2():
    model = build(n_embd=64)
    for name, parameter in model.transformer.named_parameters():
        std = 0.02 / math.sqrt(6) if "c_proj.weight" in name else 0.02
        if name.endswith("bias"):
            assert torch.all(parameter == 0)
        elif "ln_" in name:
            assert torch.all(parameter == 1)
        else:
            assert abs(parameter.std().item() / std - 1) < 0.05


def test_a_wrong_initialisation_is_refused_with_an_explanation():
    model = build(n_embd=64)
    with torch.no_grad():
        for block in model.transformer.h:  # as in some releases of transformers 5
            block.attn.c_proj.weight.normal_(std=0.02)
            block.mlp.c_proj.weight.normal_(std=0.02)
        model.transformer.h[1].ln_1.weight.fill_(0.9)
    with pytest.raises(RuntimeError) as error:
        check_initialisation(model)
    message = str(error.value)
    assert "attn.c_proj.weight: standard deviation 0.0" in message and "mlp.c_proj.weight" in message
    assert f"expected {0.02 / math.sqrt(6):.5f}" in message and transformers.__version__ in message
    assert "h.1.ln_1.weight" in message and "c_fc" not in message


def test_the_saved_model_is_an_ordinary_gpt2(tmp_path):
    model = build(penalty_weight=0.1, dropout=0.1)
    state_dict = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["activation_function"] == "gelu_new"
    assert config["vocab_size"] == V
    assert not [key for key in config if "penalty" in key]
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.transformer.wte.weight.shape == (V, 32) and loaded.lm_head.weight is loaded.transformer.wte.weight
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name])
    with torch.no_grad():
        torch.testing.assert_close(loaded(blocks()).logits, model.eval()(blocks()).logits, atol=1e-5, rtol=1e-5)
    assert model.config.activation_function == "gelu_pytorch_tanh"  # saving changed nothing


def test_a_state_that_is_not_whole_is_not_saved(tmp_path):
    model = build()
    state_dict = model.state_dict()
    del state_dict["transformer.ln_f.bias"]
    with pytest.raises(RuntimeError, match=r"ln_f\.bias"):
        model.save_pretrained(tmp_path, state_dict=state_dict)


def test_training_continues_from_saved_weights(tmp_path):
    model, ids = build(), blocks()
    model.save_pretrained(tmp_path)
    loaded = build(init_from=str(tmp_path), seed=99, penalty_type="neg_entropy", penalty_weight=0.2)
    assert loaded.config.activation_function == "gelu_pytorch_tanh" and loaded.training
    assert (loaded.penalty_type, loaded.penalty_weight) == ("neg_entropy", 0.2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert torch.equal(model(input_ids=ids, labels=ids).loss, loaded(input_ids=ids, labels=ids).ce_loss)


def test_weights_of_another_shape_are_refused_with_every_difference(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        build(init_from=str(tmp_path), n_layer=2, n_embd=64, n_head=8, block_size=T // 2)
    for difference in ("n_layer is 2", "n_embd is 64", "n_head is 8", f"block_size is {T // 2}"):
        assert difference in str(error.value)
    with pytest.raises(InputError, match=rf"vocabulary.* is {V + 1} .* {V} "):
        build_model(dataclasses.replace(RECIPE, init_from=str(tmp_path)), V + 1, 0)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(InputError, match="activation_function is relu"):
        build(init_from=str(tmp_path))


def test_weights_that_are_not_there_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"init_from .*nowhere"):
        build(init_from=str(tmp_path / "nowhere"))
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="init_from"):
        build(init_from=str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(InputError, match="llama"):
        build(init_from=str(tmp_path))


def test_activation_checkpointing_gives_the_same_gradients():
    model, checkpointed, ids = build(), build(gradient_checkpointing=True), blocks()
    recomputed = []
    checkpointed.transformer.h[0].ln_1.register_forward_hook(lambda *_: recomputed.append(1))
    for one in (model, checkpointed):
        one(input_ids=ids, labels=ids).loss.backward()
    assert len(recomputed) == 2
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(checkpointed)[name]), name


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps the first precision asked for in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_under_accelerates_autocast_products_are_bfloat16_and_results_float32(fresh_accelerate):
    model, ids = build(), blocks()
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
    output = prepared(input_ids=ids, labels=ids)
    output.loss.backward()
    for value, expected_value in zip(output, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, expected_value) < 2e-2
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert (
            relative_error(without_key_bias(name, gradient), without_key_bias(name, expected_gradients[name])) < 5e-2
        )


def test_no_warning_of_transformers_is_printed(capfd):
    transformers.logging.set_verbosity_warning()
    model, ids = build(gradient_checkpointing=True), blocks()
    model(input_ids=ids, labels=ids).loss.backward()
    assert "loss_type" not in capfd.readouterr().err


def test_the_saved_folder_works_in_a_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(V - 1)} | {"<|endoftext|>": V - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert generate("w1 w2", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("w1 w2")


def _gradients_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    own = blocks()[rank::2]
    for kind in ("fsdp2", "ddp"):
        model = build(penalty_weight=0.1)
        wrapped = model
        if kind == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for block in model.transformer.h:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert isinstance(model.transformer.wte.weight, DTensor)
        wrapped(input_ids=own, labels=own, num_items_in_batch=4 * (T - 1)).loss.backward()
        grads = {n: p.grad.full_tensor() if kind == "fsdp2" else p.grad for n, p in model.named_parameters()}
        if rank == 0:
            torch.save(grads, f"{folder}/{kind}.pt")
    dist.destroy_process_group()
    os._exit(0)  # DDP keeps threads of gloo, which would abort an interpreter that ends before them


def test_sharded_and_replicated_models_give_the_same_gradients(tmp_path):
    mp.spawn(_gradients_of_two_processes, (str(tmp_path),), nprocs=2)
    model, ids = build(penalty_weight=0.1), blocks()
    model(input_ids=ids, labels=ids).loss.backward()
    for kind in ("fsdp2", "ddp"):
        actual = torch.load(tmp_path / f"{kind}.pt")
        for name, gradient in gradients(model).items():
            # Both take the mean over the two processes of what here is a sum.
            own, expected = without_key_bias(name, actual[name] * 2), without_key_bias(name, gradient)
            assert relative_error(own, expected) < 1e-5, (kind, name)
