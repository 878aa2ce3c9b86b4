"""Errors that a user can mend: each repeats the input and names the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message repeats the input and says what to do; the CLI prints it alone, without a traceback."""


def unknown(kind: str, name: str, options: Iterable[str]) -> UserError:
    """Builds the error for a name that is not known.

    Args:
        kind: What the name stands for, such as ``"task"``.
        name: What the user wrote.
        options: The names that exist.

    Returns:
        An error whose message holds the three nearest names.
    """
    options = list(options)
    # cutoff=0 ranks all names, so that there are always three to offer; case is the commonest slip and costs nothing.
    by_lower = {option.lower(): option for option in options}
    close = [by_lower[match] for match in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.0)]
    hint = f"nearest: {', '.join(map(repr, close))}" if close else "none is registered"
    return UserError(f"unknown {kind} {name!r}; {hint}")
