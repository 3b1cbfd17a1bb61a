"""Sources of `cimd-prepare`: one file a kind of input, found by itself.

An entry is a class, see prepare.base.Source.
"""

from ..system.registry import Registry

SOURCES = Registry("source", __name__)
