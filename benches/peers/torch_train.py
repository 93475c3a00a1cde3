#!/usr/bin/env python3
"""PyTorch's train step on the shapes of benches/train_step.rs, as good as plain PyTorch makes it on CPU threads or a GPU.

    pip install torch
    python benches/peers/torch_train.py --size 30m --dtype bf16 --compile
    python benches/peers/torch_train.py --device cuda --size 1b --dtype bf16 --seq-len 4096 --compile

The Nemotron block (LayerNorm with 1 + gain and a bias, half the head rotated, grouped queries, squared ReLU, untied embeddings)
out of scaled_dot_product_attention, layer_norm and fused AdamW. A step: forward, backward, clipping by the global norm, update
of f32 weights; with bf16, matrix products and attention run in bf16 by autocast. Prints one line of JSON: the median step in
seconds, tokens/s, and the losses, which must start near ln(vocabulary) and fall.
"""
import argparse
import json
import math
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

# hidden, layers, query heads, kv heads, head dim, ffn, vocabulary
SIZES = {
    "30m": (384, 10, 6, 2, 64, 1536, 16384),
    "120m": (768, 12, 12, 4, 64, 3072, 32000),
    "1b": (2048, 20, 16, 8, 128, 8192, 32000),
    "1b-d192": (2304, 18, 12, 4, 192, 9216, 32000),
}
INIT_STD, EPS, ROPE_BASE = 0.02, 1e-5, 10000.0


class LayerNorm1P(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x):
        return functional.layer_norm(x, self.gain.shape, self.gain + 1, self.bias, EPS)


class Rotary(nn.Module):
    """Rotates the first half of each head, pairs (i, i + n/2) of its n dims."""

    def __init__(self, head_dim, seq_len):
        super().__init__()
        n = head_dim // 2
        angles = torch.outer(torch.arange(seq_len), ROPE_BASE ** (-torch.arange(0, n, 2) / n))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, heads):  # [batch, heads, T, D]
        half = self.cos.shape[1]
        a, b, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
        cos, sin = self.cos.to(heads.dtype), self.sin.to(heads.dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Block(nn.Module):
    def __init__(self, hidden, n_heads, n_kv_heads, head_dim, ffn):
        super().__init__()
        self.head_dim, self.widths = head_dim, [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim]
        self.attention_norm, self.mlp_norm = LayerNorm1P(hidden), LayerNorm1P(hidden)
        self.qkv = nn.Linear(hidden, sum(self.widths), bias=False)
        self.out = nn.Linear(self.widths[0], hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def attention(self, x, rotary):
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split(self.widths, dim=-1))
        mixed = functional.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x, rotary):
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.down(functional.relu(self.up(self.mlp_norm(x))).square())


class Decoder(nn.Module):
    def __init__(self, hidden, n_layers, n_heads, n_kv_heads, head_dim, ffn, vocab, seq_len):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab, bias=False)
        self.rotary = Rotary(head_dim, seq_len)
        self.blocks = nn.ModuleList(Block(hidden, n_heads, n_kv_heads, head_dim, ffn) for _ in range(n_layers))
        self.norm = LayerNorm1P(hidden)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=INIT_STD)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary)
        return functional.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def adamw(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=SIZES, default="30m")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward and its backward")
    parser.add_argument("--threads", type=int, help="default: one a core that this process may use")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = SIZES[args.size]
    model = Decoder(*sizes, args.seq_len).to(args.device)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    optimizer, forward = adamw(model), torch.compile(model) if args.compile else model
    sample = torch.randint(0, sizes[-1], (args.sequences, args.seq_len + 1), device=args.device)
    seconds, losses = [], []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = forward(sample[:, :-1], sample[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        wait()
        seconds.append(time.perf_counter() - start)
    assert abs(losses[0] - math.log(sizes[-1])) < 1 and losses[-1] < losses[0], f"the model does not learn: {losses}"
    step_s = statistics.median(seconds[args.warmup:])
    result = {
        "peer": f"torch {torch.__version__}", "size": args.size, "dtype": args.dtype, "compile": args.compile,
        "device": args.device, "threads": torch.get_num_threads(), "n_params": sum(p.numel() for p in model.parameters()),
        "step_s": round(step_s, 4), "tokens_per_s": round(args.sequences * args.seq_len / step_s, 1),
        "first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
