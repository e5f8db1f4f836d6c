#!/usr/bin/env bash
# A 4-bit layer that trains on a CPU raises in evaluation where its width is no multiple of 64, and rounds otherwise where
# it is: on CPUs with AVX512-BF16 bitsandbytes packs the weight anew at the first forward pass without gradients.
#
# Seen with bitsandbytes 0.50.2 and torch 2.13.0 (CPU) on Python 3.11, 29 November 2026.
# Linear4bit(96, 32) and Linear4bit(128, 32), NF4 with double quantisation, in fp32. Whether a CPU is of that kind is read
# from its flags into a field of each layer; here the field is set, so that the same is seen on any CPU. Seen:
#     width 96, training: ok
#     width 96, evaluation: RuntimeError: shape '[32, 1]' is invalid for input of size 48
#     width 96, evaluation, field off: ok
# So a model that is evaluated beside its training needs the field `support_avx512bf16_for_cpu` off in every layer.
# Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q bitsandbytes==0.50.2 torch==2.13.0 numpy

cat > layer.py <<'PY'
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit

def outcome(width, training, field=True):
    torch.manual_seed(0)
    layer = Linear4bit(width, 32, compress_statistics=True, quant_type="nf4")
    layer.weight = Params4bit(
        torch.randn(32, width), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    layer.to("cpu").train(training)
    layer.support_avx512bf16_for_cpu = field
    rows = torch.randn(3, width, requires_grad=training)
    try:
        with torch.set_grad_enabled(training):
            layer(rows)
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "ok"

seen = {
    "width 96, training": outcome(96, True),
    "width 96, evaluation": outcome(96, False),
    "width 96, evaluation, field off": outcome(96, False, field=False),
}
for name, what in seen.items():
    print(f"{name}: {what}")
raise SystemExit(list(seen.values()) != ["ok", "RuntimeError: shape '[32, 1]' is invalid for input of size 48", "ok"])
PY
venv/bin/python layer.py 2>/dev/null || { echo "changed"; exit 1; }
