"""Networks: one file a network, found by itself; `docs/extending.md` shows how to add one.

An entry is called as NETWORKS[name](flags, x_channels, out_channels) and returns the network, an nn.Module:

    flags          a namespace with image_size, image_channels and the entry's own flags
    x_channels     channels of what it sees beside the scan, the noisy mask x_t; 0 if it sees the scan alone
    out_channels   channels of what it returns

:raises InputError: for flags that make no network, naming them.

It may have an attribute idle_flags, which takes flags and returns those without effect, as Method.idle_flags does.

For methods of diffusion it is a denoiser; networks.base.Denoiser says what these answer to.
"""

from ..system.registry import Registry

NETWORKS = Registry("network", __name__)
