#!/usr/bin/env bash
# A Llama tokenizer with "legacy": true, saved by transformers and loaded again, gives other ids.
#
# Seen with transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3 and protobuf 7.36.2 on Python 3.11,
# 28 November 2026.
# With "legacy": true in tokenizer_config.json beside a tokenizer.model, a word right behind a special token is encoded
# as if a space stood before it. save_pretrained leaves "legacy" out, and the next load takes false: a model trained
# with the one tokenizer is served with the other, without a warning. Tokens of "the fox</s>the dog" by a small one:
#     loaded:      <s> ▁the ▁ fo x </s> ▁the ▁ dog
#     saved:       <s> ▁the ▁ fo x </s> t he ▁ dog
#     legacy kept: <s> ▁the ▁ fo x </s> ▁the ▁ dog
# So write "legacy" back into the saved tokenizer_config.json, or copy the tokenizer's files as they are, and compare
# ids before and after. Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 \
    protobuf==7.36.2

cat > round_trip.py <<'PY'
import json, os
import sentencepiece
from transformers import AutoTokenizer

os.mkdir("base")
with open("text.txt", "w") as file:
    file.writelines(f"the quick brown fox number {n} jumps over the lazy dog\n" for n in range(200))
sentencepiece.SentencePieceTrainer.train(
    input="text.txt", model_prefix="base/tokenizer", vocab_size=60, model_type="bpe", minloglevel=2
)
with open("base/tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True,
               "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, file)

def show(name, tokenizer):
    ids = tokenizer("the fox</s>the dog")["input_ids"]
    print(f"{name}:", *tokenizer.convert_ids_to_tokens(ids))

loaded = AutoTokenizer.from_pretrained("base")
show("loaded", loaded)
loaded.save_pretrained("saved")
show("saved", AutoTokenizer.from_pretrained("saved"))
with open("saved/tokenizer_config.json") as file:
    config = json.load(file)
assert "legacy" not in config
with open("saved/tokenizer_config.json", "w") as file:
    json.dump({**config, "legacy": True}, file)
show("legacy kept", AutoTokenizer.from_pretrained("saved"))
PY
seen=$(HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1 venv/bin/python round_trip.py 2>&1)
echo "$seen"
expected='loaded: <s> ▁the ▁ fo x </s> ▁the ▁ dog
saved: <s> ▁the ▁ fo x </s> t he ▁ dog
legacy kept: <s> ▁the ▁ fo x </s> ▁the ▁ dog'
test "$seen" = "$expected" || { echo "changed"; exit 1; }
