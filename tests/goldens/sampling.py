"""Makes sampling.json: what the logits processors of Hugging Face transformers, as its generate() puts them together, leave of random rows
of logits, in f64. Run with a Python that has torch and transformers: python tests/goldens/sampling.py"""

import json
import pathlib

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

V = 48
CASES = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 7},
    {"top_k": 1},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 30, "min_p": 0.05},
    {"temperature": 1.3, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.7, "top_p": 0.6, "min_p": 0.3, "repetition_penalty": 1.2},
    {"temperature": 1.1, "top_k": 25, "top_p": 0.97, "min_p": 0.01, "repetition_penalty": 1.8},
]


def main():
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    rows = []
    for case in CASES * 2:
        logits = (3 * torch.randn(V)).float()
        ids = torch.randint(0, V, (12,))
        how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0} | case
        generation = GenerationConfig(do_sample=True, eos_token_id=None, **how)
        processors = model._get_logits_processor(
            generation_config=generation, input_ids_seq_length=len(ids), logits_processor=LogitsProcessorList()
        )
        scores = processors(ids[None], logits.double()[None].clone())
        probabilities = torch.softmax(scores, dim=-1)[0]
        rows.append({
            "how": {"min_p": 0.0} | how,
            "prompt": ids[:8].tolist(),
            "response": ids[8:].tolist(),
            "logits": logits.tolist(),
            "probabilities": probabilities.tolist(),
        })
    path = pathlib.Path(__file__).with_name("sampling.json")
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


main()
