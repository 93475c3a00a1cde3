"""SentencePiece's encoder against ours on the same text, one thread each, in turn.

    .venv/bin/python benches/peers/tokenizer.py MODEL FILE..     (pip install sentencepiece)

FILE: .jsonl with {"text": ..} lines, or text files of one document each, in the order given; `cargo bench --bench tokenizer` is run on the same files between two rounds of
SentencePiece, and must report the same number of ids. Prints MB/s of both and their ratio; take the best of several runs on a
quiet machine.
"""
import json
import re
import subprocess
import sys
import time

import sentencepiece as spm

model, files = sys.argv[1], sys.argv[2:]
processor = spm.SentencePieceProcessor(model_file=model)
texts = []
for name in files:
    whole = open(name, encoding="utf-8", newline="").read()
    texts += [json.loads(line)["text"] for line in whole.splitlines()] if name.endswith(".jsonl") else [whole]
n_bytes = sum(len(text.encode()) for text in texts)


def round_of_sentencepiece():
    start = time.perf_counter()
    n_ids = sum(len(processor.encode(text, out_type=int)) for text in texts)
    return time.perf_counter() - start, n_ids


first_s, n_ids = round_of_sentencepiece()
ours = subprocess.run(["cargo", "bench", "-q", "--bench", "tokenizer", "--", model, *files], check=True, capture_output=True, text=True).stdout
second_s, _ = round_of_sentencepiece()
our_ids = int(re.search(r"(\d+) ids", ours).group(1))
our_rate = float(re.search(r"encode, one thread: ([\d.]+)", ours).group(1))
cold_rate = float(re.search(r"([\d.]+) MB/s the first time", ours).group(1))
if our_ids != n_ids:
    sys.exit(f"{our_ids} ids from ours, {n_ids} from SentencePiece: not the same text, or not the same encoder")
rate = n_bytes / 1e6 / min(first_s, second_s)
print(ours, end="")
print(f"SentencePiece {spm.__version__}, one thread: {rate:.1f} MB/s")
print(f"ratio: {our_rate / rate:.1f} warm, {cold_rate / rate:.1f} the first time")
