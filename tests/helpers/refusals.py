"""What bad input gets: one line that says what is wrong."""

import pytest

from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.system.errors import InputError


def refusal(function, *args, **kwargs):
    """The message of the InputError that a call raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refused(result, *words, lines=1):
    assert result.code == 2
    assert result.err.count("\n") == lines and result.err.endswith("\n"), result.err
    assert "Traceback" not in result.err + result.out and ": error: " in result.err
    for word in words:
        assert str(word) in result.err, result.err


def problems_of(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        SegmentationCases(*args, **kwargs)
    return str(caught.value)
