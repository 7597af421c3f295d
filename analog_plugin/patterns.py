"""How recipes name modules: by full name, last part of the name, or pattern."""

from __future__ import annotations

from fnmatch import fnmatch


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name is, ends in, or fits ``pattern``.

    Example:
        >>> matches("model.layers.0.mlp.down_proj", "down_proj")
        True
    """
    return name == pattern or name.endswith("." + pattern) or fnmatch(name, pattern)
