"""The one exception that speaks to the user."""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one sentence naming the file or flag and the remedy.

    Scripts print it without a traceback and leave with exit code 2; if `on_every_rank`, only rank 0 prints it.
    """

    def __init__(self, message, on_every_rank=False):
        super().__init__(message)
        self.on_every_rank = on_every_rank
