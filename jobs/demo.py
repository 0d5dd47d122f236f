"""The whole pipeline on photographs that come with scikit-image: make a data set, train, score, evaluate, draw."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipeline import evaluation
from pipeline.command import OK, PARTIAL_FAILURE, console, run
from pipeline.fleet import train_fleet
from pipeline.presets import load_config
from pipeline.progress import ScoringProgress, metrics_table, show_totals, show_training
from pipeline.ray_session import ray_session
from pipeline.sheet import contact_sheet
from pipeline.storage import Location
from pipeline.storage_checks import require_writable
from pipeline.textures import write_dataset
from pipeline.training_job import TrainingJob


@dataclass(frozen=True)
class Options:
    """Options of demo."""

    output: str = "./defectmap-demo"
    """Folder for the data set, models, results, metrics.json and contact-sheet.png."""
    textures: tuple[str, ...] = ("brick", "gravel")
    """Photographs to use: brick, grass, gravel; each becomes a category."""
    set: tuple[str, ...] = ()
    """Settings that differ from the preset demo, such as training.iterations=50."""
    dry_run: bool = False
    """Print the plan and stop."""


def demo(options: Options) -> int:
    """Run the demonstration; returns the exit status."""
    clock = time.monotonic()
    output = Location.parse(options.output)
    textures = tuple(dict.fromkeys(options.textures))
    dataset, models, results = output / "dataset", output / "models", output / "results"
    config = load_config("demo", options.set)
    console.print(f"{', '.join(textures)} to {output}: {config.training.iterations} iterations each", markup=False)
    if options.dry_run:
        return OK
    require_writable(output)
    write_dataset(dataset, textures=textures)
    console.print(f"data set of {', '.join(textures)} with implanted defects in {dataset}", markup=False)
    with ray_session() as resources:
        jobs = [
            TrainingJob(
                name=texture, categories=(texture,), dataset=dataset, layout="mvtec", models=models, config=config
            )
            for texture in textures
        ]
        outcome = show_training(train_fleet(jobs, resources.training_slots(len(jobs), gpus_per_worker=0.25)))
        if any(row.state == "failed" for row in outcome):
            return PARTIAL_FAILURE
        plan = evaluation.plan(dataset, "mvtec", textures, models, results)
        with ScoringProgress([archive.size() for archive in plan.batch.archives]) as progress:
            found = evaluation.run(plan, resources.scoring_workers(), progress, fpr_limit=0.3)
    show_totals(found.totals, plan.batch.max_failure_fraction)
    (output / "metrics.json").write_json(found.metrics)
    console.print(metrics_table(found.metrics))
    sheet = output / "contact-sheet.png"
    sheet.write_bytes(contact_sheet(plan, images_per_category=4))
    console.print(f"{time.monotonic() - clock:.0f} s; look at {sheet}, query {results}", markup=False)
    return OK if found.totals.fine(plan.batch.max_failure_fraction) else PARTIAL_FAILURE


if __name__ == "__main__":
    run(demo, Options, __doc__ or "")
