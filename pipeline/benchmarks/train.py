"""Training: one optimiser step, against the same step as PyTorch computes it by default and against the machine."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.benchmarks.ceilings import Ceilings
from pipeline.benchmarks.flops import count_flops, largest_convolution
from pipeline.benchmarks.made import CLASSES, photographs
from pipeline.benchmarks.measured import Measured
from pipeline.benchmarks.published import TRAINING, published_fit
from pipeline.benchmarks.timing import interleaved, medians
from pipeline.config import Config
from pipeline.features import FeatureExtractor
from pipeline.fit import Fit


def measure_train(
    config: Config, device: torch.device, *, steps: int, matrix_side: int, rounds: int, shortest_s: float = 0.2
) -> Measured:
    """So many of our steps and one of the baseline's, a few rounds in turn."""
    training = config.training
    count = max(CLASSES, 2 * training.batch_size)
    images = photographs(count, config.scoring.map_size)
    labels = np.arange(count) % CLASSES if config.joint else None
    folded, as_published = (FeatureExtractor.of(config.features, context=False, folded=each) for each in (True, False))
    ours = Fit(config, images, folded, labels=labels, device=device)
    baseline = published_fit(config, images, as_published, labels=labels, device=device)
    flops = count_flops(ours.advance)
    largest = largest_convolution(baseline.denoiser.unet, baseline.advance)
    ceilings = Ceilings.of(largest, matrix_side, device, backward=True)
    samples = interleaved(
        {
            "ours": lambda: [ours.advance() for _ in range(steps)],
            "baseline": baseline.advance,
        }
        | ceilings.work(),
        rounds=rounds,
        device=device,
        shortest_s=shortest_s,
    )
    middle = medians(samples)
    step = middle["ours"] / steps
    return Measured(
        sizes={
            "preset": config.preset,
            "device": str(device),
            "batch": training.batch_size,
            "steps_a_round": steps,
            "rounds": rounds,
            "map_size": config.scoring.map_size,
            "network_side": config.network.image_size,
            "million_parameters": round(sum(p.numel() for p in ours.denoiser.unet.parameters()) / 1e6, 1),
            "precision": training.precision,
            "iterations": training.iterations,
        }
        | ceilings.sizes(),
        figures={
            "seconds_per_step": step,
            "baseline_seconds_per_step": middle["baseline"],
            "speedup": middle["baseline"] / step,
            "images_per_second": training.batch_size / step,
            "minutes_for_all_iterations": training.iterations * step / 60,
            "gflop_per_step": flops["Global"] / 1e9,
        }
        | ceilings.figures(middle, flops["Global"] / step),
        samples=samples,
        notes=(TRAINING, "the convolution's ceiling includes its gradients; minutes are of steps alone"),
    )
