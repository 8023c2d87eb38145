"""Loss and perplexity as a metric of the library `evaluate`. Import it where it is used: that library's imports take
seconds in a process that has not imported transformers' models yet."""

import math
import tempfile

import datasets
import evaluate


class Perplexity(evaluate.Metric):
    """Mean negative log-likelihood in nats per token, and its exponential, of parts of any size, each token with the
    same weight: `add(nll_sum=..., n_tokens=...)` for each part, or `add_batch` with lists, then `compute()`.

    Local: nothing is loaded from the Hub, and no file is written (but `evaluate` insists on a folder)."""

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, cache_dir=tempfile.gettempdir(), **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Token-weighted negative log-likelihood and perplexity",
            citation="",
            inputs_description="nll_sum: summed negative log-likelihood in nats; n_tokens: how many tokens it is of",
            features=datasets.Features({"nll_sum": datasets.Value("float64"), "n_tokens": datasets.Value("int64")}),
        )

    def _compute(self, nll_sum: list[float], n_tokens: list[int]) -> dict[str, float]:
        tokens = sum(n_tokens)
        if tokens == 0:
            raise ValueError("n_tokens: 0 in all; there is no loss of no token")
        loss = math.fsum(nll_sum) / tokens
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf, "n_tokens": tokens}
