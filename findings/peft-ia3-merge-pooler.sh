#!/usr/bin/env bash
# peft cannot merge IA3 beside a BERT pooler that is trained whole: merge_and_unload() ends in an AttributeError.
#
# Seen with peft 0.21.2, transformers 5.23.0 and torch 2.13.0 (CPU) on Python 3.11, 29 November 2026.
# A BERT classifier gets an adapter with modules_to_save=["pooler", "classifier"], as a base without a pooler needs. With
# LoRA, merge_and_unload() puts the pooler that was trained in its place. With IA3 the step that puts a module back
# copies a `weight` that the pooler, which holds a dense layer, does not have itself. Saving and reloading the adapter
# is not affected. Seen:
#     LoRA: merged, pooler trained
#     IA3: AttributeError: 'BertPooler' object has no attribute 'weight'
#     IA3, whole modules put back by hand before: merged, pooler trained
# So replace each ModulesToSaveWrapper by its active module first. Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q peft==0.21.2 transformers==5.23.0 torch==2.13.0

cat > merge.py <<'PY'
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import BertConfig, BertForSequenceClassification

def outcome(config, by_hand=False):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = get_peft_model(BertForSequenceClassification(BertConfig(intermediate_size=64, **sizes)), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(1.0)
    trained = model.base_model.model.bert.pooler.modules_to_save["default"].dense.weight.clone()
    if by_hand:
        for name, module in list(model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, module.modules_to_save["default"])
    try:
        merged = model.merge_and_unload()
    except AttributeError as error:
        return f"AttributeError: {error}"
    kept = torch.equal(merged.bert.pooler.dense.weight, trained)
    return f"merged, pooler {'trained' if kept else 'as before'}"

whole = {"task_type": "SEQ_CLS", "modules_to_save": ["pooler", "classifier"]}
lora = LoraConfig(target_modules=["query", "value"], **whole)
ia3 = lambda: IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], **whole)
seen = {"LoRA": outcome(lora), "IA3": outcome(ia3()), "IA3, whole modules put back by hand before": outcome(ia3(), True)}
for name, what in seen.items():
    print(f"{name}: {what}")
expected = ["merged, pooler trained", "AttributeError: 'BertPooler' object has no attribute 'weight'", "merged, pooler trained"]
raise SystemExit(list(seen.values()) != expected)
PY
venv/bin/python merge.py 2>/dev/null || { echo "changed"; exit 1; }
