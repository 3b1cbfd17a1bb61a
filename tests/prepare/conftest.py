"""A source for the tests of what brings data into folders."""

import numpy as np
import pytest

from guided_diffusion.data.case_files import find_cases, read_case
from guided_diffusion.data.manifest import rows_of
from guided_diffusion.prepare import SOURCES
from guided_diffusion.prepare.base import LeftOut, PreparedCase, Source, Unit
from guided_diffusion.system.errors import InputError


class Listed(Source):
    """Makes cases of the lines of a text file: "unit patient case case ..."; a case called !... goes wrong."""

    def __init__(self, path, grey=0):
        super().__init__(path)
        self.grey, self.read = grey, []

    def units(self):
        for line in self.path.read_text().splitlines():
            name, patient, *cases = line.split()
            yield LeftOut(name, "is no unit") if name == "-" else Unit(name, patient, cases)

    def cases(self, unit):
        Listed.seen.append(unit.name)
        for case in unit.data:
            if case == "!input":
                raise InputError(f"{unit.name}: is broken; mend it")
            if case == "!error":
                raise ValueError("of a library")
            if case == "!stop":
                raise KeyboardInterrupt
            if case == "!left":
                yield LeftOut(unit.name, "left")
            else:
                yield PreparedCase(case, np.full((1, 4, 6), self.grey, np.uint8), np.ones((2, 4, 6), bool),
                                   {"spacing": (0.5, 0.7), "slice": np.int64(3)})


@pytest.fixture
def listed(monkeypatch):
    """The source "listed"; listed.seen has the names of the units that were read."""
    SOURCES.entries  # noqa: B018 - finds those of the package first
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES.entries))
    SOURCES.add("listed", "lines of a file")(Listed)
    Listed.seen = []
    return Listed


@pytest.fixture
def prepared():
    """prepared(folder) -> {name of a case: (image, raters, row of the manifest)} of a folder that training reads."""
    def read(folder):
        cases = find_cases(folder)
        rows = rows_of(cases)
        return {case.name: (*read_case(case)[:2], rows[case.name]) for case in cases}

    return read
