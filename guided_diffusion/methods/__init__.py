"""Methods: one file a method, found by itself; `docs/extending.md` shows how to add one.

An entry is a class, see methods.base.Method, that builds itself with `from_flags`.
"""

from ..system.registry import Registry

METHODS = Registry("method", __name__)
