"""What a network in training makes of a few fixed cases: ensembles to look at, and their scores."""

import numpy as np
import torch

from .. import dist_util, logger, metrics
from ..data.masks import to_masks
from ..sampling.ensembles import EnsembleSampler, largest_batch

SHOWN = 4  # cases in the panel, and members of theirs
SCORED = 16  # members that are scored
SCORES = ("GED", "CI", "D_max")


class Stopped(Exception):
    """Drawing was broken off."""


class Validation:
    """Draws the same ensembles each time: the noise of a member follows from the seed, the case and its number alone.

    :param cases: a SegmentationCases; of its cases, spread over all, `count` are drawn.
    :param diffusion, sampler: the respaced process and one of samplers.SAMPLERS.
    :param scored: whether to draw SCORED members a case and score them, rather than as many as are shown.
    """

    def __init__(self, cases, diffusion, sampler, count=SHOWN, seed=0, scored=False):
        self.diffusion, self.sampler, self.seed, self.scored = diffusion, sampler, seed, scored
        self.members, self.name = (SCORED, "validation cases") if scored else (SHOWN, "training cases")
        places = np.linspace(0, len(cases) - 1, min(count, len(cases))).round().astype(int)
        self.cases = [cases[i] for i in places]

    def draw(self, model, on_step=lambda *_: None):
        """Draw the ensembles, shared among all ranks.

        :param model: a function that returns the U-Net in evaluation mode, on its device, see
            UNetModel.convert_for_sampling.
        :param on_step: as in EnsembleSampler.draw; may raise Stopped.
        :returns: masks, a list of [n, H, W] bool a case, or None on every rank if one has no memory left for it.
        :raises Stopped: on every rank, if one was stopped.
        """
        mine = self.cases[dist_util.rank()::dist_util.world_size()]
        try:
            network = model()
            largest = largest_batch(next(network.parameters()).device, mine[0].image.shape[-1] if mine else 1)
            sampler = EnsembleSampler(network, self.diffusion, batch_size=min(32, largest), seed=self.seed,
                                      sampler=self.sampler)
            drawn = sampler.ensembles(mine, self.members, on_step)
            masks = [torch.from_numpy(to_masks(samples)) for _, samples in drawn]
        except Stopped:
            masks = "stopped"
        except torch.OutOfMemoryError:
            masks = None
            logger.log("the validation cases are not drawn: the device's memory does not hold them beside training")
        dist_util.at(None)  # the others may have more to draw
        shares = dist_util.all_gather_objects(masks)
        if "stopped" in shares:
            raise Stopped
        if None in shares:
            return None
        return [shares[i % len(shares)][i // len(shares)].numpy() for i in range(len(self.cases))]

    def scores(self, masks):
        """Means over the cases, {"val_GED_16": ..., ...}, if they are to be scored."""
        if not self.scored:
            return {}
        pairs = [metrics.Agreement(drawn, case.raters) for drawn, case in zip(masks, self.cases)]
        return {f"val_{name}_{self.members}": float(np.mean([metrics.SCORES[name](pair) for pair in pairs]))
                for name in SCORES}
