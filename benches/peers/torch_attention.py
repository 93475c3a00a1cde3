#!/usr/bin/env python3
"""The peer for attention: scaled_dot_product_attention of PyTorch (cuDNN or FlashAttention, whichever is faster), bf16, causal,
grouped queries, at the shapes of benches/gpu.rs. Packed sequences of one length are a batch. Prints markdown rows: TFLOP/s by the
causal pairs (backward 2.5 times the forward), over a matrix product measured in turn.

  torch_attention.py TOKENS QUERY_HEADS,KV_HEADS,DIM ..
"""
import sys
import time
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SIDE = 8192
LEAST_S = 0.02


def seconds(work):
    n = 1
    while True:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            work()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        if elapsed >= LEAST_S:
            return elapsed / n
        n = min(1000, max(2, int(1.3 * LEAST_S / max(elapsed, 1e-6) * n) + 1))


def rates(backend, tokens, sequences, heads, product):
    query, kv, dim = heads
    length = tokens // sequences
    shape = lambda n: (sequences, n, length, dim)
    q, k, v = (torch.randn(shape(n), device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (query, kv, kv))
    dout = torch.randn(shape(query), device="cuda", dtype=torch.bfloat16)
    flops = 4.0 * sequences * (length * (length + 1) // 2) * query * dim
    with sdpa_kernel([backend]):
        attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=query != kv)
        out = attend()
        backward = lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        best, ceiling = [0.0, 0.0], 0.0
        for _ in range(3):
            ceiling = max(ceiling, 2.0 * SIDE**3 / seconds(product))
            with torch.no_grad():
                best[0] = max(best[0], flops / seconds(attend))
            best[1] = max(best[1], 2.5 * flops / seconds(backward))
    return best, ceiling


def main():
    tokens, shapes = int(sys.argv[1]), [tuple(int(n) for n in arg.split(",")) for arg in sys.argv[2:]]
    a, b = (torch.rand(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) - 0.5 for _ in range(2))
    product = lambda: a @ b.T
    for heads in shapes:
        for sequences in (1, 8):
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                name = f"torch {torch.__version__} {backend.name}"
                try:
                    best, ceiling = rates(backend, tokens, sequences, heads, product)
                except RuntimeError as error:
                    print(f"| {name} | attention | {sequences} sequences heads {heads} | not run: {str(error).splitlines()[0]} | | |")
                    continue
                for operation, rate in zip(("attention", "attention_backward"), best):
                    row = f"{rate / 1e12:.1f} | {ceiling / 1e12:.1f} | {rate / ceiling:.2f}"
                    print(f"| {name} | {operation} | {sequences} sequences heads {heads} | {row} |", flush=True)


if __name__ == "__main__":
    main()
