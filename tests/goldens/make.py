#!/usr/bin/env python3
"""Golden files for tests/model_goldens.rs: tiny models of Hugging Face transformers, computed in float64.

    pip install torch transformers safetensors
    python tests/goldens/make.py

For each variant a folder with what transformers' save_pretrained writes (config.json, model.safetensors in float32) and
golden.safetensors: tokens [2, T+1], logits [2, T, V], loss (mean over all 2T targets), "grad.NAME" and "after.NAME" (weights
after three steps of clip_grad_norm_ 1.0 and torch.optim.AdamW lr 1e-2, betas 0.9/0.95, eps 1e-4, decay 0.1 on matrices only).
Weights are exact in float32, so both sides start from the same numbers; results are float64 rounded to float32.

The folder nemotron-reward is a NemotronForSequenceClassification of five attributes whose score layer has a bias (NeMo-Aligner's
reward head; transformers' own has none): tokens [3, T] and lengths [3], attributes [3, 5] at the last token of each sequence, labels
[3, 5] with NaN where there is none, loss (mean of the squared errors over all labels there are), and "grad.NAME".
"""
import pathlib
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, NemotronConfig, NemotronForCausalLM, NemotronForSequenceClassification

HERE = pathlib.Path(__file__).parent
T = 12


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


def llama():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=32, rms_norm_eps=1e-6, rope_theta=500.0, tie_word_embeddings=True, attention_bias=False,
    ))


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


def make(name, build, seed):
    generator = torch.Generator().manual_seed(seed)
    model = build().float()
    model.config._attn_implementation = "eager"
    randomise(model, generator)
    folder = HERE / name
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = model.double()
    tokens = torch.randint(0, model.config.vocab_size, (2, T + 1), generator=generator)
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


if __name__ == "__main__":
    for seed, (name, build) in enumerate(VARIANTS.items()):
        make(name, build, 1000 + seed)
    make_reward("nemotron-reward", 2000)
