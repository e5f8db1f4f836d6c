#!/usr/bin/env bash
# DeepSpeed's "grad_accum_dtype": "fp32" with bf16 is refused without ZeRO, and at stage 1 the sum is rounded again.
#
# Seen with deepspeed 0.19.8 and torch 2.13.0 (CPU, gloo, one process) on Python 3.11, 28 November 2026.
# Eight micro-batches with gradients 256 and seven times 1 have the mean 32.875; sums in bf16 lose the ones and give
# 32. With data_types.grad_accum_dtype "fp32", stages 2 and 3 give 32.875 and stage 0 raises NotImplementedError.
# Stage 1 changes to another class, BF16_Optimizer, which sums in fp32 but rounds the sum to bf16 before it is reduced,
# even in a single process and without a word. Norms of the gradient seen:
#     stage 0: NotImplementedError               stage 1: BF16_Optimizer 33.0
#     stage 2: DeepSpeedZeroOptimizer 32.875     stage 3: DeepSpeedZeroOptimizer_Stage3 32.875
#     stage 1 without it: DeepSpeedZeroOptimizer 32.0    with fp32 communication too: BF16_Optimizer 32.875
# So set communication_data_type to "fp32" as well at stage 1 (twice the traffic), or use stage 2. Exits 0 while this
# is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q torch==2.13.0
venv/bin/pip --quiet --disable-pip-version-check install -q deepspeed==0.19.8  # its setup looks for torch

cat > norms.py <<'PY'
import os, socket

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                  DS_ACCELERATOR="cpu")
import deepspeed, torch

def norm(stage, **options):
    model = torch.nn.Linear(1, 1, bias=False)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8, "bf16": {"enabled": True},
              "zero_optimization": {"stage": stage}, "gradient_clipping": 1e3, **options}
    try:
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    except NotImplementedError as error:
        return type(error).__name__
    for value in (256.0, *[1.0] * 7):
        engine.backward(engine(torch.full((1, 1), value, dtype=torch.bfloat16)).float().sum())
        engine.step()
    return f"{type(optimizer).__name__} {float(engine.get_global_grad_norm())}"

fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
for stage in range(4):
    print(f"SEEN stage {stage}: {norm(stage, **fp32)}")
print(f"SEEN stage 1 without it: {norm(1)}")
print(f"SEEN stage 1 with fp32 communication too: {norm(1, communication_data_type='fp32', **fp32)}")
PY
venv/bin/python norms.py > out.txt 2>&1 || { tail -5 out.txt; exit 1; }
seen=$(sed -n 's/^SEEN //p' out.txt)
echo "$seen"
expected='stage 0: NotImplementedError
stage 1: BF16_Optimizer 33.0
stage 2: DeepSpeedZeroOptimizer 32.875
stage 3: DeepSpeedZeroOptimizer_Stage3 32.875
stage 1 without it: DeepSpeedZeroOptimizer 32.0
stage 1 with fp32 communication too: BF16_Optimizer 32.875'
test "$seen" = "$expected" || { echo "changed"; exit 1; }
