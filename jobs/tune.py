"""Searches over trainings.

ray job submit --working-dir . -- python -m jobs.tune --config configs/tune/demo.yaml [key=value ...]
"""

from __future__ import annotations

import sys

from orchestrator.commands.run import main_of_job

if __name__ == "__main__":
    main_of_job(sys.argv[1:], kinds=("pretrain", "finetune"), search=True, prog="jobs.tune")
