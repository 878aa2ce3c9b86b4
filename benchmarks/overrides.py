"""``--override FIELD=VALUE``: changes to a preset from the command line, for all benchmarks."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from fleetgym.core.errors import UserError, unknown


def changes(
    overrides: Sequence[str],
    defaults: Mapping[str, Any],
    *,
    what: str = "preset field",
    prefix: str = "",
    words: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Reads changes.

    Args:
        overrides: Texts ``FIELD=VALUE``; the items of a tuple are separated by commas.
        defaults: Field -> its value without a change, whose type the new one gets.
        what: What a field is, for messages.
        prefix: What stands before the fields on the command line, for messages.
        words: Field -> texts that it takes besides values of its type.

    Returns:
        Field -> new value, of the fields that change.

    Raises:
        UserError: An unknown field, one that is given twice or without a value, or a value of another type.
    """
    found: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if key not in defaults:
            raise unknown(what, key, defaults)
        if not equals:
            raise UserError(
                f"--override {prefix}{text}: {prefix}FIELD=VALUE is wanted, such as {prefix}{key}={defaults[key]}"
            )
        if key in found:
            raise UserError(f"{key}={found[key]} {text}: {key} is given twice; leave one out")
        others = (words or {}).get(key, ())
        if value in others:
            found[key] = value
            continue
        try:
            found[key] = _as(value, defaults[key])
        except (ValueError, SyntaxError) as error:
            kinds = " or ".join([type(defaults[key]).__name__, *others])
            raise UserError(
                f"--override {prefix}{text}: {key} takes a {kinds}, such as {defaults[key]}, which is the default"
            ) from error
    return found


def _as(value: str, like: Any) -> Any:
    """A value of the type of another; raises ``ValueError`` or ``SyntaxError`` where it is of another one."""
    if isinstance(like, str):
        return value
    if isinstance(like, (int, float)) and not isinstance(like, bool):
        return type(like)(value)
    read = ast.literal_eval(value.capitalize() if isinstance(like, bool) else value)
    if isinstance(like, tuple):
        read = read if isinstance(read, tuple) else (read,)
        right = all(isinstance(item, type(like[0])) for item in read) if like else True
    else:
        right = type(read) is type(like)
    if not right:
        raise ValueError(value)
    return read
