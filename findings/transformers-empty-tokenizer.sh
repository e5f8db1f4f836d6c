#!/usr/bin/env bash
# AutoTokenizer of a folder without vocabulary files gives a tokenizer of special tokens alone, without a word.
#
# Seen with transformers 5.23.0 and tokenizers 0.23.3 on Python 3.11, 28 November 2026.
# A folder with config.json but no vocab.txt, vocab.json or tokenizer.json (an unfinished copy, a save of the model
# alone) loads without error or warning. BERT's words are all [UNK], and GPT-2's are left out: a text has no tokens.
# A Llama folder is refused. Training on such ids runs to the end. Ids of "a valid sentence":
#     bert:  BertTokenizer of 5 tokens, ids [2, 1, 1, 1, 3]
#     gpt2:  GPT2Tokenizer of 1 tokens, ids []
#     llama: ValueError
# So compare len(tokenizer) with config.vocab_size, or encode a sentence and ask for more than unknown tokens. Exits 0
# while this is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q transformers==5.23.0 tokenizers==0.23.3

cat > load.py <<'PY'
from transformers import AutoConfig, AutoTokenizer

for kind in ("bert", "gpt2", "llama"):
    AutoConfig.for_model(kind).save_pretrained(kind)
    try:
        tokenizer = AutoTokenizer.from_pretrained(kind)
        ids = tokenizer("a valid sentence")["input_ids"]
        print(f"{kind}: {type(tokenizer).__name__} of {len(tokenizer)} tokens, ids {ids}")
    except Exception as error:
        print(f"{kind}: {type(error).__name__}")
PY
export HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1
seen=$(venv/bin/python load.py 2>&1)
echo "$seen"
expected='bert: BertTokenizer of 5 tokens, ids [2, 1, 1, 1, 3]
gpt2: GPT2Tokenizer of 1 tokens, ids []
llama: ValueError'
test "$seen" = "$expected" || { echo "changed"; exit 1; }
