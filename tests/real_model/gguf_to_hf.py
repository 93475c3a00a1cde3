#!/usr/bin/env python3
"""A Llama-shaped GGUF file as a Hugging Face directory: gguf_to_hf.py FILE.gguf OUT_DIR

    pip install gguf numpy safetensors

Writes config.json, model.safetensors (bf16), tokenizer.json (byte-level BPE) and chat_template.jinja. Quantised weights are
widened to f32 and rounded to bf16. llama.cpp stores query and key rows in pairs (2i, 2i + 1) of a head for its rotation; Hugging
Face's order has the two halves of a head one after the other.
"""
import json
import pathlib
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's token types.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def value(reader, key, default=None):
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def unpaired(rows, n_heads):
    """[heads * (dim / 2) * 2, in], pairs side by side -> both halves of a head one after the other."""
    pairs = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_bf16(x):
    """float32 -> the upper halves, rounded to nearest even, as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            file.write(bits.tobytes())


def tokenizer(reader):
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    merges = [merge.split(" ") for merge in value(reader, "tokenizer.ggml.merges")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": kind == CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types)) if kind in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
        },
    }


def main(source, out):
    out = pathlib.Path(out)
    out.mkdir(parents=True)
    reader = GGUFReader(source)
    arch = value(reader, "general.architecture")
    assert arch == "llama", f"{arch}: only llama"
    key = lambda name, default=None: value(reader, f"{arch}.{name}", default)
    n_heads, n_kv_heads, hidden = key("attention.head_count"), key("attention.head_count_kv"), key("embedding_length")
    tensors = {}
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        name = NAMES.get(tensor.name)
        if name is None:
            _, block, part, _ = tensor.name.split(".")
            name = f"model.layers.{block}.{BLOCK_NAMES[part]}.weight"
            if part in ("attn_q", "attn_k"):
                weights = unpaired(weights, n_heads if part == "attn_q" else n_kv_heads)
        tensors[name] = to_bf16(weights)
    write_safetensors(out / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": key("feed_forward_length"), "num_hidden_layers": key("block_count"), "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads, "head_dim": key("rope.dimension_count", hidden // n_heads),
        "rms_norm_eps": float(f"{key('attention.layer_norm_rms_epsilon'):.6g}"), "rope_theta": float(key("rope.freq_base")),
        "max_position_embeddings": key("context_length"), "vocab_size": len(value(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": "lm_head.weight" not in tensors, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
        "bos_token_id": value(reader, "tokenizer.ggml.bos_token_id"), "eos_token_id": value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": value(reader, "tokenizer.ggml.padding_token_id"),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "tokenizer.json").write_text(json.dumps(tokenizer(reader), ensure_ascii=False))
    template = value(reader, "tokenizer.chat_template")
    if template:
        (out / "chat_template.jinja").write_text(template)
    print(f"{len(tensors)} tensors, {sum(bits.size for bits in tensors.values())} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
