#!/usr/bin/env bash
# Ray Tune's ASHA lets every trial whose metric is NaN go on, at each rung, while it stops better ones.
#
# Seen with ray[tune] 2.60.0 on Python 3.11, 28 November 2026.
# A rung stops a trial whose result is below the cutoff of the results before it. NaN is below nothing, so a diverged
# trial passes all rungs and keeps its workers to the end; the cutoff itself leaves NaN out. An infinite loss is
# stopped. Four trials reach the first rung with losses 1, 2, 3 and NaN (then: infinity), mode="min", factor 3:
#     with NaN:      CONTINUE STOP STOP CONTINUE
#     with infinity: CONTINUE STOP STOP STOP
# So report float("inf") (or -inf with mode="max") in place of a NaN, or stop trials with a
# stop=lambda trial, result: not math.isfinite(result["loss"]) of your own. Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q 'ray[tune]==2.60.0'

cat > rung.py <<'PY'
import math
from types import SimpleNamespace
from ray.tune.schedulers import ASHAScheduler

def decisions(losses):
    scheduler = ASHAScheduler(metric="loss", mode="min", max_t=9, grace_period=1, reduction_factor=3)
    found = []
    for number, loss in enumerate(losses):
        trial = SimpleNamespace(trial_id=str(number))  # all that the scheduler asks of a trial
        scheduler.on_trial_add(None, trial)
        found.append(scheduler.on_trial_result(None, trial, {"training_iteration": 1, "loss": loss}))
    return " ".join(found)

print("with NaN:     ", decisions([1.0, 2.0, 3.0, math.nan]))
print("with infinity:", decisions([1.0, 2.0, 3.0, math.inf]))
PY
seen=$(venv/bin/python rung.py 2>/dev/null)
echo "$seen"
expected='with NaN:      CONTINUE STOP STOP CONTINUE
with infinity: CONTINUE STOP STOP STOP'
test "$seen" = "$expected" || { echo "changed"; exit 1; }
