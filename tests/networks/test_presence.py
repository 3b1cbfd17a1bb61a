"""The network that says whether anything is marked."""

import pytest
import torch

from guided_diffusion.networks.presence import PresenceNetwork


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 2, 18, 22)])
def test_the_network_of_presence_takes_scans_of_any_even_sides(shape):
    torch.manual_seed(0)
    network = PresenceNetwork(shape[1], 8).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    image = torch.rand(shape)
    logits = network(image)
    assert logits.shape == shape[:1] and logits.std() > 0
    torch.testing.assert_close(network(image[1:2]), logits[1:2])
    calls = torch.stack([network.train()(image) for _ in range(20)])
    assert (calls.std(0) > 0).all()  # dropout
