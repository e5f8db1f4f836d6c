"""Fine-tunes a base model.

ray job submit --working-dir . -- python -m jobs.finetune --config configs/finetune/demo.yaml [key=value ...]
"""

from __future__ import annotations

import sys

from orchestrator.commands.run import main_of_job

if __name__ == "__main__":
    main_of_job(sys.argv[1:], kinds=("finetune",), search=False, prog="jobs.finetune")
