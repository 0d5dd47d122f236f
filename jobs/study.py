"""How far to trust choices made on implanted defects: the same ways of scoring measured on implanted and on labelled ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from pipeline.calibration import Choice, fit_measures, judge, judged_images, measured
from pipeline.command import OK, console, run
from pipeline.config import Config
from pipeline.datasets import Layout, detect_layout, labelled_records, training_records
from pipeline.fit import split_holdout
from pipeline.images import decode_mask, resize_mask
from pipeline.model_store import load_scorer, model_categories, model_info
from pipeline.selection import summary
from pipeline.storage import Location, require_writable
from pipeline.training import load_photographs

FIGURES = ("pixel_auroc", "pro_0.30", "image_auroc")


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
    for category in chosen:
        info = model_info(models, category)
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
            pairs = [(row["implanted"][figure], row["labelled"][figure]) for row in rows]
            console.print(f"  {figure}: rank correlation {rank_correlation(pairs)}", markup=False)
    if options.json:
        Location.parse(options.json).write_json(report)
    return OK


def study_category(
    dataset: Location, layout: Layout, models: Location, category: str, device: str
) -> list[dict[str, Any]]:
    """Every measure and weight of the pixel branch, with its figures on implanted and on labelled defects."""
    scorer = load_scorer(model_info(models, category), device=device)
    config = open_choices(scorer.config)
    scorer.configure(config)
    side = config.scoring.map_size
    normal = load_photographs(training_records(dataset, layout, category), side)
    training, held_out = split_holdout(len(normal), config.training.holdout_fraction, config.training.seed)
    records = labelled_records(dataset, layout, category)
    labelled = load_photographs(records, side)
    masks = np.zeros((len(records), side, side), bool)
    for mask, record in zip(masks, records, strict=True):
        if record.mask is not None:
            mask[:] = resize_mask(decode_mask(record.mask.read_bytes()), side)
    implants, truth = judged_images(normal[held_out], config.training.seed)
    measures = fit_measures(scorer, normal[training])
    rows = []
    for images, found in ((implants, truth), (labelled, masks)):
        candidates = measured(scorer, measures, normal[held_out], images)
        rows.append([choice for candidate in candidates for choice in judge(scorer, candidate, found)])
    return [row(*pair) for pair in zip(*rows, strict=True)]


def open_choices(config: Config) -> Config:
    """The same model with everything left open that it chose by itself."""
    left_open = {"alpha": None, "covariance": "select", "prediction": "select"}
    return config.model_copy(update={"scoring": config.scoring.model_copy(update=left_open)})


def row(implanted: Choice, labelled: Choice) -> dict[str, Any]:
    """One way of scoring in plain values."""
    settings = {key: value for key, value in summary(implanted).items() if key not in FIGURES}
    figures = {
        name: {figure: summary(choice)[figure] for figure in FIGURES}
        for name, choice in (("implanted", implanted), ("labelled", labelled))
    }
    return settings | figures


def rank_correlation(pairs: list[tuple[float, float]]) -> str:
    """Spearman's, of figures on implanted and labelled defects."""
    implanted, labelled = zip(*pairs, strict=True)
    if len(set(implanted)) == 1 or len(set(labelled)) == 1:
        return "undefined: all equal"
    return f"{stats.spearmanr(implanted, labelled).statistic:.2f}"


def alpha_table(category: str, rows: list[dict[str, Any]]) -> Table:
    """The weights of the pixel branch under the measure that does best on implanted defects."""
    best = max(rows, key=lambda row: sum(row["implanted"].values()))
    measure = {key: best[key] for key in ("covariance", "subtract_prediction")}
    table = Table(title=f"{category}: {measure}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("alpha", "implanted", "labelled"):
        table.add_column(name, justify="right")
    for entry in rows:
        if measure.items() <= entry.items():
            texts = [
                " / ".join(f"{100 * entry[name][figure]:.1f}" for figure in FIGURES)
                for name in ("implanted", "labelled")
            ]
            table.add_row(f"{entry['alpha']:g}" + (" chosen" if entry is best else ""), *texts)
    return table


if __name__ == "__main__":
    run(study, Options, __doc__ or "")
