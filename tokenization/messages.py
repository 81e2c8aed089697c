"""Parts of one-line messages that several errors have: what another error says, and lists that would be too long.

Light: imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError


def reason_of(error: Exception) -> str:
    """Return what an error says, in one line; of data that does not fit its config, what is wrong with it first."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split()) or type(error).__name__
    first = error.errors()[0]
    where, message = ".".join(map(str, first["loc"])), first["msg"]
    told = f"{message[:1].lower()}{message[1:]}"
    return f"{where}: {told}" if where else told


def named(names: Sequence[str], *, most: int, separator: str = ", ") -> str:
    """Return names one after the other, beyond `most` of them how many more there are; `none` of none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (separator.join(names[:most]) or "none") + more
