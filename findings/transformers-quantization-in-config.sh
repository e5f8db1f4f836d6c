#!/usr/bin/env bash
# transformers loads a checkpoint of ordinary weights into 4-bit modules without quantising them, and says nothing, when
# the quantisation settings come in the configuration and not as an argument.
#
# Seen with transformers 5.23.0, bitsandbytes 0.50.2 and torch 2.13.0 (CPU) on Python 3.11, 29 November 2026.
# A small Llama is saved in fp32 and loaded twice with the same BitsAndBytesConfig: as the argument
# `quantization_config`, and as the field of that name of the `config` that is passed. The latter is taken to say that
# the file's weights have 4 bits already: the modules are Linear4bit, their weights plain parameters in fp32, and peft
# then ends in an AttributeError (no `compress_statistics`). Seen:
#     as an argument: Linear4bit, torch.uint8
#     in the configuration: Linear4bit, torch.float32
# So keep the settings in a file of their own and pass them as the argument. Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q \
    transformers==5.23.0 bitsandbytes==0.50.2 torch==2.13.0 accelerate

cat > load.py <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained("base")
bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
config = AutoConfig.from_pretrained("base")
config.quantization_config = bits.to_dict()
loaded = {
    "as an argument": AutoModelForCausalLM.from_pretrained("base", quantization_config=bits),
    "in the configuration": AutoModelForCausalLM.from_pretrained("base", config=config),
}
seen = []
for name, model in loaded.items():
    module = model.model.layers[0].mlp.up_proj
    seen.append(f"{type(module).__name__}, {module.weight.dtype}")
    print(f"{name}: {seen[-1]}")
raise SystemExit(seen != ["Linear4bit, torch.uint8", "Linear4bit, torch.float32"])
PY
venv/bin/python load.py 2>/dev/null || { echo "changed"; exit 1; }
