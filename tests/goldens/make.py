#!/usr/bin/env python3
"""Golden files for tests/model_goldens.rs: tiny models of Hugging Face transformers, computed in float64.

    pip install torch transformers safetensors
    python tests/goldens/make.py

With names of variants as arguments, those alone; with "rope", the frequencies.

For each variant a folder with what transformers' save_pretrained writes (config.json, model.safetensors in float32) and
golden.safetensors: tokens [2, T+1], logits [2, T, V], loss (mean over all 2T targets), "grad.NAME" and "after.NAME" (weights
after three steps of clip_grad_norm_ 1.0 and torch.optim.AdamW lr 1e-2, betas 0.9/0.95, eps 1e-4, decay 0.1 on matrices only).
Weights are exact in float32, so both sides start from the same numbers; results are float64 rounded to float32.

The folder nemotron-reward is a NemotronForSequenceClassification of five attributes whose score layer has a bias (NeMo-Aligner's
reward head; transformers' own has none): tokens [3, T] and lengths [3], attributes [3, 5] at the last token of each sequence, labels
[3, 5] with NaN where there is none, loss (mean of the squared errors over all labels there are), and "grad.NAME".

SCALED are models whose rotary frequencies are scaled, on sequences three times as long as the "original" ones. Their whole forward runs
in float64: transformers' text says torch.float in places (frequencies, angles, norms, softmax), which is read as float64 here.

rope.json: what transformers' functions of frequencies give in float64 for a list of config.json: {"name", "config", "frequencies",
"attention_factor"}.
"""
import contextlib
import json
import pathlib
import sys
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, NemotronConfig, NemotronForCausalLM, NemotronForSequenceClassification
from transformers import modeling_rope_utils
from transformers.models.llama import modeling_llama
from transformers.models.nemotron import modeling_nemotron

HERE = pathlib.Path(__file__).parent
T = 12
T_SCALED = 24


class Float64Torch:
    """torch, whose float is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def in_float64():
    """What stands inside runs transformers' text with float64 where it says torch.float."""
    modules = [modeling_rope_utils, modeling_llama, modeling_nemotron]
    for module in modules:
        module.torch = Float64Torch()
    yield
    for module in modules:
        module.torch = torch


def nemotron_config(**changes):
    sizes = dict(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=32, hidden_act="relu2", norm_eps=1e-5, rope_theta=10000.0, partial_rotary_factor=0.5,
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False, attention_dropout=0.0, bos_token_id=2, eos_token_id=3,
    )
    sizes.update(changes)
    return NemotronConfig(**sizes)


def nemotron(**changes):
    return NemotronForCausalLM(nemotron_config(**changes))


def llama(**changes):
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=32, rms_norm_eps=1e-6, rope_theta=500.0, tie_word_embeddings=True, attention_bias=False,
    )
    sizes.update(changes)
    return LlamaForCausalLM(LlamaConfig(**sizes))


VARIANTS = {
    "nemotron-gqa": lambda: nemotron(),
    # head_dim != hidden / heads; one kv head for all queries.
    "nemotron-head-dim": lambda: nemotron(head_dim=12, num_key_value_heads=1, intermediate_size=12),
    # Four layers for two chunks on each of two stages, four kv heads for four tensor-parallel ranks.
    "nemotron-rotary-full": lambda: nemotron(
        head_dim=4, num_key_value_heads=4, partial_rotary_factor=1.0, num_hidden_layers=4, intermediate_size=12, vocab_size=23),
    "nemotron-tied": lambda: nemotron(tie_word_embeddings=True),
    "llama": llama,
}

# Of the four pairs of each head one is fast, one between and two are slow (llama3), or each is another share of the way (yarn).
ORIGINAL = {"original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 0.2, "high_freq_factor": 1.0, **ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 0.05, **ORIGINAL}
SCALED = {
    "llama-linear": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}),
    "llama-llama3": lambda: llama(rope_parameters={**LLAMA3, "rope_theta": 500.0}),
    "llama-yarn": lambda: llama(rope_parameters={**YARN, "rope_theta": 500.0}),
    # Half of each head of 16 turns; the ramp between whole dims, the attention factor by mscale.
    "nemotron-yarn": lambda: nemotron(head_dim=16, rope_parameters={
        **YARN, "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.3, "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
}


def randomise(model, generator):
    """Every parameter away from its special value (norm weights from 0 or 1, biases from 0), exact in float32."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if "norm" in name:
                base = parameter.detach().float() if "llama" in type(model).__name__.lower() and name.endswith("weight") else 0.0
                parameter.copy_((base + 0.3 * noise).float())
            else:
                parameter.copy_((noise * 0.25).float())


def make(name, build, seed, n_tokens, at_float64):
    generator = torch.Generator().manual_seed(seed)
    model = build().float()
    model.config._attn_implementation = "eager"
    randomise(model, generator)
    folder = HERE / name
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = model.double()
    tokens = torch.randint(0, model.config.vocab_size, (2, n_tokens + 1), generator=generator)
    with at_float64():
        # Frequencies anew: those of the model have been through float32.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        train(name, folder, model, tokens)


def train(name, folder, model, tokens):
    tensors = {"tokens": tokens.to(torch.int32)}
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-4)
    losses = []
    for step in range(3):
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            tensors["logits"] = logits.detach()
            tensors.update({f"grad.{n}": p.grad.clone() for n, p in model.named_parameters()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    tensors.update({f"after.{n}": p.detach().clone() for n, p in model.named_parameters()})
    tensors["losses"] = torch.stack(losses)
    save_file({k: (v if v.dtype == torch.int32 else v.float()).contiguous() for k, v in tensors.items()}, folder / "golden.safetensors")
    print(name, "losses", [f"{x:.6f}" for x in losses], sum(p.numel() for p in model.parameters()), "parameters")


def make_reward(name, seed):
    generator = torch.Generator().manual_seed(seed)
    model = NemotronForSequenceClassification(nemotron_config(num_labels=5)).float()
    model.score = torch.nn.Linear(16, 5, bias=True)
    model.config._attn_implementation = "eager"
    randomise(model, generator)
    folder = HERE / name
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = model.double()
    lengths = [T, 5, 9]
    tokens = torch.randint(0, model.config.vocab_size, (3, T), generator=generator)
    labels = torch.rand((3, 5), generator=generator) * 4
    labels[0, 1] = labels[2, 0] = labels[2, 4] = float("nan")
    rows = [model(input_ids=row[None, :n]).logits[0] for row, n in zip(tokens, lengths)]
    attributes = torch.stack(rows)
    valid = ~labels.isnan()
    loss = ((attributes - labels.double())[valid] ** 2).mean()
    loss.backward()
    tensors = {"tokens": tokens.to(torch.int32), "lengths": torch.tensor(lengths, dtype=torch.int32)}
    tensors.update(attributes=attributes.detach(), labels=labels, loss=loss.detach()[None])
    tensors.update({f"grad.{n}": p.grad.clone() for n, p in model.named_parameters()})
    save_file({k: (v if v.dtype == torch.int32 else v.float()).contiguous() for k, v in tensors.items()}, folder / "golden.safetensors")
    print(name, "loss", f"{loss:.6f}", "attributes", attributes.tolist())


def rope_configs():
    """(name, config.json) of frequencies to be kept: published models, and what each key does."""
    def llama_config(head_dim, theta, longest, rope):
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8 * head_dim, "intermediate_size": 64,
                "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": head_dim, "vocab_size": 64,
                "max_position_embeddings": longest, "rms_norm_eps": 1e-5, "rope_theta": theta, "rope_scaling": rope}
    llama3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    yield "Llama-2", llama_config(128, 10000.0, 4096, None)
    yield "Llama-3.1", llama_config(128, 500000.0, 131072, {**llama3, "factor": 8.0})
    yield "Llama-3.2", llama_config(64, 500000.0, 131072, {**llama3, "factor": 32.0})
    yield "linear", llama_config(128, 10000.0, 16384, {"rope_type": "linear", "factor": 4.0})
    yield "deepseek-coder", llama_config(128, 100000, 16384, {"type": "linear", "factor": 4.0})
    yield "Yarn-Llama-2", llama_config(128, 10000.0, 65536, {
        "factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True})
    yield "yarn of long models", llama_config(128, 1000000.0, 131072, {**yarn, "original_max_position_embeddings": 32768})
    yield "yarn without truncation", llama_config(64, 150000.0, 131072, {
        **yarn, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False})
    yield "yarn with an attention factor", llama_config(96, 10000.0, 16384, {**yarn, "attention_factor": 1.3})
    yield "yarn with mscale", llama_config(64, 10000.0, 163840, {**yarn, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707})
    yield "yarn with one mscale", llama_config(64, 10000.0, 163840, {**yarn, "factor": 40.0, "mscale": 2.0})
    yield "yarn without a factor", llama_config(64, 10000.0, 20480, {**yarn, "factor": None})
    yield "yarn of factor 1", llama_config(64, 10000.0, 4096, {**yarn, "factor": 1.0})
    yield "yarn of one step", llama_config(64, 10000.0, 16384, {**yarn, "beta_fast": 8.0, "beta_slow": 8.0, "truncate": False})
    yield "yarn of a short past", llama_config(10, 10000.0, 64, {**yarn, "original_max_position_embeddings": 4})
    nemotron = {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_size": 384, "intermediate_size": 64,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 192, "vocab_size": 64,
                "max_position_embeddings": 16384, "norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    for name, rope in [("plain", None), ("linear", {"rope_type": "linear", "factor": 2.5}), ("yarn", yarn),
                       ("llama3", {**llama3, "factor": 4.0, "original_max_position_embeddings": 4096})]:
        yield f"half a head, {name}", {**nemotron, "rope_scaling": rope}


def make_rope():
    rows = []
    for name, config in rope_configs():
        family, rotary = (
            (LlamaConfig, modeling_llama.LlamaRotaryEmbedding) if config["model_type"] == "llama"
            else (NemotronConfig, modeling_nemotron.NemotronRotaryEmbedding))
        with in_float64():
            embedding = rotary(family(**json.loads(json.dumps(config))))
        assert embedding.inv_freq.dtype == torch.float64
        rows.append({"name": name, "config": config, "frequencies": embedding.inv_freq.tolist(),
                     "attention_factor": float(embedding.attention_scaling)})
    text = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "rope.json").write_text(f"[\n{text}\n]\n")
    print(f"rope.json: {len(rows)} configs")


if __name__ == "__main__":
    wanted = sys.argv[1:]
    variants = [(name, build, T, contextlib.nullcontext) for name, build in VARIANTS.items()]
    variants += [(name, build, T_SCALED, in_float64) for name, build in SCALED.items()]
    for seed, (name, *how) in enumerate(variants):
        if not wanted or name in wanted:
            make(name, how[0], 1000 + seed, *how[1:])
    if not wanted or "nemotron-reward" in wanted:
        make_reward("nemotron-reward", 2000)
    if not wanted or "rope" in wanted:
        make_rope()
