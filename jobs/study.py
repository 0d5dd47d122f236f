"""How far to trust choices made on implanted defects: the same ways of scoring measured on implanted and on labelled ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from scipy import stats

from pipeline.calibration import measured
from pipeline.choice import Choice, Judged, judge, judged_images
from pipeline.command import OK, console, run
from pipeline.datasets import Layout, detect_layout, labelled_records, training_records
from pipeline.errors import UserError
from pipeline.images import ImageError, decode_mask, resize_mask
from pipeline.measures import fit_measures
from pipeline.model_store import model_categories, scoring_model
from pipeline.model_weights import load_scorer, load_uncalibrated
from pipeline.selection import summary
from pipeline.storage import Location
from pipeline.storage_checks import require_writable
from pipeline.training_images import data_fingerprint, load_photographs, split_holdout

FIGURES = ("pixel_auroc", "pro_0.30", "image_auroc")
MEASURE = ("covariance", "subtract_prediction", "context_weight", "reach", "turned")
"""What tells measures that a model may choose from each other."""


@dataclass(frozen=True)
class Options:
    """Options of study."""

    dataset: str
    """Folder or s3:// URI around the categories, with test images and masks."""
    models: str
    """Where train_all stored the models, trained on this data set."""
    layout: Layout | None = None
    """How the data set is laid out; found out by looking when omitted."""
    categories: tuple[str, ...] = ()
    """Categories to study; every one that has a model when omitted."""
    device: str = "cpu"
    """Where to score: cpu or cuda."""
    json: str | None = None
    """Also write all figures to this JSON file."""
    dry_run: bool = False
    """Print the plan and stop."""


def study(options: Options) -> int:
    """Measure every way of scoring of every model twice; returns the exit status."""
    dataset, models = Location.parse(options.dataset), Location.parse(options.models)
    layout = options.layout or detect_layout(dataset)
    chosen = options.categories or tuple(model_categories(models))
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: PyTorch sees no GPU here; use cpu")
    for category in chosen:
        info = scoring_model(models, category)
        labelled = len(labelled_records(dataset, layout, category))
        console.print(f"  {category}: model {info.version}, {labelled} labelled images", markup=False)
    if options.dry_run:
        return OK
    if options.json:
        require_writable(Location.parse(options.json).parent)
    report = {}
    for category in chosen:
        report[category] = rows = study_category(dataset, layout, models, category, options.device)
        console.print(alpha_table(category, rows))
        for figure in FIGURES:
            pairs = [(entry["implanted"][figure], entry["labelled"][figure]) for entry in rows]
            console.print(f"  {figure}: rank correlation {rank_correlation(pairs)}", markup=False)
    if options.json:
        Location.parse(options.json).write_json(report)
    return OK


def study_category(
    dataset: Location, layout: Layout, models: Location, category: str, device: str
) -> list[dict[str, Any]]:
    """Every measure and weight of the pixel branch, with its figures on implanted and on labelled defects."""
    info = scoring_model(models, category)
    calibration = load_scorer(info, device=device).calibration
    assert calibration is not None
    chosen = {name: getattr(calibration.measure, name) for name in MEASURE}
    kept = chosen | {name: info.calibration[name] for name in ("alpha", "top_pixels")}
    config = info.config
    scorer = load_uncalibrated(info, config, folded=info.folded, device=device)
    side = config.scoring.map_size
    normal = load_photographs(training_records(dataset, layout, category), side)
    if info.classes is None and data_fingerprint(normal) != info.provenance["data_fingerprint"]:
        raise UserError(f"the model of {category!r} was trained on other photographs than those of {dataset}")
    training, held_out = split_holdout(len(normal), config.training.holdout_fraction, config.training.seed)
    records = labelled_records(dataset, layout, category)
    labelled = load_photographs(records, side)
    masks = np.zeros((len(records), side, side), bool)
    for mask, record in zip(masks, records, strict=True):
        if record.mask is not None:
            try:
                mask[:] = resize_mask(decode_mask(record.mask.read_bytes()), side)
            except ImageError as error:
                raise UserError(f"{record.mask}: {error}: replace it") from error
    implants = judged_images(normal[held_out], config.training.seed)
    measures = [taught.measure for taught in fit_measures(scorer, normal[training])]
    if chosen not in [{name: getattr(measure, name) for name in MEASURE} for measure in measures]:
        raise UserError(
            f"the model of {category!r} chose a way of scoring that is none any more: calibrate it anew "
            "(train_all.py --calibrate-only, with its settings)"
        )
    rows = []
    for judged in (implants, Judged(labelled, masks, np.ones((1, len(labelled)), bool))):
        candidates = measured(scorer, measures, normal[held_out], judged.images)
        rows.append([choice for candidate in candidates for choice in judge(scorer, candidate, judged)])
    entries = [row(*pair) for pair in zip(*rows, strict=True)]
    return [entry | {"chosen": kept.items() <= entry.items()} for entry in entries]


def row(implanted: Choice, labelled: Choice) -> dict[str, Any]:
    """One way of scoring in plain values."""
    settings = {key: value for key, value in summary(implanted).items() if key not in FIGURES}
    figures = {
        name: {figure: None if math.isnan(value := summary(choice)[figure]) else value for figure in FIGURES}
        for name, choice in (("implanted", implanted), ("labelled", labelled))
    }
    return settings | figures


def rank_correlation(pairs: list[tuple[float | None, float | None]]) -> str:
    """Spearman's, of figures on implanted and labelled defects."""
    implanted, labelled = zip(*pairs, strict=True)
    if None in labelled:
        return "undefined: the labelled images are all normal or all defective"
    if len(set(implanted)) == 1 or len(set(labelled)) == 1:
        return "undefined: all equal"
    return f"{stats.spearmanr(implanted, labelled).statistic:.2f}"


def alpha_table(category: str, rows: list[dict[str, Any]]) -> Table:
    """The weights of the pixel branch under the measure that the model chose."""
    chosen = next(entry for entry in rows if entry["chosen"])
    measure = {key: chosen[key] for key in (*MEASURE, "top_pixels")}
    table = Table(title=f"{category}: {measure}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("alpha", "implanted", "labelled"):
        table.add_column(name, justify="right")
    for entry in rows:
        if measure.items() <= entry.items():
            texts = [
                " / ".join(percent(entry[name][figure]) for figure in FIGURES) for name in ("implanted", "labelled")
            ]
            table.add_row(f"{entry['alpha']:g}" + (" chosen" if entry["chosen"] else ""), *texts)
    return table


def percent(value: float | None) -> str:
    """A rate as text."""
    return "-" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    run(study, Options, __doc__ or "")
