"""Scoring: photographs in memory to maps and scores, against the published recipe and against the machine."""

from __future__ import annotations

from pipeline.benchmarks.ceilings import Ceilings
from pipeline.benchmarks.flops import count_flops, largest_convolution
from pipeline.benchmarks.made import photographs
from pipeline.benchmarks.measured import Measured
from pipeline.benchmarks.published import KINDER, SCORING, PublishedScorer
from pipeline.benchmarks.timing import interleaved, medians
from pipeline.scoring import Scorer


def measure_score(
    scorer: Scorer, *, batches: int, baseline_images: int, matrix_side: int, rounds: int, shortest_s: float = 0.2
) -> Measured:
    """Score so many full batches, and so many single photographs as published, a few rounds in turn."""
    scoring, device = scorer.config.scoring, scorer.device
    count = batches * scoring.batch_size
    images = photographs(count, scoring.map_size)
    published = PublishedScorer(scorer)
    one_batch = images[: scoring.batch_size]
    flops = {name: total / len(one_batch) for name, total in count_flops(lambda: scorer.score(one_batch)).items()}
    largest = largest_convolution(scorer.source.denoiser.unet, lambda: scorer.score(one_batch))
    ceilings = Ceilings.of(largest, matrix_side, device)
    samples = interleaved(
        {
            "ours": lambda: scorer.score(images),
            "baseline": lambda: published.score(images[:baseline_images]),
        }
        | ceilings.work(),
        rounds=rounds,
        device=device,
        shortest_s=shortest_s,
    )
    middle = medians(samples)
    ours, baseline = count / middle["ours"], baseline_images / middle["baseline"]
    return Measured(
        sizes={
            "preset": scorer.config.preset,
            "device": str(device),
            "batch": scoring.batch_size,
            "images_a_round": count,
            "baseline_images_a_round": baseline_images,
            "rounds": rounds,
            "map_size": scoring.map_size,
            "network_side": scorer.config.network.image_size,
            "noise_scales": len(scoring.timesteps),
            "million_parameters": round(sum(p.numel() for p in scorer.denoiser.unet.parameters()) / 1e6, 1),
            "precision": scorer.config.training.precision,
            "covariance": scoring.covariance,
            "reach": scoring.place_reach or 0,
            "context_weight": scoring.context_weight or 0.0,
        }
        | ceilings.sizes(),
        figures={
            "images_per_second": ours,
            "baseline_images_per_second": baseline,
            "speedup": ours / baseline,
            "gflop_per_image": flops["Global"] / 1e9,
            "gflop_per_image_unet": flops["UNet"] / 1e9,
            "gflop_per_image_extractor": flops["FeatureExtractor"] / 1e9,
        }
        | ceilings.figures(middle, ours * flops["Global"]),
        samples=samples,
        notes=(SCORING, KINDER, "both ceilings are bfloat16 and measured in turn with the rest"),
    )
