#!/usr/bin/env python3
"""Decode steps and prompts of benches/decode.rs beside llama.cpp and transformers, on the same Llama-shaped models with random weights
(RMSNorm, SwiGLU, rotary positions, grouped queries, no biases, untied embeddings), all sides in turn, the best round of each.

    pip install torch transformers gguf cffi llama-cpp-py-sync
    python benches/peers/decode.py --sizes 30m 120m --weights f32 bf16 int8 --what 1 8 16 32 512 [--llama FOLDER]

A number up to 32 is that many sequences of 64 tokens that go on by one token a step; a larger one is a prompt. llama.cpp is called by
its C interface: llama_decode alone, without choosing tokens; `int8` is its q8_0, computed from as its own formats go. FOLDER holds
its libraries where those of the package were built without this machine's instructions (the npm package
@node-llama-cpp/linux-x64 has one for each kind of processor): the declarations must be those of the same release. transformers is
`generate`, greedy, in the dtype of the weights; it has no int8 here. Ours chooses the most likely token of each row.

Prints a markdown table: tokens/s of each and ours over theirs.
"""
import argparse
import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy
import torch
import transformers

# hidden, layers, query heads, kv heads, head dim, feed-forward, vocabulary
SIZES = {"30m": (384, 10, 6, 2, 64, 1024, 16384), "120m": (768, 12, 12, 4, 64, 2048, 32000)}
PAST, STEPS, MOST_SEQUENCES = 64, 48, 32
ROOT = pathlib.Path(__file__).resolve().parents[2]


def ours(bench, size, weights, what):
    """tokens/s by the table of the bench, an executable or cargo's."""
    name = str(what) if what <= MOST_SEQUENCES else "prompts"
    label = str(what) if what <= MOST_SEQUENCES else f"prompt of {what}"
    command = [bench] if bench else ["cargo", "bench", "--quiet", "--bench", "decode", "--"]
    table = subprocess.run([*command, size, weights, name], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if cells[1:4] == [size, weights, label]:
            return float(cells[5])
    raise SystemExit(f"no line for {size} {weights} {label} in:\n{table}")


def write_gguf(path, size, weights):
    import gguf

    hidden, layers, heads, kv_heads, head_dim, ffn, vocab = SIZES[size]
    kind = {"f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16, "int8": gguf.GGMLQuantizationType.Q8_0}[weights]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    noise = numpy.random.default_rng(1)

    def matrix(name, rows, columns):
        values = (0.02 * noise.standard_normal((rows, columns))).astype(numpy.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, numpy.ones(hidden, numpy.float32))

    matrix("token_embd.weight", vocab, hidden)
    for layer in range(layers):
        at = f"blk.{layer}"
        norm(f"{at}.attn_norm.weight")
        norm(f"{at}.ffn_norm.weight")
        for name, rows, columns in [
            ("attn_q", heads * head_dim, hidden), ("attn_k", kv_heads * head_dim, hidden), ("attn_v", kv_heads * head_dim, hidden),
            ("attn_output", hidden, heads * head_dim), ("ffn_gate", ffn, hidden), ("ffn_up", ffn, hidden), ("ffn_down", hidden, ffn),
        ]:
            matrix(f"{at}.{name}.weight", rows, columns)
    norm("output_norm.weight")
    matrix("output.weight", vocab, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A GGUF file in llama.cpp, by its C interface."""

    def __init__(self, folder):
        package = pathlib.Path(importlib.util.find_spec("llama_cpp_py_sync").origin).parent
        spec = importlib.util.spec_from_file_location("llama_declarations", package / "_cffi_bindings.py")
        declarations = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(declarations)
        self.ffi = declarations.ffi
        folder = pathlib.Path(folder) if folder else package
        # Symbols of the others are looked for in what is loaded already.
        for name in ["libggml-base.so*", "libggml.*so*"]:
            for path in sorted(folder.glob(name))[:1]:
                loaded = self.ffi.dlopen(str(path), self.ffi.RTLD_NOW | self.ffi.RTLD_GLOBAL)
                setattr(self, "keep_" + path.name.replace(".", "_"), loaded)
        path = sorted(path for path in folder.glob("libllama.*so*") if path.is_file())[0]
        self.lib = self.ffi.dlopen(str(path), self.ffi.RTLD_NOW | self.ffi.RTLD_GLOBAL)
        plain = type(self.ffi)()
        plain.cdef("void ggml_backend_load_all_from_path(const char *); void llama_log_set(void *, void *);")
        backends = plain.dlopen(str(sorted(folder.glob("libggml.*so*"))[0]))
        with quiet():
            backends.ggml_backend_load_all_from_path(str(folder).encode())
            self.lib.llama_backend_init()
        print("llama.cpp:", self.ffi.string(self.lib.llama_print_system_info()).decode(), file=sys.stderr)

    def open(self, path, n_sequences, n_threads):
        with quiet():
            self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
            assert self.model != self.ffi.NULL, f"llama.cpp does not load {path}"
            params = self.lib.llama_context_default_params()
            assert params.n_batch == 2048 and params.n_ubatch == 512, "the declarations are not those of this library"
            params.n_ctx, params.n_seq_max = max(n_sequences * 1024, 4096), n_sequences
            params.n_threads = params.n_threads_batch = n_threads
            self.context = self.lib.llama_init_from_model(self.model, params)
            assert self.context != self.ffi.NULL, "llama.cpp has no context"
        self.batch = self.lib.llama_batch_init(2048, 0, 1)

    def close(self):
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def forget(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, rows):
        """rows of (token, position, sequence); logits of the last row of each sequence."""
        last = {sequence: i for i, (_, _, sequence) in enumerate(rows)}
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, position, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = sequence, last[sequence] == i
        status = self.lib.llama_decode(self.context, self.batch)
        assert status == 0, f"llama_decode: {status}"
        self.lib.llama_synchronize(self.context)

    def steps_per_s(self, n):
        self.forget()
        for sequence in range(n):
            self.decode([(i + 1, i, sequence) for i in range(PAST)])
        times = []
        for step in range(2 * STEPS):
            rows = [(7 + step, PAST + step, sequence) for sequence in range(n)]
            started = time.perf_counter()
            self.decode(rows)
            times.append(time.perf_counter() - started)
        return n * STEPS / sum(times[STEPS:])

    def prompt_per_s(self, n):
        times = []
        for _ in range(3):
            self.forget()
            started = time.perf_counter()
            self.decode([(i + 1, i, 0) for i in range(n)])
            times.append(time.perf_counter() - started)
        return n / min(times)


class Transformers:
    """The same shape in transformers."""

    def __init__(self, size, weights):
        hidden, layers, heads, kv_heads, head_dim, ffn, vocab = SIZES[size]
        config = transformers.LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=4096, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=None, pad_token_id=0)
        torch.manual_seed(1)
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[weights]
        self.model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()

    def steps_per_s(self, n):
        tokens = torch.arange(1, PAST + 1).repeat(n, 1)

        def seconds(new):
            started = time.perf_counter()
            out = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)
            assert out.shape == (n, PAST + new), out.shape
            return time.perf_counter() - started

        seconds(2)
        return n * STEPS / (seconds(STEPS + 1) - seconds(1))

    def prompt_per_s(self, n):
        tokens = torch.arange(1, n + 1)[None]
        times = []
        for _ in range(4):
            started = time.perf_counter()
            self.model(tokens, logits_to_keep=1)
            times.append(time.perf_counter() - started)
        return n / min(times)


@contextlib.contextmanager
def quiet():
    """Without what libraries write to stderr."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def best(engine, what):
    rate = engine.steps_per_s if what <= MOST_SEQUENCES else engine.prompt_per_s
    with torch.inference_mode():
        return rate(what)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["30m", "120m"])
    parser.add_argument("--weights", nargs="+", choices=["f32", "bf16", "int8"], default=["f32", "bf16", "int8"])
    parser.add_argument("--what", nargs="+", type=int, default=[1, 8, 16, 32, 512], help="sequences, or tokens of a prompt (128, 512)")
    parser.add_argument("--llama", help="a folder with llama.cpp's libraries; default: those of the package")
    parser.add_argument("--ours", help="the bench's executable, target/release/deps/decode-*; default: by cargo")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llama = LlamaCpp(args.llama)
    print("| model | weights | what | ours | llama.cpp | transformers | ours / llama.cpp | ours / transformers |", flush=True)
    print("|---|---|---|---:|---:|---:|---:|---:|", flush=True)
    for size in args.sizes:
        for weights in args.weights:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "model.gguf"
                write_gguf(path, size, weights)
                llama.open(path, MOST_SEQUENCES, args.threads)
                torch_model = None if weights == "int8" else Transformers(size, weights)
                for what in args.what:
                    rates = [0.0, 0.0, 0.0]
                    for _ in range(args.rounds):
                        rates[0] = max(rates[0], ours(args.ours, size, weights, what))
                        rates[1] = max(rates[1], best(llama, what))
                        if torch_model:
                            rates[2] = max(rates[2], best(torch_model, what))
                    label = f"{what} sequences" if what <= MOST_SEQUENCES else f"prompt of {what}"
                    theirs = [f"{rate:.0f}" if rate else "-" for rate in rates[1:]]
                    ratios = [f"{rates[0] / rate:.2f}" if rate else "-" for rate in rates[1:]]
                    print("|", " | ".join([size, weights, label, f"{rates[0]:.0f}", *theirs, *ratios]), "|", flush=True)
                llama.close()


if __name__ == "__main__":
    main()
