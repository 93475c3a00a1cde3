"""What the programs said of the real model against golden.json: compare.py GOLDEN.json LOGPROBS.jsonl RESPONSES.jsonl..

Ids and greedy answers are equal; a log-probability differs by no more than lm-evaluation-harness allows between implementations,
1e-3 + 1e-5 times its size. Prints the largest difference. Shares no code with the library.
"""
import json
import sys


def lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


golden_path, logprobs_path, *responses_paths = sys.argv[1:]
with open(golden_path) as file:
    golden = json.load(file)
(scored,) = lines(logprobs_path)
assert scored["tokens"] == golden["tokens"], f"ids differ: {scored['tokens']}"
pairs = list(zip(scored["logprobs"][1:], golden["logprobs"], strict=True))
worst = max(abs(ours - theirs) for ours, theirs in pairs)
for ours, theirs in pairs:
    assert abs(ours - theirs) <= 1e-3 + 1e-5 * abs(theirs), f"log-probability {ours}, expected {theirs}"
for path in responses_paths:
    responses = lines(path)
    for response, answer in zip(responses, golden["answers"], strict=True):
        assert response["tokens"] == answer["tokens"], f"{path}: {response['text']!r}, expected {answer['text']!r}"
        assert response["text"] == answer["text"], f"{path}: {response['text']!r}, expected {answer['text']!r}"
print(f"{len(pairs)} log-probabilities within {worst:.1e} of transformers' float64; {len(responses_paths)} x {len(responses)} answers equal")
