"""One network from photographs on storage to stored, calibrated models: plain torch, one process or one rank of several."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from pipeline.calibration import calibrate
from pipeline.checkpoints import Checkpoints
from pipeline.datasets import training_records
from pipeline.errors import UserError
from pipeline.features import FeatureExtractor
from pipeline.fit import Fit, Rank
from pipeline.model_store import model_info, new_version, package_versions
from pipeline.model_versions import publish
from pipeline.model_weights import load_uncalibrated, save_model
from pipeline.scoring import Scorer
from pipeline.selection import summary
from pipeline.storage import Location
from pipeline.thresholds import enough_for_rank
from pipeline.tracking import Tracking
from pipeline.training_images import Load, TrainingImages, load_training_images
from pipeline.training_job import TrainingJob

REPORT_EVERY = 5
"""Steps between reports of progress."""
LOSSES = ("noise", "bound", "feature")
ODDEST = 10
"""Normal photographs that a model names as the least like the others: what is not normal after all should be among them."""
FIGURES = ("pixel_auroc", "pro_0.30", "image_auroc")
"""Of a model on defects implanted in held-out photographs."""

Report = Callable[[dict[str, Any]], None]
"""Takes facts of a run as they become known, as in `training_board.Progress`, and as "checkpoint" the step that is kept."""


def train(
    job: TrainingJob, *, load: Load, report: Report, rank: Rank | None = None, device: torch.device | str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Load, resume, fit, calibrate and store, as one rank of those that share every batch; or only calibrate and store.

    Returns, by category, the new version and its figures; on ranks but the first nothing. Raises UserError for photographs
    and weights that cannot be used, FloatingPointError for a run that diverged.
    """
    started = time.monotonic()
    rank = rank or Rank()
    leader = rank.index == 0
    if job.versions and not leader:
        return {}
    records = {category: training_records(job.dataset, job.layout, category) for category in job.categories}
    images = load_training_images(records, job.config.training, job.config.scoring.map_size, load)
    if job.versions:
        return calibrate_anew(job, images, report, started, device)
    with_context = FeatureExtractor.of(job.config.features, context=True)  # fails now where it has no such stages
    fit = begun(job, images, rank, device)
    checkpoints = Checkpoints(job.run_folder, images.fingerprint)
    warning = checkpoints.resume(fit)
    resumed_at = fit.step
    if leader:
        report({"warning": warning, "first_step": resumed_at})
    if rank.count > 1:
        fit.module = torch.nn.parallel.DistributedDataParallel(fit.denoiser.unet, broadcast_buffers=False)
    losses: dict[str, float] = {}
    with ExitStack() as stack:
        tracking = stack.enter_context(Tracking(job.models, job.run_name, resumed_at)) if leader else None
        while not fit.finished:
            losses = stretch(fit)
            if tracking is None:
                continue
            tracking.log(fit.step, losses | {"learning_rate": fit.optimizer.param_groups[0]["lr"]})
            facts = {"step": fit.step, "losses": losses, "seconds": time.monotonic() - started}
            report(facts | {"warning": tracking.problem or warning})
            if fit.finished or fit.step % job.config.training.checkpoint_every == 0:
                checkpoints.save(fit)
                tracking.store()
                report({"checkpoint": fit.step})
        if tracking is None:
            return {}
        report({"state": "calibrating"})
        start = job.initial_weights and job.initial_weights.uri
        history = {"resumed_at_step": resumed_at, "losses": losses, "initial_weights": start}
        now, labels = datetime.now(UTC), range(len(job.categories)) if job.config.joint else (None,)
        found = {
            category: store(job, category, fit.scorer(with_context, label), images, history, started, now)
            for category, label in zip(job.categories, labels, strict=True)
        }
        put_in_use(job, found)
        for category, outcome in found.items():
            tracking.log(fit.step, {f"{category}/{name}": outcome[name] for name in FIGURES})
    checkpoints.remove()
    report({"seconds": time.monotonic() - started})
    return found


def begun(job: TrainingJob, images: TrainingImages, rank: Rank, device: torch.device | str) -> Fit:
    """The job's network before its first step."""
    return Fit(
        job.config,
        images.training,
        FeatureExtractor.of(job.config.features, context=False),
        labels=images.labels if job.config.joint else None,
        device=device,
        rank=rank,
        initial_weights=None if job.initial_weights is None else load_checkpoint(job.initial_weights),
    )


def calibrate_anew(
    job: TrainingJob, images: TrainingImages, report: Report, started: float, device: torch.device | str
) -> dict[str, dict[str, Any]]:
    """Calibrate and store the networks of the job's versions; what `train` returns.

    Raises UserError where they were trained on other photographs: what is held out now may have shaped them.
    """
    iterations, now, found = job.config.training.iterations, datetime.now(UTC), {}
    report({"state": "calibrating"})
    for category, version in zip(job.categories, job.versions, strict=True):
        info = model_info(job.models, category, version)
        known = info.provenance
        if known["data_fingerprint"] != images.fingerprint:
            raise UserError(
                f"{category} {version} was trained on other photographs, or they are decoded otherwise now: train it again"
            )
        scorer = load_uncalibrated(info, job.config, device=device)
        history = {name: known.get(name) for name in ("resumed_at_step", "losses", "initial_weights")}
        trained = {"version": version} | {
            name: known.get(name) for name in ("created", "revision", "packages", "seconds")
        }
        history["network_of"] = known.get("network_of", trained)
        found[category] = store(job, category, scorer, images, history, started, now)
    put_in_use(job, found)
    report({"seconds": time.monotonic() - started, "first_step": iterations, "step": iterations})
    return found


def stretch(fit: Fit) -> dict[str, float]:
    """Advance to the next step that is reported, kept or the last; mean losses since, over all ranks.

    Raises FloatingPointError, on every rank, where one of them is not finite.
    """
    training = fit.config.training
    recent = [torch.stack(fit.advance()[1:])]
    while not (fit.finished or fit.step % REPORT_EVERY == 0 or fit.step % training.checkpoint_every == 0):
        recent.append(torch.stack(fit.advance()[1:]))
    mean = torch.stack(recent).mean(0)
    if fit.rank.count > 1:
        torch.distributed.all_reduce(mean)
        mean /= fit.rank.count
    if not mean.isfinite().all():
        raise FloatingPointError(
            f"the loss is not finite at step {fit.step}: lower training.learning_rate (now {training.learning_rate:g})"
        )
    return dict(zip(LOSSES, mean.tolist(), strict=True))


def store(
    job: TrainingJob,
    category: str,
    scorer: Scorer,
    images: TrainingImages,
    history: dict[str, Any],
    started: float,
    now: datetime,
) -> dict[str, Any]:
    """Calibrate a network for a category and store the model; what is known of it.

    history: of the network, for its provenance; started: when the work on it began, by time.monotonic; now: names the
    version, the same for all categories that share the network.
    """
    held_out, training = images.held_out[category], images.training[images.parts[category]]
    try:
        calibrated = calibrate(scorer, held_out, training, job.variants)
    except torch.linalg.LinAlgError as error:
        raise FloatingPointError(
            f"the network's output for {category} is not finite: lower training.learning_rate"
        ) from error
    version = new_version(scorer.config, now)
    names = [name.removeprefix(f"{job.dataset.uri}/") for name in images.names[category]]
    of_training = np.full(len(training), np.nan) if calibrated.known_by_heart else calibrated.training_scores
    odd = oddest(names, np.concatenate([of_training, calibrated.held_out_scores]))
    provenance = history | {
        "dataset": job.dataset.uri,
        "data_fingerprint": images.fingerprint,
        "files_fingerprint": job.files_fingerprint,
        "settings_digest": job.settings_digest,
        "training_images": len(training),
        "held_out_images": len(held_out),
        "oddest_normal": odd,
        "known_by_heart": calibrated.known_by_heart,
        "seconds": round(time.monotonic() - started, 1),
        "packages": package_versions(),
        "revision": job.revision,
        "created": now.isoformat(timespec="seconds"),
    }
    tried = [summary(choice, job.variants) for choice in calibrated.choices]
    save_model(job.models, category, version, scorer, job.categories if job.config.joint else None, provenance, tried)
    told = {"oddest": odd, "known_by_heart": calibrated.known_by_heart}
    return _outcome(scorer, version) | told | tried[0]


def oddest(names: Sequence[str], scores: np.ndarray) -> list[dict[str, Any]]:
    """The photographs with the highest scores, float (n,), nan where unknown: `ODDEST` of them, the highest first."""
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:ODDEST]
    return [{"image": names[i], "score": float(scores[i])} for i in order if not np.isnan(scores[i])]


def put_in_use(job: TrainingJob, found: dict[str, dict[str, Any]]) -> None:
    """Publish the versions that were found, by category, if the job asks for it; notes which are kept back.

    A network calibrated anew takes the place of its own version alone: people may have chosen another one meanwhile.
    """
    replaced = dict(zip(job.categories, job.versions, strict=bool(job.versions)))
    for category, outcome in found.items() if job.publish else ():
        version = outcome["version"]
        outcome["kept_back"] = publish(job.models, category, version, instead_of=replaced.get(category))


def _outcome(scorer: Scorer, version: str) -> dict[str, Any]:
    calibration = scorer.calibration
    assert calibration is not None
    return {
        "version": version,
        "false_alarm_rate": scorer.config.scoring.false_alarm_rate,
        "normal_images": len(calibration.normal_scores),
        "by_rank": enough_for_rank(len(calibration.normal_scores), scorer.config.scoring.false_alarm_rate),
        "threshold": calibration.threshold,
        "false_alarms_low": calibration.false_alarms_low,
        "false_alarms_high": calibration.false_alarms_high,
    }


def load_checkpoint(location: Location) -> Mapping[str, torch.Tensor]:
    """A PyTorch checkpoint of tensors by name, on the CPU; nothing in it is executed. Raises UserError when it is not one."""
    try:
        state = torch.load(io.BytesIO(location.read_bytes()), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"--initial-weights {location}: no such file") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"--initial-weights {location}: not a PyTorch checkpoint of weights") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--initial-weights {location}: expected tensors by name, as guided-diffusion publishes them")
    return state
