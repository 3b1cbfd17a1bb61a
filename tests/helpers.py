"""Functions that several test files call."""

import pytest

from guided_diffusion import checkpoint, dist_util
from guided_diffusion.system.errors import InputError

# flags of a U-Net and a diffusion process that train and sample in a moment
MODEL = dict(image_size=16, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="8",
             num_heads=1, diffusion_steps=30)


def refusal(function, *args, **kwargs):
    """The message of the InputError that a call raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def gather_into(part, parts, monkeypatch, folder):
    """Gather the Evaluations `parts`, each as of a process of its own, into one of them."""
    sent = []
    monkeypatch.setattr(dist_util, "all_gather_objects", lambda value: [sent.append(value)] and [value])
    for each in parts:
        each.gather()
    checkpoint.save(folder / "sent", sent)  # as plain values and tensors, which need no pickle
    monkeypatch.setattr(dist_util, "all_gather_objects", lambda _: checkpoint.load(folder / "sent"))
    part.gather()
