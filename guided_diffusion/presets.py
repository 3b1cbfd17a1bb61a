"""Sets of flags of training, by the names that --preset takes, beside what each was measured to score.

docs/benchmarks.md has the commands of the scores. A plugin adds its own:

    PRESETS.add("mine", "what it is, and its score")("--image_size 64 --num_channels 32")
"""

from .system.registry import Registry

PRESETS = Registry("preset")

# the network of the paper's code, but for its width
_LARGE = """--method cimd --image_size 128 --num_res_blocks 2 --num_heads 1 --use_scale_shift_norm False
    --attention_resolutions 16 --lr 1e-4 --batch_size 20 --ema_rate 0.9999"""
_PUBLISHED = f"""{_LARGE} --learn_sigma True --prediction eps --diffusion_steps 1000 --noise_schedule linear
    --rescale_learned_sigmas False --rescale_timesteps False"""
# U-Nets small enough for a CPU: they see one channel of the central pixels and predict the mask rather than the noise
_SMALL = """--method cimd --fit crop --image_channels 1 --num_channels 32 --num_res_blocks 1 --num_heads 1
    --attention_resolutions 8 --num_filters 8,16,32 --prediction xstart --noise_schedule cosine --lr 1e-3
    --lr_anneal_steps 10000 --batch_size 8 --ema_rate 0.999"""

PRESETS.add("cimd-published", "as the paper's code; 85.6 million parameters, 132 GFLOP a call; not scored")(
    f"--num_channels 128 {_PUBLISHED}")
PRESETS.add("cimd-best", "the same network with what scored best in cpu-32: it predicts the mask, on a cosine schedule;"
            " not scored at this size")(
    f"--num_channels 128 {_LARGE} --prediction xstart --noise_schedule cosine")
PRESETS.add("cpu-32", "CIMD of 1.2 million parameters, 0.50 GFLOP a call, for the central 32 x 32 pixels; GED_16 of"
            " LIDC-IDRI cut so: 0.237 [0.215, 0.262]")(
    f"--image_size 32 --channel_mult 1,2,2 {_SMALL}")
PRESETS.add("cpu-64", "CIMD with the network of energy and without AMN and ACN, for the central 64 x 64 pixels; 4.4"
            " million parameters, 2.0 GFLOP a call; about an hour of one CPU core; GED_16 of LIDC-IDRI cut so: 0.252"
            " [0.229, 0.274]")(
    """--method cimd --image_size 64 --image_channels 1 --fit crop --pixel_unshuffle 2 --num_channels 64
    --channel_mult 1,2,2 --num_res_blocks 1 --attention_resolutions 8 --use_scale_shift_norm False --prediction xstart
    --noise_schedule cosine --kl_weight 0 --batch_size 16 --optimizer muon --lr 1e-3 --lr_warmup 100
    --lr_anneal_steps 2400 --grad_clip 1 --weight_decay 0.1 --ema_rate 0.999 --augment flips,rot90,affine,intensity""")
PRESETS.add("gpu-128", "cimd-published for 100,000 steps; not run")(
    f"--num_channels 128 --max_steps 100000 {_PUBLISHED}")
PRESETS.add("gpu-128-half", "gpu-128 with half the channels; not run")(
    f"--num_channels 64 --max_steps 100000 {_PUBLISHED}")
PRESETS.add("probunet", "the Probabilistic U-Net at half its published width, for the central 64 x 64 pixels; an hour"
            " of one CPU core; not scored")(
    """--method probunet --network conv_unet --conv_unet_filters 16,32,64,96 --probunet_filters 16,32,64,96 --beta 10
    --fit crop --image_size 64 --image_channels 1 --batch_size 8 --lr 1e-3 --lr_anneal_steps 20000 --ema_rate 0.999""")
# what lies beyond the central 64 x 64 pixels of a LIDC-IDRI patch is outlined in one slice of a hundred
PRESETS.add("energy", "--method energy for the central 64 x 64 of 128 x 128 pixels; 4.9 million parameters, 2.4 GFLOP a"
            " scan; two and a half hours of one CPU core; not scored from scratch")(
    """--method energy --image_size 128 --image_channels 1 --field_of_view 64 --pixel_unshuffle 2 --num_channels 64
    --channel_mult 1,2,2 --num_res_blocks 1 --attention_resolutions 8 --use_scale_shift_norm False --batch_size 16
    --presence_channels 16 --presence_views True --smallest_part 0.1 --energy_dummy 0.5 --optimizer muon --lr 1e-3
    --lr_anneal_steps 10000 --grad_clip 1 --weight_decay 0.1 --ema_rate 0.999 --augment flips,rot90,affine,intensity""")
