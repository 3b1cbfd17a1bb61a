"""Draw an ensemble of plausible outlines for every case of a folder, and write masks and pictures.

    python scripts/segmentation_sample.py --data_dir ./data/testing --num_ensemble 4

The flags of the model are read from flags.json beside the checkpoint. Started on several GPUs, each takes its share
of the cases. Cases that are already complete from the same model, flags and seed are skipped.

With --evaluate True nothing but scores is written: those of segmentation_evaluate.py, without masks on disk.
"""

import os
import shlex
import sys
import time
from datetime import timedelta

import torch
from tqdm.auto import tqdm

from guided_diffusion import checkpoint, dist_util, logger, sample_util
from guided_diffusion.cli import parse_flags, results_folder, run_script
from guided_diffusion.datasets import SegmentationCases
from guided_diffusion.evaluation import Evaluation, report, sub_ensemble_sizes
from guided_diffusion.monitor import Monitor
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.script_util import (
    BEST, apply_stored_flags, autocast_dtype, compile_network, create_model_and_diffusion, defaults, pick,
)


def main():
    args, given = parse_flags("sampling", __doc__)
    dist_util.setup_dist(args.ngpu, args.local_rank)
    rank, world_size = dist_util.rank(), dist_util.world_size()

    with dist_util.all_ranks_or_none():
        folder = results_folder(args)
        model_path = args.model_path or checkpoint.join(folder, checkpoint.NEWEST)
        stored = checkpoint.load_flags(checkpoint.folder_of(model_path))
        apply_stored_flags(args, given, stored, checkpoint.folder_of(model_path))
        dtype = autocast_dtype(args)
        model, diffusion = create_model_and_diffusion(**pick(args, "model", "diffusion"))
        checkpoint.load_model(model, model_path)
        cases = SegmentationCases(args.data_dir, args.image_size, args.image_channels, args.fit,
                                  need_labels=args.evaluate, limit=args.num_samples, progress=rank == 0)
        sizes = sub_ensemble_sizes(defaults("evaluation")["num_samples"], args.num_ensemble, required=False)
        evaluation = Evaluation(sizes, args.seed, device=dist_util.dev()) if args.evaluate else None
        checkpoint.make_folder(folder)

    settings = {**pick(args, "model", "diffusion"), "model": checkpoint.digest(model_path), "seed": args.seed,
                "sampler": args.sampler, "ddim_eta": args.ddim_eta, "clip_denoised": args.clip_denoised,
                "median_blur": args.median_blur}
    fingerprints = {}  # of this process's cases that are still to be drawn, by their number
    for i in range(rank, len(cases), world_size):
        case = cases[i]
        fingerprints[i] = sample_util.fingerprint(case, **settings)
        if not evaluation and sample_util.is_complete(folder, case.name, args.num_ensemble, fingerprints[i]):
            del fingerprints[i]
    todo = sum(dist_util.all_gather_objects(len(fingerprints)))

    # no batch is larger than all there is to draw, whatever is already done and however many processes share it
    auto = args.batch_size == "auto"
    largest = sample_util.largest_batch(dist_util.dev(), args.image_size) if auto else args.batch_size
    batch_size = min(largest, len(cases) * args.num_ensemble)
    model.to(dist_util.dev()).eval().convert_for_sampling(dtype)
    sampler = sample_util.EnsembleSampler(model, diffusion, batch_size=batch_size, seed=args.seed, sampler=args.sampler,
                                          ddim_eta=args.ddim_eta, clip_denoised=args.clip_denoised)
    logger.configure(enabled=rank == 0)
    logger.log("command:", shlex.join(sys.argv))
    logger.log(f"{len(cases)} cases from {args.data_dir}, {len(cases) - todo} of them already complete in {folder};"
               f" {args.num_ensemble} masks each, {sampler.calls} network calls a mask,"
               f" {world_size} process(es) on {dist_util.dev()}")
    if args.compile:
        cuda_graphs = {"mode": "reduce-overhead"} if dist_util.dev().type == "cuda" else {}
        compile_network(model, dist_util.dev(), **cuda_graphs)
    if auto:
        sampler.fit_batch_size(cases[0].image)
        batch_size = sampler.batch_size
        logger.log(f"--batch_size auto: {batch_size}")
    batches = -(-len(fingerprints) * args.num_ensemble // batch_size)
    best = SAMPLERS[BEST["sampler"]][1](BEST["sampling_steps"])
    if sampler.calls > 4 * best and todo:
        seconds = sampler.seconds_a_call(cases[0].image) * sampler.calls * batches
        logger.log(f"this will take about {timedelta(seconds=round(seconds))}; --sampler best takes {best} network"
                   f" calls a mask rather than {sampler.calls}")
    monitor = Monitor(args.visdom_port if rank == 0 else 0, env=os.path.basename(os.path.abspath(folder)))
    start = time.perf_counter()
    with sample_util.BackgroundWriter() as write, \
            tqdm(total=batches * diffusion.num_timesteps, desc="sampling", unit=" steps", dynamic_ncols=True,
                 disable=None if rank == 0 else True) as bar:
        ensembles = sampler.ensembles((cases[i] for i in fingerprints), args.num_ensemble, bar.update)
        for i, (case, samples) in zip(fingerprints, ensembles):
            if evaluation:
                evaluation.add(*case, sample_util.to_masks(samples, args.median_blur))
            else:
                write(sample_util.write_case, folder, case, samples, args.median_blur, fingerprints[i])
            monitor.pictures("scan", torch.from_numpy(case.image[None, :1]), case.name)
            monitor.pictures("ensemble", torch.from_numpy(samples[:8, None]), case.name)
    monitor.close()
    dist_util.barrier()

    seconds, masks = time.perf_counter() - start, todo * args.num_ensemble
    logger.log(f"{todo} cases, {masks} masks" + (f", {seconds / masks:.3g} seconds per mask" if masks else "")
               + ("" if evaluation else f"; look at {checkpoint.join(folder, '*_montage.png')}"))
    if evaluation:
        evaluation.gather()
        if rank == 0:
            logger.log(report(evaluation.write(folder), folder))


if __name__ == "__main__":
    run_script(main)
