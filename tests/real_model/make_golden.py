#!/usr/bin/env python3
"""golden.json of this folder: make_golden.py HF_DIR OUT.json, HF_DIR being what gguf_to_hf.py made of SmolLM2-135M-Instruct.

    pip install torch transformers
    python tests/real_model/make_golden.py target/tests/real-model/hf tests/real_model/golden.json

transformers in float64: the ids and log-probabilities of a text, and the greedy answers to two questions with the smallest margin by
which a token won, so that another implementation's rounding cannot change it.
"""
import json
import sys

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "The oar bank of a trireme held 170 rowers; in 480 BC, at Salamis, about 370 of these ships won.\n\n"
    "    def row(n: int) -> int:\n        return n * 3  # three banks, naïve façade, 漢字, 🚣"
)
QUESTIONS = ["What is gravity?", "Name three colors of the rainbow."]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
EOS = 2


def main(source, out):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{source}/tokenizer.json")
    model = LlamaForCausalLM.from_pretrained(source, torch_dtype=torch.float64)

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    log_probabilities = torch.log_softmax(logits(ids), -1)
    answers = []
    for question in QUESTIONS:
        prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in [("system", SYSTEM), ("user", question)])
        prompt = tokenizer.encode(prompt + "<|im_start|>assistant\n", add_special_tokens=False)
        made = model.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
        tokens = made[0][len(prompt):].tolist()
        best = logits(prompt + tokens)[len(prompt) - 1:-1].topk(2).values
        tokens = tokens[:-1] if tokens[-1] == EOS else tokens
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append({"question": question, "tokens": tokens, "text": text, "margin": (best[:, 0] - best[:, 1]).min().item()})
    golden = {
        "text": TEXT, "tokens": ids, "logprobs": [log_probabilities[t, ids[t + 1]].item() for t in range(len(ids) - 1)],
        "answers": answers,
    }
    with open(out, "w") as file:
        json.dump(golden, file, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
