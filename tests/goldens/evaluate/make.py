#!/usr/bin/env python3
"""Golden files for tests/evaluate.rs: a tiny model, rows in the published shapes (rows.py), and what lm-evaluation-harness makes of them.

    pip install torch transformers safetensors lm-eval==0.4.13
    python tests/goldens/evaluate/make.py

Written are model/ (a Llama of 0.1 M parameters in bfloat16 with a byte-level BPE, trained here on text like the rows, so that it has
opinions and ends its answers) and golden.json.gz: the files of rows.py, and for each run of the harness its tasks, the contexts and
continuations of every item with their tokens and log-likelihoods (float64), the metrics of every item, and the aggregates. The harness
runs its own tasks; only its data sets come from the files, and BBH's examples, which the harness has in its own configuration. Greedy
answers come with the smallest margin by which a token won.
"""
import csv
import gzip
import io
import json
import pathlib
import sys

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rows

HERE = pathlib.Path(__file__).parent
FILES = rows.files()
EOS = "<|end|>"


def json_rows(path):
    return [json.loads(line) for line in FILES[path].splitlines()]


def csv_rows(path):
    return list(csv.reader(io.StringIO(FILES[path])))


def corpus():
    """Prompts with their answers; every few a wrong one, so that not everything is right."""
    texts = []
    for subject in rows.SUBJECTS:
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        shots = [f"{q.strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer: {k}\n\n" for q, a, b, c, d, k in rows.mmlu_rows(subject, 6, 40)]
        texts.append(head + "".join(shots))
    problems = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows.gsm8k_rows(24, 0) + rows.gsm8k_rows(4, 20)]
    texts += ["".join(problems[i:] + problems[:i])[:1500] for i in range(0, len(problems), 2)]
    for subtask in rows.SUBTASKS:
        shots = rows.bbh_rows(subtask, 3, 5) + rows.bbh_rows(subtask, 2, 11)
        shots = "\n\n".join(f"Q: {question}\nA: Let's think step by step.\n{answer}" for question, answer, _ in shots)
        texts.append(f"{rows.bbh_description(subtask)}\n\n{shots}{EOS}")
    texts += [f"Question: {q}\nAnswer: {c['ABCD'.index(k)]}\n\n" for q, c, k in rows.ARC_TRAIN]
    texts += [s.replace("_", b if k == "1" else c) + "\n\n" for s, b, c, k in rows.WINOGRANDE_TRAIN + rows.WINOGRANDE[:2]]
    return texts + [f"{l}: {a} {b.capitalize()} {e[g]}\n\n" for l, a, b, e, g in rows.HELLASWAG_TRAIN]


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_model(texts, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=1536, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
        attention_bias=False, bos_token_id=0, eos_token_id=0, pad_token_id=0, dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)
    ids = [tokenizer.encode(text).ids[:448] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    n_steps = 900
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / n_steps)
        picked = [ids[i] for i in torch.randint(len(ids), (6,))]
        longest = max(map(len, picked))
        tokens = torch.tensor([one + [0] * (longest - len(one)) for one in picked])
        labels = torch.tensor([one + [-100] * (longest - len(one)) for one in picked])
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f}", file=sys.stderr, flush=True)
    print(f"trained to {loss.item():.3f} nats a token", file=sys.stderr)
    return model.to(torch.bfloat16)


def of_list(found):
    return datasets.DatasetDict({name: datasets.Dataset.from_list(split) for name, split in found.items()})


def arc_row(row):
    if isinstance(row["question"], dict):
        choices = row["question"]["choices"]
        columns = {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}
        row = {"id": row["id"], "question": row["question"]["stem"], "choices": columns, "answerKey": row["answerKey"]}
    return row


def load_dataset(path, name=None, **_):
    """The data sets of the hub in the form of their loaders, out of our files."""
    if path == "allenai/ai2_arc":
        train, test = ([arc_row(row) for row in json_rows(f"arc_challenge/ARC-Challenge-{split}.jsonl")] for split in ["Train", "Test"])
        return of_list({"train": train, "validation": train, "test": test})
    if path == "allenai/winogrande":
        keys = ["sentence", "option1", "option2", "answer"]
        read = lambda split: [{key: row[key] for key in keys} for row in json_rows(f"winogrande/{split}.jsonl")]
        return of_list({"train": read("train_xl"), "validation": read("dev")})
    if path == "Rowan/hellaswag":
        read = lambda split: [{**row, "label": str(row["label"])} for row in json_rows(f"hellaswag/hellaswag_{split}.jsonl")]
        return of_list({"train": read("train"), "validation": read("val")})
    if path == "cais/mmlu":
        row = lambda q, a, b, c, d, key: {"question": q, "subject": name, "choices": [a, b, c, d], "answer": "ABCD".index(key)}
        return of_list({split: [row(*fields) for fields in csv_rows(f"mmlu/{split}/{name}_{split}.csv")] for split in ["dev", "test"]})
    if path == "openai/gsm8k":
        return of_list({split: json_rows(f"gsm8k/{split}.jsonl") for split in ["train", "test"]})
    if path == "SaylorTwift/bbh":
        return of_list({"test": json.loads(FILES[f"bbh/bbh/{name}.json"])["examples"]})
    raise ValueError(path)


datasets.load_dataset = load_dataset
import lm_eval  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

harness_init = ConfigurableTask.__init__


def init(self, *args, config=None, **kwargs):
    """The harness's task with our examples in place of BBH's."""
    if config and str(config.get("task", "")).startswith("bbh_cot_fewshot_"):
        subtask = config["task"].removeprefix("bbh_cot_fewshot_")
        shots = [{"input": question, "target": answer} for question, answer, _ in rows.bbh_rows(subtask, 3, 5)]
        examples = {"sampler": "first_n", "samples": shots}
        config = {**config, "description": rows.bbh_description(subtask) + "\n\n", "fewshot_config": examples}
    harness_init(self, *args, config=config, **kwargs)


ConfigurableTask.__init__ = init


class Recording(HFLM):
    """The harness's model; it notes the tokens that it makes of texts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pairs, self.prompts = {}, {}

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.pairs.update({texts: (context, continuation) for texts, context, continuation in requests})
        return super()._loglikelihood_tokens(requests, **kwargs)

    def _model_generate(self, context, **kwargs):
        made = super()._model_generate(context, **kwargs)
        prompt, tokens = context[0].tolist(), made[0][context.shape[1]:].tolist()
        best = self.model(made).logits[0, len(prompt) - 1:-1].topk(2).values
        # Compared are texts up to the first stop string, which may end before the last token.
        self.prompts[tuple(prompt)] = {"prompt_ids": prompt, "ids": tokens, "margin": (best[:, 0] - best[:, 1]).min().item()}
        return made


def sample(model, task, found):
    """One item."""
    metrics = {f"{key},{found['filter']}": float(found[key]) for key in found["metrics"]}
    pairs = [tuple(arguments) for arguments in found["arguments"]]
    if isinstance(pairs[0][1], dict):
        prompt = pairs[0][0]
        ids = model.tok_encode(prompt)[-(model.max_length - pairs[0][1].get("max_gen_toks", 256)):]
        answer = found["resps"][0][0]
        extracted = {found["filter"]: found["filtered_resps"][0]}
        return {"prompt": prompt, **model.prompts[tuple(ids)], "text": answer, "extracted": extracted, "metrics": metrics}
    answers = [answer[0] for answer in found["resps"]]
    return {
        "pairs": [{"context": c, "continuation": t, "context_ids": model.pairs[c, t][0], "ids": model.pairs[c, t][1],
                   "sum": float(ll), "is_greedy": str(greedy) == "True"} for (c, t), (ll, greedy) in zip(pairs, answers)],
        "metrics": metrics,
    }


def run(model, tasks, n_shots, bos=None):
    results = lm_eval.simple_evaluate(model=model, tasks=tasks, num_fewshot=n_shots, log_samples=True, batch_size=1)
    samples = {}
    for task, found in results["samples"].items():
        items = {}
        for one in sorted(found, key=lambda one: one["doc_id"]):
            item = sample(model, task, one)
            if one["doc_id"] in items:  # another filter of the same answer
                items[one["doc_id"]]["metrics"].update(item["metrics"])
                items[one["doc_id"]]["extracted"].update(item["extracted"])
            else:
                items[one["doc_id"]] = item
        samples[task] = list(items.values())
    wanted = lambda key: "," in key and not key.endswith("_stderr")
    scores = {task: {key: value for key, value in found.items() if wanted(key)} for task, found in results["results"].items()}
    scores.update({name: {key: value for key, value in found.items() if wanted(key)} for name, found in results.get("groups", {}).items()})
    return {"tasks": tasks, "n_shots": n_shots, "bos": bos, "samples": samples, "scores": scores}


def main():
    texts = corpus()
    tokenizer = make_tokenizer(texts)
    folder = HERE / "model"
    if not (folder / "model.safetensors").exists():
        make_model(texts, tokenizer).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOS, bos_token=EOS, pad_token=EOS)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    weights, plain = model, tokenizer
    model = Recording(pretrained=weights, tokenizer=plain, batch_size=1)
    # The same with a beginning of sequence before every text, as Llama's tokenizer.json asks for; and what add_bos_token makes of it.
    begun = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begun.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    begun = PreTrainedTokenizerFast(tokenizer_object=begun, eos_token=EOS, bos_token=EOS, pad_token=EOS)
    with_bos = lambda add: Recording(pretrained=weights, tokenizer=begun, batch_size=1, add_bos_token=add)
    few = ["arc_challenge", "winogrande", "bbh_cot_fewshot_snarks"]
    runs = [
        run(model, ["arc_challenge", "winogrande", "hellaswag"], None),
        run(model, ["arc_challenge"], 3),
        run(model, ["winogrande", "hellaswag"], 2),
        run(model, ["mmlu"], 5),
        run(model, ["gsm8k", "bbh"], None),
        run(with_bos(True), few, None, "always"),
        run(with_bos(True), ["mmlu_anatomy"], 5, "always"),
        run(with_bos(False), few[:2], None, "empty"),
        run(with_bos(None), few[:2], None, "auto"),
    ]
    answers = [one for r in runs for items in r["samples"].values() for one in items if "margin" in one]
    print(f"smallest margin of {len(answers)} greedy answers: {min(one['margin'] for one in answers):.2e}", file=sys.stderr)
    for r in runs:
        print(json.dumps({k: v for k, v in r["scores"].items() if not k.startswith(("mmlu_", "bbh_cot"))}, default=str), file=sys.stderr)
    golden = {"files": FILES, "runs": runs, "post_processor": json.loads(begun.backend_tokenizer.to_str())["post_processor"]}
    (HERE / "golden.json.gz").write_bytes(gzip.compress(json.dumps(golden, ensure_ascii=False, default=str).encode(), mtime=0))


if __name__ == "__main__":
    main()
