"""The fused loss against the plain formulas, on logits that are known exactly.

With hidden states that are the identity, the logits are the transposed weight bit for bit, so that any logits can be
given and the gradient of the weight is the gradient of the logits.
"""

import functools
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clm_owt.model.losses import (
    LossStatistics,
    compiled_softmax,
    fused_linear_loss,
    reference_linear_loss,
    softmax_and_gradient,
)
from clm_owt.recipe import PENALTY_TYPES

V = 203
# The two forms of the softmax: in place, and as a function, which is what is compiled for a GPU.
FORMS = {"in place": fused_linear_loss, "function": functools.partial(fused_linear_loss, softmax=softmax_and_gradient)}
both_forms = pytest.mark.parametrize("loss_function", FORMS.values(), ids=FORMS.keys())
WEIGHTS = (0.0, 0.01, 1.0, -0.1)


def random_inputs(N=37, D=24, V=V, dtype=torch.float32, ignored=5, spread=1.0):
    generator = torch.Generator().manual_seed(N * V)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * spread
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[:ignored]] = -100
    return hidden.to(dtype), weight.to(dtype), targets


def with_gradients(function, hidden, weight, targets, **options):
    """The five outputs and the gradients of hidden and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    output = function(hidden, weight, targets, **options)
    output.loss.backward()
    return [*(value.detach() for value in output), hidden.grad, weight.grad]


def assert_close(actual, expected, tolerance, absolute=1e-9):
    """By norm, relative; and an absolute allowance for what is 0 but for the rounding of the reference."""
    for name, a, e in zip((*LossStatistics._fields, "grad_hidden", "grad_weight"), actual, expected, strict=True):
        error = (a.double() - e.double()).norm()
        assert error <= tolerance * e.double().norm() + absolute, f"{name}: {error:.3g} of {e.double().norm():.3g}"


def exact_logits(kind: str) -> torch.Tensor:
    """Logits [N, V] float32 of one kind."""
    generator = torch.Generator().manual_seed(1)
    N = 29
    logits = torch.randn(N, V, generator=generator)
    if kind == "wide":
        logits *= 20
    elif kind == "extreme":
        logits = (torch.rand(N, V, generator=generator) * 2 - 1) * 1e4
    elif kind == "ties":
        logits = logits.clamp(max=1.5).round(decimals=1)
        logits[0] = 0.0
    elif kind == "saturated":
        logits[:, 7] += 18
    return logits


@both_forms
@pytest.mark.parametrize("kind", ["usual", "wide", "extreme", "ties", "saturated"])
@pytest.mark.parametrize("penalty_type", PENALTY_TYPES)
def test_equals_float64_on_the_same_logits(penalty_type, kind, loss_function):
    logits = exact_logits(kind)
    N = len(logits)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    targets[::2] = logits[::2].argmax(-1)
    targets[3] = -100
    hidden, weight = torch.eye(N), logits.t().contiguous()
    ks = (1, 5, V, V + 10) if penalty_type == "top_k_mass" else (5,)
    for penalty_weight, k, chunk_rows in itertools.product(WEIGHTS, ks, (1, 10, N)):
        options = {
            "num_items": 31,
            "penalty_type": penalty_type,
            "penalty_weight": penalty_weight,
            "penalty_top_k": k,
        }
        actual = with_gradients(loss_function, hidden, weight, targets, **options, chunk_rows=chunk_rows)
        exact = weight.double()
        if loss_function is not fused_linear_loss:  # of equal logits it takes the first, where topk takes any
            exact = exact - 1e-12 * torch.arange(V, dtype=torch.float64)[:, None]
        expected = with_gradients(reference_linear_loss, hidden.double(), exact, targets, **options)
        assert actual[0].dtype == torch.float32
        assert_close(actual, expected, 1e-5)


@both_forms
def test_a_saturated_softmax_loses_no_digits(loss_function):
    # Where every target is the likeliest token by far, loss, penalty and gradient are what is left beside 1.
    logits = exact_logits("saturated")
    hidden, weight, targets = torch.eye(len(logits)), logits.t().contiguous(), torch.full((len(logits),), 7)
    for penalty_type in ("non_max_sum", "neg_entropy", "top_k_mass"):
        options = {"num_items": 29, "penalty_type": penalty_type, "penalty_weight": 1.0}
        actual = with_gradients(loss_function, hidden, weight, targets, **options)
        expected = with_gradients(reference_linear_loss, hidden.double(), weight.double(), targets, **options)
        assert expected[0] < 1e-3
        assert_close(actual, expected, 1e-5, absolute=0.0)


@both_forms
def test_the_same_index_is_taken_among_equal_maxima(loss_function):
    logits = torch.zeros(1, 6)
    logits[0, [2, 4]] = 1.0
    _, _, _, _, _, _, grad = with_gradients(
        loss_function, torch.eye(1), logits.t(), torch.tensor([0]), num_items=1, penalty_weight=1.0
    )
    _, _, _, _, _, _, expected = with_gradients(
        reference_linear_loss, torch.eye(1), logits.t(), torch.tensor([0]), num_items=1, penalty_weight=1.0
    )
    assert grad[2] != grad[4]
    torch.testing.assert_close(grad, expected)


@both_forms
@pytest.mark.parametrize("penalty_type", PENALTY_TYPES)
def test_gradients_pass_gradcheck_in_float64(penalty_type, loss_function):
    hidden, weight, targets = random_inputs(N=5, D=3, V=11, dtype=torch.float64, ignored=1)

    def loss(hidden, weight):
        return loss_function(
            hidden, weight, targets, num_items=4, penalty_type=penalty_type, penalty_weight=0.7, chunk_rows=2
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def test_backward_scales_by_any_incoming_gradient_and_keeps_what_was_saved():
    hidden, weight, targets = random_inputs()
    *_, grad_hidden, grad_weight = with_gradients(fused_linear_loss, hidden, weight, targets, num_items=32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = fused_linear_loss(hidden, weight, targets, num_items=32).loss
    for factor in (1.0, 65536.0, 0.5, 1.0):
        hidden.grad = weight.grad = None
        (loss * factor).backward(retain_graph=True)
        torch.testing.assert_close(hidden.grad, grad_hidden * factor)
        torch.testing.assert_close(weight.grad, grad_weight * factor)
        weight.grad.zero_()  # what the caller does with its gradient is not what was saved


class LargestTensor(TorchDispatchMode):
    """Watches every operation and keeps the number of elements of the largest storage, the bytes of the one with most,
    and the elements of all written so far."""

    def __init__(self):
        super().__init__()
        self.elements = self.bytes = 0
        self.outputs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes()
                self.elements = max(self.elements, size // tensor.element_size())
                self.bytes = max(self.bytes, size)
                self.outputs.append((str(function), tensor.numel()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_is_larger_than_one_chunk_of_logits(training, dtype):
    N, D, V, chunk_rows = 256, 8, 997, 16
    hidden, weight, targets = random_inputs(N, D, V)
    hidden.requires_grad_(training)
    weight.requires_grad_(training)
    for penalty_type in PENALTY_TYPES:
        options = {"num_items": N, "penalty_type": penalty_type, "penalty_weight": 0.1}
        with LargestTensor() as fused, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = fused_linear_loss(hidden, weight, targets, **options, chunk_rows=chunk_rows).loss
            if training:
                loss.backward()
        assert V * D < fused.elements <= chunk_rows * 1024  # rows are padded to 64 columns at most
        with LargestTensor() as usual:
            reference_linear_loss(hidden, weight, targets, **options)
        assert usual.elements == N * V


@pytest.mark.parametrize("penalty_type", PENALTY_TYPES)
def test_under_bfloat16_a_cpu_holds_no_chunk_of_logits_in_float32(penalty_type):
    hidden, weight, targets = random_inputs(N=64, D=8, V=997)
    options = {"penalty_type": penalty_type, "penalty_weight": 0.1, "chunk_rows": 64, "block_rows": 4}
    with LargestTensor() as fused, torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_loss(hidden.requires_grad_(), weight.requires_grad_(), targets, num_items=64, **options)
        loss.loss.backward()
    assert fused.bytes == 64 * 1024 * 2  # rows are padded to 64 columns


def test_on_a_cpu_the_head_gradient_is_not_copied_in_backward():
    hidden, weight, targets = random_inputs(N=9, D=16, V=1000)
    loss = fused_linear_loss(hidden.requires_grad_(), weight.requires_grad_(), targets, num_items=4).loss
    with LargestTensor() as backward:
        loss.backward()
    assert not [output for output in backward.outputs if output[1] >= weight.numel() and "detach" not in output[0]]
    assert weight.grad is not None


def test_evaluation_gives_the_same_numbers_and_no_gradient():
    hidden, weight, targets = random_inputs()
    training = fused_linear_loss(hidden.requires_grad_(), weight, targets, num_items=7, penalty_weight=0.3)
    with torch.no_grad():
        evaluation = fused_linear_loss(hidden, weight, targets, num_items=7, penalty_weight=0.3)
    assert torch.equal(torch.stack(training).detach(), torch.stack(evaluation))
    assert training.loss.requires_grad and not evaluation.loss.requires_grad
    assert not any(value.requires_grad for value in training[1:])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_changes_none(frozen):
    hidden, weight, targets = random_inputs()
    *_, grad_hidden, grad_weight = with_gradients(fused_linear_loss, hidden, weight, targets, num_items=9)
    free, expected = (weight, grad_weight) if frozen == "hidden" else (hidden, grad_hidden)
    free.requires_grad_()
    fused_linear_loss(hidden, weight, targets, num_items=9).loss.backward()
    assert torch.equal(free.grad, expected)
    assert (hidden if frozen == "hidden" else weight).grad is None


@pytest.mark.parametrize("kind", ["usual", "wide", "ties", "products"])
@pytest.mark.parametrize("penalty_type", PENALTY_TYPES)
def test_autocast_to_bfloat16_keeps_softmax_and_accumulation_in_float32(penalty_type, kind):
    if kind == "products":  # of inputs that bfloat16 has to round
        hidden, weight, targets = random_inputs(N=64, D=32, spread=0.25)
    else:  # logits that it holds exactly
        logits = exact_logits(kind).bfloat16().float()
        hidden, weight, targets = torch.eye(len(logits)), logits.t().contiguous(), torch.arange(len(logits))
    for penalty_weight in WEIGHTS:
        options = {"num_items": 59, "penalty_type": penalty_type, "penalty_weight": penalty_weight}
        with torch.autocast("cpu", torch.bfloat16):
            actual = with_gradients(fused_linear_loss, hidden, weight, targets, **options, chunk_rows=7)
        expected = with_gradients(reference_linear_loss, hidden.double(), weight.double(), targets, **options)
        assert all(tensor.dtype == torch.float32 for tensor in actual)
        assert_close(actual, expected, 2e-2)


def test_bfloat16_products_add_up_in_float32():
    # 400 chunks of one row each: sums kept in bfloat16 would stop growing at 256 times their terms.
    N, V = 400, 16
    hidden, weight, targets = torch.ones(N, 1), torch.zeros(V, 1), torch.zeros(N, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        *_, grad_weight = with_gradients(fused_linear_loss, hidden, weight, targets, num_items=1, chunk_rows=1)
    assert grad_weight[0].item() == -N * 15 / 16


def test_float16_gradients_do_not_underflow_under_a_large_number_of_items():
    hidden, weight, targets = random_inputs(N=64, D=32, spread=0.5)
    with torch.autocast("cpu", torch.float16):
        actual = with_gradients(fused_linear_loss, hidden, weight, targets, num_items=10**6)
    expected = with_gradients(reference_linear_loss, hidden.double(), weight.double(), targets, num_items=10**6)
    assert_close(actual, expected, 2e-2, absolute=0.0)


def test_micro_batches_add_up_whatever_the_type_of_the_number_of_items():
    hidden, weight, targets = random_inputs(N=40)
    total = 33
    whole = with_gradients(fused_linear_loss, hidden, weight, targets, num_items=total, penalty_weight=0.1)
    parts = [
        with_gradients(fused_linear_loss, hidden[rows], weight, targets[rows], num_items=num_items, penalty_weight=0.1)
        for rows, num_items in ((slice(0, 13), total), (slice(13, 40), torch.tensor(total)))
    ]
    summed = [first + second for first, second in zip(parts[0][:5], parts[1][:5], strict=True)]
    gradients = [torch.cat((parts[0][5], parts[1][5])), parts[0][6] + parts[1][6]]
    assert_close(summed + gradients, whole, 1e-6)


def test_only_ignored_targets_add_nothing():
    hidden, weight, targets = random_inputs()
    values = with_gradients(fused_linear_loss, hidden, weight, torch.full_like(targets, -100), num_items=9)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in values)


def test_nothing_reads_a_tensor_of_the_device():
    # Meta tensors have no values: whatever would wait for a device raises here.
    hidden, weight = torch.empty(40, 8, device="meta"), torch.empty(99, 8, device="meta")
    targets = torch.empty(40, dtype=torch.int64, device="meta")
    for penalty_type, num_items in itertools.product(PENALTY_TYPES, (40, torch.empty((), device="meta"))):
        *_, grad_weight = with_gradients(
            fused_linear_loss, hidden, weight, targets, num_items=num_items, penalty_type=penalty_type, chunk_rows=16
        )
        assert grad_weight.shape == weight.shape


@pytest.mark.parametrize(("round_logits", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_logits_are_rounded_where_that_is_asked_for(round_logits, dtype):
    hidden, weight, targets = random_inputs(dtype=torch.bfloat16)
    seen = []

    def watched(logits, *arguments, **settings):
        seen.append(logits.clone())
        return softmax_and_gradient(logits, *arguments, **settings)

    loss = fused_linear_loss(hidden, weight, targets, num_items=32, round_logits=round_logits, softmax=watched).loss
    logits = F.pad((hidden.float() @ weight.float().T), (0, 256 - V)).to(dtype)
    assert [z.dtype for z in seen] == [dtype]
    torch.testing.assert_close(seen[0], logits, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(seen[0][:, :V].float(), targets, reduction="sum") / 32)


@pytest.mark.slow  # compiles for a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("penalty_type", PENALTY_TYPES)
def test_compiled_and_uncompiled_softmax_agree(penalty_type):
    hidden, weight, targets = random_inputs(V=1003)
    options = {"num_items": 9, "penalty_type": penalty_type, "penalty_weight": 0.1, "chunk_rows": 16}
    expected = with_gradients(fused_linear_loss, hidden, weight, targets, **options)
    actual = with_gradients(fused_linear_loss, hidden, weight, targets, **options, softmax=compiled_softmax())
    assert_close(actual, expected, 1e-6)


def test_impossible_penalties_are_refused():
    hidden, weight, targets = random_inputs()
    for function in (fused_linear_loss, reference_linear_loss):
        with pytest.raises(ValueError, match=r"penalty_type 'max'.*non_max_sum"):
            function(hidden, weight, targets, num_items=1, penalty_type="max")
        with pytest.raises(ValueError, match="penalty_top_k 0"):
            function(hidden, weight, targets, num_items=1, penalty_type="top_k_mass", penalty_top_k=0)


def test_a_target_outside_of_the_vocabulary_is_an_error():
    hidden, weight, targets = random_inputs()
    for wrong in (V, -1):
        targets[0] = wrong
        with pytest.raises((IndexError, RuntimeError)):
            fused_linear_loss(hidden, weight, targets, num_items=1)
