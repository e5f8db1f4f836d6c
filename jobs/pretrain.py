"""Pretrains a model: new weights, or a base model on raw text.

ray job submit --working-dir . -- python -m jobs.pretrain --config configs/pretrain/demo.yaml [key=value ...]
"""

from __future__ import annotations

import sys

from orchestrator.commands.run import main_of_job

if __name__ == "__main__":
    main_of_job(sys.argv[1:], kinds=("pretrain",), search=False, prog="jobs.pretrain")
