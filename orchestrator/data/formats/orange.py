"""Orange's tab-separated files have three header rows: names, types, roles. Recognises the second and third. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TYPE = re.compile(r"c|d|s|t|continuous|discrete|string|time|basket", re.IGNORECASE)
_ROLE = re.compile(r"c|m|i|w|class|meta|ignore|weight|multiclass|-dc|\w+=.*", re.IGNORECASE)
# Source of both: Orange Data Mining, "Loading your Data", header with type information; `name=value` are attributes.


def has_orange_headers(types: Sequence[str], roles: Sequence[str]) -> bool:
    """Whether a table's first two rows behind the names are no data but the type and the role of each column.

    A discrete column may have its values in place of its type, so one type by name is enough; where no column has a
    role, all types have to be names, and of at least two columns.
    """
    named = [kind for kind in types if _TYPE.fullmatch(kind.strip())]
    if not any(role.strip() for role in roles):
        return len(named) > 1 and len(named) == sum(bool(kind.strip()) for kind in types)
    return bool(named) and all(_ROLE.fullmatch(word) for role in roles for word in role.split())
