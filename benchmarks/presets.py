"""Training recipes that the benchmarks know by name; the scores measured for them are in docs/benchmarks.md."""

# U-Nets small enough for a CPU: they see one channel of the central pixels and predict the mask rather than the noise
_SMALL = ("--fit crop --image_channels 1 --num_channels 32 --num_res_blocks 1 --num_heads 1 --attention_resolutions 8"
          " --num_filters 8,16,32 --predict_xstart True --noise_schedule cosine --lr 1e-3 --batch_size 8"
          " --ema_rate 0.999 --use_bf16 {bf16}")
# as published
_FULL = ("--image_size 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True --use_scale_shift_norm False"
         " --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear --lr 1e-4 --batch_size 20"
         " --ema_rate 0.9999 --use_bf16 {bf16}")

PRESETS = {
    # 1.2 million parameters, 0.50 GFLOP a forward pass; about 15 minutes on two CPU cores
    "cpu-32": "--image_size 32 --channel_mult 1,2,2 --lr_anneal_steps 10000 " + _SMALL,
    # 3.0 million parameters, 1.5 GFLOP
    "cpu-64": "--image_size 64 --channel_mult 1,1,2,4 --lr_anneal_steps 10000 " + _SMALL,
    # 85.6 million parameters, 132 GFLOP
    "gpu-128": "--num_channels 128 --max_steps 100000 " + _FULL,
    "gpu-128-half": "--num_channels 64 --max_steps 100000 " + _FULL,
}
