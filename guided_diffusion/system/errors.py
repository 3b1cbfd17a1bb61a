"""The one exception that speaks to the user."""

import os
from collections.abc import Sequence

MAX_PROBLEMS_SHOWN = 100


class InputError(Exception):
    """Something the user gave cannot be used. The message is one sentence naming the file or flag and the remedy.

    Scripts print it without a traceback and leave with exit code 2; if `on_every_rank`, only rank 0 prints it.
    """

    def __init__(self, message: str, on_every_rank: bool = False):
        super().__init__(message)
        self.on_every_rank = on_every_rank


def raise_problems(problems: Sequence[str], where: str | os.PathLike) -> None:
    """Raise one InputError that lists all these messages, one a line and each once; none at all is fine."""
    problems = [*dict.fromkeys(problems)]  # all slices of a volume have the same
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        rest = len(problems) - MAX_PROBLEMS_SHOWN
        raise InputError("\n  ".join([f"{len(problems)} problems in {where}:", *problems[:MAX_PROBLEMS_SHOWN],
                                      *([f"... and {rest} more"] if rest > 0 else [])]))
