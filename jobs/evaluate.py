"""Measures a model.

ray job submit --working-dir . -- python -m jobs.evaluate --config configs/evaluate/demo.yaml [key=value ...]
"""

from __future__ import annotations

import sys

from orchestrator.commands.run import main_of_job

if __name__ == "__main__":
    main_of_job(sys.argv[1:], kinds=("evaluate",), search=False, prog="jobs.evaluate")
