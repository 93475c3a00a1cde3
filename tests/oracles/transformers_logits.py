"""What transformers computes: transformers_logits.py GOLDEN_DIR EXPORT_DIR BF16_EXPORT_DIR [three more ..]

For each three directories one line: the golden's name, the relative error of its logits in float32 against golden.safetensors (float64),
whether the export's logits are the same bits, and the relative difference of the bf16 export's. Shares no code with the library.
"""
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    with torch.no_grad():
        return model(input_ids=tokens).logits


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


folders = sys.argv[1:]
for golden, export, rounded in zip(folders[::3], folders[1::3], folders[2::3]):
    known = load_file(f"{golden}/golden.safetensors")
    tokens = known["tokens"].long()[:, :-1]
    theirs = logits(golden, tokens)
    ours = logits(export, tokens)
    is_equal = "equal" if torch.equal(theirs, ours) else f"differ by {relative(ours, theirs)}"
    print(golden, relative(theirs, known["logits"]), is_equal, relative(logits(rounded, tokens), theirs), sep="\t")
