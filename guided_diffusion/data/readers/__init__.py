"""Readers: one file a file format, found by itself; `docs/extending.md` shows how to add one.

An entry is a class, see readers.base.Reader. The suffix of a file chooses its reader.
"""

from ...system.registry import Registry

READERS = Registry("reader", __name__)
