"""GPT-2 in plain PyTorch, without transformers: the yardstick of `scripts/benchmark.py` and of the tests.

Everything is done the usual way: linear layers, `scaled_dot_product_attention`, `gelu`, all logits at once and
`cross_entropy`. Parameter names are those of `GPT2LMHeadModel` (with its linear weights transposed, see `load_gpt2`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        m, T, D = x.shape
        q, k, v = (part.view(m, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(D, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(m, T, D))


class MLP(nn.Module):
    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT2(nn.Module):
    """forward(input_ids [m, T] int64) is the mean cross-entropy of the m (T - 1) next tokens."""

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x[:, :-1]), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())

    @torch.no_grad()
    def load_gpt2(self, state_dict: dict[str, Tensor]) -> "PlainGPT2":
        """Copies the weights of a `GPT2LMHeadModel`, whose Conv1D layers hold them as [in, out]."""
        for name, parameter in self.named_parameters():
            source = state_dict[f"transformer.{name}"]
            transposed = ".c_" in name and name.endswith("weight")
            parameter.copy_(source.t() if transposed else source)
        return self
