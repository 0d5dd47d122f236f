"""The restoring stream's last stage: an actor that restores a shard's photographs and writes the pictures.

OUTPUT/<category>/<settings>/<version>/<archive>/<member>-<id>
    .restored.png     the photograph made normal, at the model's side
    .difference.png   mean absolute difference of both, in grey levels
    .sheet.png        with sheets: photograph, ground truth where there is a labelled data set, restored, anomaly map, difference
    .steps.png        with steps: the states on the way
OUTPUT/_shards/<settings>/<shard>.json   written last: what was restored, and what failed and why
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.archives import Archive, image_id
from pipeline.batch_plan import BatchPlan, Workers
from pipeline.errors import UserError
from pipeline.export_names import safe_part
from pipeline.heat_maps import heat_map, heat_scale
from pipeline.images import ImageError, decode_mask, encode_png, resize_mask
from pipeline.memory import reuse_freed_memory, use_system_allocator
from pipeline.restoration_methods import Method
from pipeline.shard_reading import without_images
from pipeline.storage import Location
from pipeline.storage_errors import STORAGE_ERRORS
from pipeline.threads import compute_with
from pipeline.totals import ShardOutcome

if TYPE_CHECKING:
    from pipeline.restoration import Restorer

SHEET = ("photograph", "ground truth", "restored", "anomaly map", "difference")
"""From left to right; the second only where there is a labelled data set."""
STRIP_STATES = 10
"""Of all states, evenly taken, the last one among them."""


@dataclass(frozen=True)
class RestorePlan:
    """How photographs are restored, and which pictures are written."""

    output: Location
    method: Method
    sheets: bool
    steps: bool
    masks: Mapping[str, Location | None] | None
    """Of a labelled data set: by image id where the defect is, None for a normal photograph."""

    @property
    def name(self) -> str:
        """Of these settings: others leave other files."""
        sheet = [part for part in SHEET if part != "ground truth" or self.masks is not None]
        settings = json.dumps([asdict(self.method), sheet if self.sheets else None, self.steps])
        return f"{type(self.method).__name__.lower()}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    @property
    def done(self) -> Location:
        """The folder of what shards leave under these settings."""
        return self.output / "_shards" / self.name


def restored_shards(plan: BatchPlan, settings: RestorePlan) -> list[list[str]]:
    """Names of the shards of each archive that were restored by the plan's models under these settings."""
    names = [file.name.removesuffix(".json") for file in settings.done.files()]
    return [
        [name for name in names if name.startswith(f"{archive.name}-") and name.endswith(plan.suffix(archive))]
        for archive in plan.archives
    ]


def earlier_restored(plan: BatchPlan, settings: RestorePlan, before: Sequence[Sequence[str]]) -> list[ShardOutcome]:
    """What became of the shards that earlier runs restored, by archive, as their records say."""
    outcomes = []
    for i, names in enumerate(before):
        for name in names:
            record = (settings.done / f"{name}.json").read_json()
            restored, failed = len(record["restored"]), len(record["failed"])
            codes = Counter(failure["error"] for failure in record["failed"])
            outcome = ShardOutcome(*(i, name, restored + failed, restored, failed), failures=json.dumps(codes))
            outcomes.append(replace(outcome, category=plan.archives[i].category))
    return outcomes


class RestoringActor:
    """Photographs -> pictures on storage, committed by the shard's record. Loads each model once."""

    def __init__(self, plan: BatchPlan, workers: Workers, settings: RestorePlan) -> None:
        compute_with(workers.threads)
        use_system_allocator()
        reuse_freed_memory()
        self.plan = plan
        self.settings = settings
        self.device = "cuda" if workers.gpus_per_actor > 0 else "cpu"
        self.restorers: dict[str, Restorer] = {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One shard's outcome as a row."""
        clock = time.monotonic()
        archive = self.plan.archives[row["archive"]]
        if (said := without_images(row, archive.category)) is not None:
            return asdict(said)
        failures, names = json.loads(row["failures"]), row["names"]
        members = len(names) + len(failures)
        outcome = ShardOutcome(row["archive"], row["shard"], members, category=archive.category)
        try:
            anomalous, unread = self._restore(archive, names, row["images"])
            record = {
                "archive": archive.location.uri,
                "model_version": self.plan.models[archive.category].version,
                "restored": [str(name) for name in names],
                "failed": [{"member": name} | failure for name, failure in failures],
                "masks_not_read": unread,
            }
            (self.settings.done / f"{row['shard']}.json").write_json(record)
        except (UserError, *STORAGE_ERRORS) as error:
            return asdict(replace(outcome, error=" ".join(str(error).split())))
        return asdict(
            replace(
                outcome,
                scored=len(names),
                failed=len(failures),
                anomalous=anomalous,
                bytes=row["bytes"],
                seconds=time.monotonic() - clock,
                failures=json.dumps(Counter(failure["error"] for _, failure in failures)),
            )
        )

    def _restorer(self, category: str) -> Restorer:
        from pipeline.model_weights import load_scorer  # not above: the driver and the readers do without torch
        from pipeline.restoration import Restorer

        if category not in self.restorers:
            scorer = load_scorer(self.plan.models[category], device=self.device)
            self.restorers[category] = Restorer(scorer, self.settings.method)
        return self.restorers[category]

    def _restore(self, archive: Archive, names: list[str], pixels: bytes) -> tuple[int, list[str]]:
        """Write the pictures of a shard; returns how many of its photographs are anomalous, and which masks were not read."""
        if not len(names):
            return 0, []
        restorer = self._restorer(archive.category)
        scorer = restorer.scorer
        assert scorer.calibration is not None
        side, batch = scorer.config.scoring.map_size, scorer.config.scoring.batch_size
        images = np.frombuffer(pixels, np.uint8).reshape(-1, side, side, 3)
        version = self.plan.models[archive.category].version
        folder = self.settings.output / safe_part(archive.category) / self.settings.name / version / archive.name
        anomalous, unread = 0, []
        for start in range(0, len(names), batch):
            some, of_them = images[start : start + batch], names[start : start + batch]
            ids = [image_id(archive.location.uri, name) for name in of_them]
            scored = scorer.score(some)
            states = [some, *restorer.states(some, [int(each[:15], 16) for each in ids], scored.maps)]
            anomalous += int((scored.scores > scorer.calibration.threshold).sum())
            for i, name in enumerate(of_them):
                stem = safe_part(name.rpartition(".")[0] or name)
                try:
                    truth = self._ground_truth(ids[i], side)
                except (ImageError, FileNotFoundError) as error:
                    truth = [np.full((side, side, 3), 128, np.uint8)]
                    unread.append(f"{name}: {error}")
                pictures = self._pictures(
                    [state[i] for state in states], scored.maps[i], scorer.calibration.pixel_threshold, truth
                )
                for kind, picture in pictures.items():
                    (folder / f"{stem}-{ids[i][:8]}.{kind}.png").write_bytes(encode_png(picture))
        return anomalous, unread

    def _ground_truth(self, image: str, side: int) -> list[np.ndarray]:
        """The mask of a photograph as a picture, uint8 (side, side, 3), white on the defect; none without labels or sheets.

        Raises ImageError or FileNotFoundError where it cannot be read.
        """
        if self.settings.masks is None or not self.settings.sheets:
            return []
        mask = self.settings.masks[image]
        defect = np.zeros((side, side), bool) if mask is None else resize_mask(decode_mask(mask.read_bytes()), side)
        return [np.repeat(np.uint8(255) * defect[..., None], 3, -1)]

    def _pictures(
        self, states: list[np.ndarray], map_hw: np.ndarray, pixel_threshold: float, ground_truth: list[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Of one photograph, uint8: from its states, the first of which it is itself, its anomaly map, and its mask if known."""
        image, restored = states[0], states[-1]
        difference = np.abs(restored.astype(np.int16) - image).mean(-1).round().astype(np.uint8)
        found = {"restored": restored, "difference": difference}
        if self.settings.sheets:
            heat = heat_map(map_hw, image, *heat_scale([map_hw], pixel_threshold))
            change = np.repeat(difference[..., None], 3, -1)
            found["sheet"] = np.concatenate([image, *ground_truth, restored, heat, change], axis=1)
        if self.settings.steps:
            chosen = np.unique(np.linspace(0, len(states) - 1, min(STRIP_STATES, len(states))).round().astype(int))
            found["steps"] = np.concatenate([states[i] for i in chosen], axis=1)
        return found
