"""The training steps that gptray's is compared with: nanoGPT's and transformers'."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train import Shape as TrainShape
from train import hf_network

Step = Callable[[], None]
# (n_layer, n_head, n_embd, block size)
Shape = tuple[int, int, int, int]


class Block(nn.Module):
    """GPT-2's block: pre-norm attention and MLP."""

    def __init__(self, n_head: int, n_embd: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.up, self.down = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(self.ln_1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        out: Tensor = x + self.down(F.gelu(self.up(self.ln_2(x))))
        return out


class NanoGPT(nn.Module):
    """GPT-2 with a tied head; forward returns the loss, from all logits at once."""

    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        n_layer, n_head, n_embd, block_size = shape
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_head, n_embd) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class TransformersGPT2(nn.Module):
    """transformers' GPT-2 with the same signature of forward."""

    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        self.model = hf_network(TrainShape(*shape, batch_size=1, vocab_size=vocab_size))

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(idx, labels=idx).loss  # transformers shifts the labels
        return loss


def peer_step(
    model: nn.Module, rows: int, block_size: int, device: torch.device, *, compiled: bool
) -> Step:
    """A step of either: autocast to bf16, clipping, fused AdamW, without reading the loss."""
    model.to(device).train()
    loss_of = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(50257, (rows, block_size + 1), device=device)
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
