"""The streaming scoring job on Ray Data: archives -> units -> shards -> decode -> score -> Parquet.

One row of the stream is one shard. The stages run side by side under Ray Data's back-pressure; a shard is committed by
the scoring actor that computed it, so a crash anywhere costs at most the shards in flight. One more row for each archive
says how many members it has: that must equal what was scored plus what failed.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from pipeline.archive_members import ARCHIVE_ERRORS
from pipeline.archives import Archive, Failure, image_id, read_shards, read_units, shard_name
from pipeline.errors import UserError
from pipeline.images import ImageError, decode, resize
from pipeline.model_store import ModelInfo, load_scorer
from pipeline.night_reading import iter_rows
from pipeline.results import FailureRow, MapFormat, Region, ScoreRow, finished_shards, write_run, write_shard
from pipeline.run_record import run_record
from pipeline.scoring import Scorer, find_regions
from pipeline.storage import Location
from pipeline.storage_errors import STORAGE_ERRORS
from pipeline.telemetry import ScoringTelemetry

LISTING_TASKS = 4
"""At once. A directory of 100 000 members is listed in a second or two, and is work for many readers."""

DECODE_THREADS = 4
"""Decoders release Python's lock; a few threads also hide the copies around them."""


@dataclass(frozen=True)
class BatchPlan:
    """One run: what is scored by which models, and where the rows go. Plain values, so that it travels."""

    archives: tuple[Archive, ...]
    models: dict[str, ModelInfo]
    """One per category of the archives."""
    results: Location
    night: str
    map_format: MapFormat
    shard_images: int
    started: datetime
    """The run's time, written as every row's `scored_at`."""
    max_failure_fraction: float = 1.0
    """More failed images of a category than this, 0 to 1, make the run's exit status 1."""

    def suffix(self, archive: Archive) -> str:
        """The part of a shard's file name that says what it was made of: content of the archive, shard size and model.

        Where one of them changes, the archive is scored anew beside what is there.
        """
        cut = hashlib.sha256(f"{archive.fingerprint} {self.shard_images}".encode()).hexdigest()[:8]
        return f"-{cut}-{self.models[archive.category].version}"


@dataclass(frozen=True)
class Workers:
    """Scoring actors and what each of them holds."""

    actors: int
    threads: int
    """Of each actor."""
    cpus_per_actor: float
    """What Ray sets aside for each actor."""
    gpus_per_actor: float


@dataclass(frozen=True)
class ShardOutcome:
    """What became of one shard (or, with shard None, how many members its archive had and how many shards)."""

    archive: int
    shard: str | None
    members: int
    scored: int = 0
    failed: int = 0
    anomalous: int = 0
    shards: int = 0
    """Shards that there are to score; only on an archive's own row."""
    skipped: int = 0
    """Shards that an earlier run had finished; only on an archive's own row."""
    error: str = ""
    """Why the shard, or the rest of the archive, could not be scored at all; the next run tries again."""
    category: str = ""
    """Of the archive."""
    bytes: int = 0
    """Encoded bytes of the shard's images."""
    failures: str = "{}"
    """How many images failed by error code, as JSON: a dictionary would change its type from row to row."""


def list_archive(row: dict[str, Any], plan: BatchPlan) -> Iterator[dict[str, Any]]:
    """Stage 1, one archive -> its unfinished units, and the row of its totals where they are known by now.

    This stage and the next give the same rows whenever they are called with the same row: Ray matches a retried
    task's output by position.
    """
    archive = plan.archives[row["archive"]]
    finished = _finished(row, plan)
    own = {"archive": row["archive"], "committed": [], "unit": b"", "totals": "", "error": ""}
    try:
        units = read_units(archive, shard_images=plan.shard_images)
        _require_unchanged(archive)
    except STORAGE_ERRORS as failure:
        yield own | {"totals": json.dumps([0, 0, len(finished)]), "error": _storage_error(archive, failure)}
        return
    members, shards = 0, 0
    for unit in units:
        if unit.entries is None:
            yield own | {"unit": pickle.dumps(unit), "committed": row["committed"]}
            return
        if shard_name(archive, unit.index) not in finished:
            members += len(unit.entries)
            shards += 1
            yield own | {"unit": pickle.dumps(unit)}
    yield own | {"totals": json.dumps([members, shards, len(finished)])}


def read_unit(row: dict[str, Any], plan: BatchPlan) -> Iterator[dict[str, Any]]:
    """Stage 2, one unit -> its unfinished shards as rows of encoded images; for a tar then the row of its totals."""
    archive = plan.archives[row["archive"]]
    nothing = {"archive": row["archive"], "shard": "", "names": [], "data": [], "failures": "[]", "error": row["error"]}
    if not row["unit"]:
        yield nothing | {"failures": row["totals"]}
        return
    unit = pickle.loads(row["unit"])
    finished, suffix = _finished(row, plan), plan.suffix(archive)
    shards, members, error = 0, 0, ""
    try:
        for shard in read_shards(archive, unit, shard_images=plan.shard_images, skip=finished):
            _require_unchanged(archive)
            members += len(shard.members)
            shards += 1
            yield {
                "archive": row["archive"],
                "shard": shard.name + suffix,
                "names": [member.name for member in shard.members],
                "data": [member.data or b"" for member in shard.members],
                "failures": json.dumps([member.failure and asdict(member.failure) for member in shard.members]),
                "error": "",
            }
    except STORAGE_ERRORS as failure:
        # The storage gave up in the middle: what came before stands, the rest is for the next run.
        error = _storage_error(archive, failure)
    if unit.entries is None:
        yield nothing | {"failures": json.dumps([members, shards, len(finished)]), "error": error}
    elif error:
        yield nothing | {"shard": shard_name(archive, unit.index) + suffix, "error": error}


def _finished(row: dict[str, Any], plan: BatchPlan) -> set[str]:
    """Names of the archive's shards that are committed, as the archive itself calls them."""
    suffix = plan.suffix(plan.archives[row["archive"]])
    return {name.removesuffix(suffix) for name in row["committed"]}


def _require_unchanged(archive: Archive) -> None:
    """Raises OSError where the file is not the one that the plan was made for: rows of two versions must not mix."""
    if archive.kind != "folder" and archive.location.fingerprint() != archive.fingerprint:
        raise OSError("it was replaced after the run began")


def _storage_error(archive: Archive, error: Exception) -> str:
    return f"{archive.location}: {' '.join(str(error).split())}"


def committed_shards(plan: BatchPlan, archive: Archive) -> list[str]:
    """Names of the archive's shards that the plan's model has scored, in this run or an earlier one; sorted."""
    return _own_shards(plan, archive, finished_shards(plan.results, category=archive.category, night=plan.night))


def all_committed_shards(plan: BatchPlan) -> list[list[str]]:
    """The same of every archive, in their order; the results of a category are listed once."""
    done = {c: finished_shards(plan.results, category=c, night=plan.night) for c in plan.models}
    return [_own_shards(plan, archive, done[archive.category]) for archive in plan.archives]


def _own_shards(plan: BatchPlan, archive: Archive, finished: set[str]) -> list[str]:
    suffix = plan.suffix(archive)
    return sorted(name for name in finished if name.startswith(f"{archive.name}-") and name.endswith(suffix))


def decode_shard(row: dict[str, Any], plan: BatchPlan) -> dict[str, Any]:
    """Stage 3, encoded images -> one block of uint8 photographs at the model's map size; what fails joins the failures."""
    decoded = {"archive": row["archive"], "shard": row["shard"], "error": row["error"]}
    if row["error"] or not row["shard"]:
        return decoded | {"names": [], "sizes": b"", "images": b"", "bytes": 0, "failures": row["failures"]}
    size = plan.models[plan.archives[row["archive"]].category].config.scoring.map_size

    def one(data: bytes, failure: dict[str, str] | None) -> tuple[np.ndarray, tuple[int, int]] | Failure:
        if failure is not None:
            return Failure(**failure)
        try:
            image = decode(data)
            return resize(image, size), (image.shape[1], image.shape[0])
        except ImageError as error:
            return Failure("decode", error.error, error.detail)

    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        found = list(pool.map(one, row["data"], json.loads(row["failures"])))
    good = [(name, item) for name, item in zip(row["names"], found, strict=True) if not isinstance(item, Failure)]
    bad = [(name, item) for name, item in zip(row["names"], found, strict=True) if isinstance(item, Failure)]
    return decoded | {
        "names": [name for name, _ in good],
        "sizes": np.array([size for _, (_, size) in good], np.int32).tobytes(),
        "images": b"".join(image.tobytes() for _, (image, _) in good),
        "bytes": sum(map(len, row["data"])),
        "failures": json.dumps([(name, asdict(failure)) for name, failure in bad]),
    }


class ScoringActor:
    """Stage 4, photographs -> maps, scores and regions, committed as the shard's files. Loads each model once."""

    def __init__(self, plan: BatchPlan, workers: Workers) -> None:
        torch.set_num_threads(workers.threads)
        self.plan = plan
        self.device = "cuda" if workers.gpus_per_actor > 0 else "cpu"
        self.scorers: dict[str, Scorer] = {}
        self.telemetry = ScoringTelemetry()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One shard's outcome as a row."""
        clock = time.monotonic()
        category = self.plan.archives[row["archive"]].category
        if not row["shard"]:
            members, shards, skipped = json.loads(row["failures"])
            return asdict(
                ShardOutcome(
                    *(row["archive"], None, members),
                    shards=shards,
                    skipped=skipped,
                    error=row["error"],
                    category=category,
                )
            )
        if row["error"]:
            return asdict(ShardOutcome(row["archive"], row["shard"], members=0, error=row["error"], category=category))
        failures = [(name, Failure(**failure)) for name, failure in json.loads(row["failures"])]
        outcome = ShardOutcome(row["archive"], row["shard"], len(row["names"]) + len(failures), category=category)
        try:
            anomalous = self._score(row, failures)
        except (UserError, *STORAGE_ERRORS) as error:
            return asdict(replace(outcome, error=" ".join(str(error).split())))
        scored, read, codes = len(row["names"]), row["bytes"], Counter(failure.error for _, failure in failures)
        seconds = time.monotonic() - clock
        self.telemetry.shard(category, scored=scored, anomalous=anomalous, failed=codes, read=read, seconds=seconds)
        counts = {"scored": scored, "failed": len(failures), "anomalous": anomalous, "bytes": read}
        return asdict(replace(outcome, **counts, failures=json.dumps(codes)))

    def _scorer(self, category: str) -> Scorer:
        if category not in self.scorers:
            self.scorers[category] = load_scorer(self.plan.models[category], device=self.device)
        return self.scorers[category]

    def _score(self, row: dict[str, Any], failures: list[tuple[str, Failure]]) -> int:
        """Score and commit one shard; returns how many of its images are anomalous."""
        plan, archive = self.plan, self.plan.archives[row["archive"]]
        names, scores, maps = row["names"], [], None
        if len(names):
            scorer = self._scorer(archive.category)
            calibration = scorer.calibration
            assert calibration is not None
            side = scorer.config.scoring.map_size
            sizes = np.frombuffer(row["sizes"], np.int32).reshape(-1, 2)
            result = scorer.score(np.frombuffer(row["images"], np.uint8).reshape(-1, side, side, 3))
            maps = result.maps
            for i, name in enumerate(names):
                width, height = (int(length) for length in sizes[i])
                regions = [
                    _on_photograph(region, width / side, height / side)
                    for region in find_regions(maps[i], calibration.pixel_threshold)
                ]
                scores.append(
                    ScoreRow(
                        image_id=image_id(archive.location.uri, name),
                        archive=archive.location.uri,
                        member=name,
                        width=width,
                        height=height,
                        score=float(result.scores[i]),
                        kl_score=float(result.kl_scores[i]),
                        feature_score=float(result.feature_scores[i]),
                        threshold=calibration.threshold,
                        is_anomalous=bool(result.scores[i] > calibration.threshold),
                        regions=tuple(regions),
                        model_version=plan.models[archive.category].version,
                        scored_at=plan.started,
                    )
                )
        write_shard(
            plan.results,
            category=archive.category,
            night=plan.night,
            shard=row["shard"],
            scores=scores,
            maps_nhw=maps,
            failures=[
                FailureRow(
                    image_id(archive.location.uri, name),
                    archive.location.uri,
                    name,
                    failure.stage,
                    failure.error,
                    failure.detail,
                )
                for name, failure in failures
            ],
            map_format=plan.map_format,
        )
        return sum(score.is_anomalous for score in scores)


def _on_photograph(region: Any, x_scale: float, y_scale: float) -> Region:
    """A region of the map in pixels of the photograph."""
    x, y = math.floor(region.x * x_scale), math.floor(region.y * y_scale)
    return Region(
        x=x,
        y=y,
        width=max(1, math.ceil((region.x + region.width) * x_scale) - x),
        height=max(1, math.ceil((region.y + region.height) * y_scale) - y),
        area=max(1, round(region.area * x_scale * y_scale)),
        peak=region.peak,
    )


@dataclass(frozen=True)
class Totals:
    """A run's balance."""

    images: int
    scored: int
    failed: int
    anomalous: int
    shards: int
    lost_shards: int
    """Read but neither committed nor refused with an error."""
    unbalanced_archives: int
    """Of which not every image was scored or failed, or of which nothing was heard."""
    skipped_shards: int
    errors: tuple[str, ...]
    bytes: int
    """Encoded bytes of the images that were scored or failed."""
    failures: dict[str, int]
    """Failed images by error code."""
    failed_fractions: dict[str, float]
    """Failed images of all images, by category, those of earlier runs of the night included: 0 to 1."""
    archive_failures: int
    """Archives that could not be read to their end, in this run or an earlier one: nobody knows how many images that hides."""
    not_scored: tuple[ShardOutcome, ...]
    """What has an error: shards, or with shard None what is left of an archive."""

    @property
    def balanced(self) -> bool:
        """Whether every image of every archive was scored or has a failures row."""
        return self.unbalanced_archives == 0 and self.lost_shards == 0

    def fine(self, max_failure_fraction: float) -> bool:
        """Whether all was scored, but for no more than this fraction of any category's images; every archive to its end."""
        few = max(self.failed_fractions.values(), default=0) <= max_failure_fraction
        return self.balanced and not self.errors and few and not self.archive_failures


def total(outcomes: Sequence[ShardOutcome], archives: int, earlier: Sequence[ShardOutcome] = ()) -> Totals:
    """Add up outcomes of so many archives. `images` counts what the archives hold, the others what was committed.

    earlier: of shards that runs before this one committed. A night stays as bad as it is, however often it is started.
    """
    heads = [outcome for outcome in outcomes if outcome.shard is None]
    shards = [outcome for outcome in outcomes if outcome.shard is not None]
    members = {head.archive: head.members for head in heads}
    done, failures = Counter[int](), Counter[str]()
    for outcome in shards:
        done[outcome.archive] += outcome.scored + outcome.failed
        failures.update(json.loads(outcome.failures))
    failed, images = Counter[str](), Counter[str]()
    archive_failures = 0
    for outcome in (*earlier, *shards):
        failed[outcome.category] += outcome.failed
        images[outcome.category] += outcome.scored + outcome.failed
        archive_failures += sum(json.loads(outcome.failures).get(code, 0) for code in ARCHIVE_ERRORS)
    return Totals(
        images=sum(members.values()),
        scored=sum(outcome.scored for outcome in shards),
        failed=sum(outcome.failed for outcome in shards),
        anomalous=sum(outcome.anomalous for outcome in shards),
        shards=sum(not outcome.error for outcome in shards),
        lost_shards=sum(head.shards for head in heads) - len({outcome.shard for outcome in shards}),
        unbalanced_archives=sum(members.get(archive) != done[archive] for archive in range(archives)),
        skipped_shards=sum(head.skipped for head in heads),
        errors=tuple(sorted({outcome.error for outcome in outcomes if outcome.error})),
        bytes=sum(outcome.bytes for outcome in shards),
        failures=dict(failures.most_common()),
        failed_fractions={category: failed[category] / count for category, count in sorted(images.items()) if count},
        archive_failures=archive_failures,
        not_scored=tuple(outcome for outcome in outcomes if outcome.error),
    )


def earlier_outcomes(plan: BatchPlan, committed: Sequence[Sequence[str]]) -> list[ShardOutcome]:
    """What became of the shards that were committed before, by archive, counted in the tables."""
    archive_of = {name: i for i, names in enumerate(committed) for name in names}
    scored, failed = Counter[str](), {name: Counter[str]() for name in archive_of}
    for category in {plan.archives[i].category for i in archive_of.values()}:
        for name, rows in iter_rows("scores", plan.results, category, plan.night):
            scored[name] += len(rows)
        for name, rows in iter_rows("failures", plan.results, category, plan.night):
            if name in failed:
                failed[name].update(rows["error"].to_pylist())
    return [
        ShardOutcome(
            *(i, name, scored[name] + failed[name].total(), scored[name], failed[name].total()),
            category=plan.archives[i].category,
            failures=json.dumps(failed[name]),
        )
        for name, i in archive_of.items()
    ]


def score_archives(plan: BatchPlan, workers: Workers, progress: Callable[[ShardOutcome], None]) -> Totals:
    """Run the stream to its end and write the run's record, calling `progress` for every shard as it commits."""
    clock = time.monotonic()
    context = ray.data.DataContext.get_current()
    # Every shard leaves its task as soon as it is complete instead of waiting for a larger block.
    context.target_max_block_size = 1
    before = all_committed_shards(plan)
    shards = (
        ray.data.from_items(
            [{"archive": i, "committed": committed} for i, committed in enumerate(before)],
            override_num_blocks=len(plan.archives),
        )
        # Stages that ask for the same share of a CPU become one task, and the units would stay with one reader.
        .flat_map(list_archive, fn_kwargs={"plan": plan}, num_cpus=0.05, compute=TaskPoolStrategy(LISTING_TASKS))
        .flat_map(read_unit, fn_kwargs={"plan": plan}, num_cpus=0.2)
        .map(decode_shard, fn_kwargs={"plan": plan}, num_cpus=0.5)
        .map(
            ScoringActor,
            fn_constructor_kwargs={"plan": plan, "workers": workers},
            compute=ActorPoolStrategy(size=workers.actors),
            num_cpus=workers.cpus_per_actor,
            num_gpus=workers.gpus_per_actor or None,
        )
    )
    outcomes = []
    for row in shards.iter_rows():
        outcome = ShardOutcome(**row)
        outcomes.append(outcome)
        progress(outcome)
    totals = total(outcomes, len(plan.archives), earlier_outcomes(plan, before))
    record = run_record(plan, totals, time.monotonic() - clock)
    write_run(plan.results, f"{plan.night}-{plan.started:%Y%m%dT%H%M%SZ}", record)
    return totals
