"""Functions that several test files call."""

import pytest

from guided_diffusion.errors import InputError


def refusal(function, *args, **kwargs):
    """The message of the InputError that a call raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
