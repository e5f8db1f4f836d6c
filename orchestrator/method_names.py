"""The names of methods, and what those settings usually are that the advisor prices them by.

Apart from `spec_methods`, whose pydantic models take 0.2 s to load: `advise` answers without them.
"""

from __future__ import annotations

from typing import Literal

MethodName = Literal[
    "full", "last_layers", "lora", "qlora", "ia3", "prefix", "prompt_tuning", "head", "scratch", "few_shot", "as_is"
]
AS_IS: MethodName = "as_is"
"""What measures a model and leaves it as it is: the method of `kind: evaluate`."""
EVALUATE: Literal["evaluate"] = "evaluate"
"""The kind of run that trains nothing and measures a model."""
PROMPTED: MethodName = "few_shot"
"""What tries a prompt."""
LAST_LAYERS = 2
"""Layers that `method: last_layers` trains."""
PREFIX_TOKENS = 50
"""Keys and values of `method: prefix`: 50 in peft's comparison, 10 to 200 in Li and Liang (2021)."""
PROMPT_TOKENS = 100
"""Embeddings of `method: prompt_tuning`: 100 in Lester et al. (2021)."""
