"""The whole job: a night's archives on storage to Parquet, against the model alone on photographs in memory."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import torch

from pipeline.archives import find_archives
from pipeline.batch import score_archives
from pipeline.batch_plan import BatchPlan, Workers
from pipeline.benchmarks.made import photographs
from pipeline.benchmarks.measured import Measured
from pipeline.benchmarks.timing import interleaved, medians, timed
from pipeline.images import encode_png
from pipeline.model_store import model_info, new_version
from pipeline.model_versions import publish
from pipeline.model_weights import load_scorer, save_model
from pipeline.resources import Resources
from pipeline.scoring import Scorer
from pipeline.shard_reading import decode_shard, list_archive, read_unit
from pipeline.shard_scoring import ScoringActor
from pipeline.storage import Location
from pipeline.totals import ShardOutcome

CATEGORY = "made"
DISTINCT = 64
"""Photographs that are made; the archives hold them again and again."""
ARCHIVE_IMAGES = 128


def store_night(storage: Location, scorer: Scorer, *, images: int, side: int) -> None:
    """The model, and tars of that many PNG photographs."""
    version = new_version(scorer.config, datetime.now(UTC))
    save_model(storage / "models", CATEGORY, version, scorer, None, {})
    publish(storage / "models", CATEGORY, version)
    files = [encode_png(photograph) for photograph in photographs(min(DISTINCT, images), side)]
    for start in range(0, images, ARCHIVE_IMAGES):
        members = [files[i % len(files)] for i in range(start, min(images, start + ARCHIVE_IMAGES))]
        archive = storage / "archives" / f"category={CATEGORY}" / f"{start:06d}.tar"
        archive.write_bytes(tar_of(members))


def tar_of(files: Sequence[bytes]) -> bytes:
    """A tar of PNG files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, data in enumerate(files):
            member = tarfile.TarInfo(f"{i:06d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def night_plan(storage: Location, *, shard_images: int) -> BatchPlan:
    """Scoring all that `store_night` stored."""
    archives = find_archives([(storage / "archives").uri], category=None)
    return BatchPlan(
        archives=tuple(archive.fingerprinted() for archive in archives),
        models={CATEGORY: model_info(storage / "models", CATEGORY)},
        results=storage / "results",
        night="2026-01-31",
        map_format="float16",
        shard_images=shard_images,
        started=datetime.now(UTC),
    )


def measure_night(
    storage: Location,
    scorer: Scorer,
    resources: Resources,
    *,
    images: int,
    side: int,
    shard_images: int,
    actors: int,
    rounds: int,
) -> Measured:
    """Store a night of two shards an actor or more, score it by the job, and before and after it the model alone from memory."""
    store_night(storage, scorer, images=images, side=side)
    plan = night_plan(storage, shard_images=shard_images)
    workers = resources.scoring_workers(actors)
    scorer = load_scorer(plan.models[CATEGORY], device="cuda" if workers.gpus_per_actor else "cpu")
    before = model_only(scorer, workers, rounds)
    commits: list[ShardOutcome] = []
    began = time.time()
    totals = score_archives(plan, workers, commits.append)
    elapsed = time.time() - began
    assert totals.scored == images and not totals.failed, totals
    after = model_only(scorer, workers, rounds)
    samples = {name: values + after[name] for name, values in before.items()}
    return Measured(
        sizes={
            "preset": scorer.config.preset,
            "storage": "S3" if storage.is_s3 else "local disk",
            "images": images,
            "side": side,
            "map_size": scorer.config.scoring.map_size,
            "batch": scorer.config.scoring.batch_size,
            "shard_images": shard_images,
            "actors": workers.actors,
            "threads_of_an_actor": workers.threads,
            "gib": round(totals.bytes / 2**30, 3),
        },
        figures=night_figures(images, began, elapsed, commits, samples, scorer.config.scoring.batch_size, workers)
        | stage_costs(replace(plan, results=storage / "alone"), workers),
        samples=samples,
        notes=(
            "elapsed begins when Ray runs and ends with the run's record: actors start and load the model within it; "
            "steady is from the first commit, or as many commits as actors, to the last",
            "steady actors work while they score and commit; what a stage costs is measured alone, after the run, on one shard",
            "model only: all cores of this machine, or the threads of an actor, times the actors",
            "an S3 server here shares the machine with the job",
        ),
    )


def night_figures(
    images: int,
    began: float,
    elapsed: float,
    commits: Sequence[ShardOutcome],
    samples: Mapping[str, list[float]],
    batch: int,
    workers: Workers,
) -> dict[str, float]:
    """What the job reached, in images per second, as shares of the model alone, and how busy its actors were.

    began, elapsed: of the whole job, seconds since 1970 and seconds. samples: what model_only found.
    """
    seconds = medians(samples)
    at_once = workers.actors if workers.gpus_per_actor else 1  # a scorer takes one GPU, or all cores
    machine_rate = at_once * batch / seconds["all_cores"]
    actors_rate = workers.actors * batch / seconds["actors_threads"]
    whole, (steady, working) = images / elapsed, steady_state(commits, workers.actors)
    return {
        "images_per_second": whole,
        "steady_images_per_second": steady,
        "model_only_images_per_second": machine_rate,
        "model_only_at_actors_threads_images_per_second": actors_rate,
        "fraction_of_model_only": whole / machine_rate,
        "steady_fraction_of_model_only": steady / machine_rate,
        "steady_fraction_of_model_only_at_actors_threads": steady / actors_rate,
        "actors_working_fraction": working,
        "actors_waiting_fraction": 1 - working,
        "first_commit_seconds": min(outcome.committed for outcome in commits if outcome.scored) - began,
        "elapsed_seconds": elapsed,
    }


def model_only(scorer: Scorer, workers: Workers, rounds: int) -> dict[str, list[float]]:
    """Seconds of a full batch in memory, with all the machine's cores and with an actor's."""
    images = photographs(scorer.config.scoring.batch_size, scorer.config.scoring.map_size)
    every = torch.get_num_threads()

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        scorer.score(images)

    try:
        return interleaved(
            {"all_cores": lambda: with_threads(every), "actors_threads": lambda: with_threads(workers.threads)},
            rounds=rounds,
            device=scorer.device,
        )
    finally:
        torch.set_num_threads(every)


def steady_state(commits: Sequence[ShardOutcome], actors: int) -> tuple[float, float]:
    """Of the time from the first commit, or with several actors from as many commits, to the last, which is what a long night is
    like: images per second, and the share in which the actors worked, both by the actors' clocks. (What the other actors have
    nearly finished at the first commit is no work of the time after it.)"""
    ordered = sorted((outcome.committed, outcome.scored, outcome.seconds) for outcome in commits if outcome.scored)
    lasted = ordered[-1][0] - ordered[actors - 1][0]
    images, working = (sum(values) for values in list(zip(*ordered[actors:], strict=True))[1:])
    return images / lasted, working / (actors * lasted)


def stage_costs(plan: BatchPlan, workers: Workers) -> dict[str, float]:
    """Milliseconds an image of each stage with nothing beside it, by the clock and of all its threads' CPU time."""
    unit = next(row for row in list_archive({"archive": 0, "committed": []}, plan=plan) if row["unit"])
    every = torch.get_num_threads()
    try:
        actor = ScoringActor(plan, workers)
        for _ in range(2):  # the first shard pays for loading the model and for connecting
            shard, reading = timed(lambda: next(read_unit(unit, plan=plan)))
            decoded, decoding = timed(partial(decode_shard, shard, plan=plan))
            _, scoring = timed(partial(actor, decoded))
    finally:
        torch.set_num_threads(every)
    stages = {"read": reading, "decode": decoding, "score_and_commit": scoring}
    return {
        f"{stage}_{kind}_per_image": 1000 * seconds / len(shard["names"])
        for stage, pair in stages.items()
        for kind, seconds in zip(("ms", "cpu_ms"), pair, strict=True)
    }
