import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from clm_owt.errors import InputError
from clm_owt.evaluation.windows import cut_windows, evaluate_windows


@pytest.mark.parametrize(("length", "context", "stride"), [(50, 8, 3), (50, 8, 7), (8, 8, 3), (5, 8, 3), (17, 8, 1)])
def test_strided_windows_predict_every_token_but_the_first_once_and_with_context(length, context, stride):
    ids = np.arange(length)
    predicted = []
    for window, new in cut_windows(ids, context, stride):
        assert len(window) <= context
        predicted += window[-new:].tolist()
        first = window[-new]
        assert first - window[0] >= min(first, context - stride)
    assert predicted == list(range(1, length))


def test_windows_without_a_stride_lie_end_to_end():
    windows = [(window.tolist(), new) for window, new in cut_windows(np.arange(10), 4, None)]
    assert windows == [([0, 1, 2, 3], 3), ([4, 5, 6, 7], 3), ([8, 9], 1)]


def test_a_stride_that_leaves_no_context_is_refused():
    with pytest.raises(InputError, match="--stride: 8 leaves no context in windows of 8 tokens"):
        list(cut_windows(np.arange(50), 8, 8))


def test_a_model_is_evaluated_on_windows_of_different_lengths_as_on_each_alone():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)).eval()
    windows = list(cut_windows(np.random.RandomState(1).randint(0, 50, 21), 8, 3))
    result = evaluate_windows(model, windows, batch_size=4)
    sums, model = [], model.double()
    with torch.no_grad():
        for ids, new in windows:
            ids = torch.from_numpy(ids)
            losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            sums += losses[-new:].tolist()
    assert result["n_tokens"] == len(sums) == 20
    assert result["loss"] == pytest.approx(np.mean(sums), rel=1e-6)
