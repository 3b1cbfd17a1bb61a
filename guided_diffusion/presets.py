"""Sets of flags of training, by the names that --preset takes; docs/benchmarks.md has the commands of what they scored.

A plugin adds its own: PRESETS.add("mine", "what it is")("--image_size 64 ...").
"""

from .system.registry import Registry

PRESETS = Registry("preset")

_PUBLISHED_NETWORK = "--image_size 128 --num_res_blocks 2 --num_heads 1 --use_scale_shift_norm False" \
    " --attention_resolutions 16"
_PUBLISHED = f"{_PUBLISHED_NETWORK} --learn_sigma True --prediction eps --diffusion_steps 1000 --noise_schedule linear" \
    " --rescale_learned_sigmas False --rescale_timesteps False --lr 1e-4 --batch_size 20 --ema_rate 0.9999"
# U-Nets small enough for a CPU: they see one channel of the central pixels and predict the mask rather than the noise
_SMALL = "--fit crop --image_channels 1 --num_channels 32 --num_res_blocks 1 --num_heads 1 --attention_resolutions 8" \
    " --num_filters 8,16,32 --prediction xstart --noise_schedule cosine --lr 1e-3 --batch_size 8 --ema_rate 0.999"

PRESETS.add("cimd-published", "as the paper's code, 85.6 million parameters, 132 GFLOP a call at 128 x 128; not scored")(
    f"--num_channels 128 {_PUBLISHED}")
PRESETS.add("cimd-best", "the published network with what scored best in small ones: it predicts the mask, on a cosine"
            " schedule; not scored at this size")(
    f"--num_channels 128 {_PUBLISHED_NETWORK} --prediction xstart --noise_schedule cosine --lr 1e-4 --batch_size 20"
    " --ema_rate 0.9999")
PRESETS.add("cpu-32", "cimd-best in small, 1.2 million parameters, 0.50 GFLOP a call, 10,000 steps; LIDC-IDRI cut to"
            " 32 x 32: GED_16 0.237 [0.215, 0.262]")(
    f"--image_size 32 --channel_mult 1,2,2 --lr_anneal_steps 10000 {_SMALL}")
PRESETS.add("cpu-64", "the same for 64 x 64, 3.0 million parameters, 1.5 GFLOP a call; not scored")(
    f"--image_size 64 --channel_mult 1,1,2,4 --lr_anneal_steps 10000 {_SMALL}")
PRESETS.add("gpu-128", "cimd-published for 100,000 steps; not run")(
    f"--num_channels 128 --max_steps 100000 {_PUBLISHED}")
PRESETS.add("gpu-128-half", "the same with half the channels; not run")(
    f"--num_channels 64 --max_steps 100000 {_PUBLISHED}")
