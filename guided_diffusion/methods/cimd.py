"""The networks of CIMD in training, and their joint loss."""

from torch import nn
from torch.distributions import kl_divergence


class CIMD(nn.Module):
    """U-Net, AMN and ACN with their joint loss (CIMD, section 3): one module, so that DDP wraps it once.

    :param model: the denoiser, called as model(x_t, timesteps, image=image).
    :param posterior: AMN, q(z | image, rater's mask); None trains the denoiser alone.
    :param prior: ACN, p(z | image, predicted mask).
    """

    def __init__(self, diffusion, model, posterior=None, prior=None, kl_weight=0.0):
        super().__init__()
        self.diffusion, self.kl_weight = diffusion, kl_weight
        self.model, self.posterior, self.prior = model, posterior, prior

    def forward(self, image, mask, t, noise):
        """image: [N, C, H, W] in [0, 1]; mask x_0, noise: [N, 1, H, W]; t: [N].

        Returns a dict of losses [N]: loss = mse + vb + kl_weight * kl, and its parts.
        """
        terms = self.diffusion.training_losses(self.model, mask, t, model_kwargs={"image": image}, noise=noise)
        pred_xstart = terms.pop("pred_xstart")
        if self.posterior is not None:
            # the noisier x_t, the wilder the unclipped prediction of a noise-predicting network
            pred_mask = pred_xstart.clamp(*self.diffusion.x_range)
            terms["kl"] = kl_divergence(self.posterior(image, mask), self.prior(image, pred_mask))
            terms["loss"] = terms["loss"] + self.kl_weight * terms["kl"]
        return terms
