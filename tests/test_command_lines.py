"""Command lines of all jobs, run in this process: mistakes and help cost no work and no start of Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.job_runs import ROOT

MISTAKES = {
    "no such data set": ("train_all", ["--dataset", "{tmp}/none", "--models", "{tmp}/m"], "does not exist"),
    "unknown category": (
        "train_all",
        ["--dataset", "{data}", "--models", "{tmp}/m", "--categories", "gravle"],
        "gravel",
    ),
    "unknown setting": (
        "train_all",
        ["--dataset", "{data}", "--models", "{tmp}/m", "--set", "training.iteration=3"],
        "training.iteration",
    ),
    "bad value": (
        "train_all",
        ["--dataset", "{data}", "--models", "{tmp}/m", "--set", "training.batch_size=0"],
        "batch_size",
    ),
    "no such checkpoint": (
        "train_all",
        ["--dataset", "{data}", "--models", "{tmp}/m", "--initial-weights", "{tmp}/none.pt"],
        "does not exist",
    ),
    "bad selection": (
        "train_all",
        ["--dataset", "{data}", "--models", "{tmp}/m", "--select", "scoring.map_sigma=2"],
        "expected SECTION.FIELD=[VALUE,VALUE]",
    ),
    "no data set": ("train_all", ["--models", "{tmp}/m"], "--dataset is missing"),
    "promoting nothing": ("train_all", ["--models", "{tmp}", "--promote", "brick"], "write CATEGORY=VERSION"),
    "promoting what is not there": ("train_all", ["--models", "{tmp}", "--promote", "brick=1"], "no trained category"),
    "listing what is not there": ("train_all", ["--models", "{tmp}", "--list", "--categories", "x"], "no model of x"),
    "models folder is a file": ("train_all", ["--dataset", "{data}", "--models", "{file}"], "is a file"),
    "no models": (
        "score_archives",
        ["--archives", "{data}/brick/test", "--models", "{tmp}", "--results", "{tmp}/r", "--category", "brick"],
        "train",
    ),
    "no archives": (
        "score_archives",
        ["--archives", "{tmp}/none.tar", "--models", "{tmp}/m", "--results", "{tmp}/r"],
        "does not exist",
    ),
    "odd night": (
        "score_archives",
        ["--archives", "{data}", "--models", "{tmp}/m", "--results", "{tmp}/r", "--night", "today"],
        "YYYY-MM-DD",
    ),
    "odd fraction": (
        "score_archives",
        ["--archives", "{data}", "--models", "{tmp}/m", "--results", "{tmp}/r", "--max-failure-fraction", "10"],
        "choose 0 to 1",
    ),
    "no patience": (
        "score_archives",
        ["--archives", "{data}", "--models", "{tmp}/m", "--results", "{tmp}/r", "--stall-minutes", "0"],
        "choose more than 0",
    ),
    "no number of minutes": (
        "reconstruct",
        ["--images", "{data}", "--models", "{tmp}/m", "--output", "{tmp}/r", "--stall-minutes", "nan"],
        "choose more than 0",
    ),
    "no results to compact": ("compact", ["--results", "{tmp}/r"], "does not exist"),
    "no such question": ("query", ["--results", "{tmp}", "--name", "best"], "nightly-summary"),
    "nothing to report": ("report", ["--results", "{tmp}", "--output", "{tmp}/page.html"], "score_archives.py"),
    "too many pictures": (
        "report",
        ["--results", "{tmp}", "--output", "{tmp}/page.html", "--images", "100000"],
        "choose 0 to 2000",
    ),
    "no results to export": (
        "export",
        ["--results", "{tmp}/r", "--output", "{tmp}/o", "--format", "coco"],
        "does not exist",
    ),
    "nothing to export": (
        "export",
        ["--results", "{tmp}", "--output", "{tmp}/o", "--format", "tiff"],
        "no scored photographs",
    ),
    "odd limit": (
        "export",
        ["--results", "{tmp}", "--output", "{tmp}/o", "--format", "overlays", "--limit", "0"],
        "choose 1 or more",
    ),
    "nothing to restore": (
        "reconstruct",
        ["--images", "{tmp}/r", "--models", "{tmp}", "--output", "{tmp}/o"],
        "does not exist",
    ),
    "restored into what is read": (
        "reconstruct",
        ["--images", "{tmp}", "--models", "{tmp}", "--output", "{tmp}/o"],
        "again and again",
    ),
    "scored as nobody published": (
        "benchmark",
        ["score", "--preset", "gaussian"],
        "choose another preset",
    ),
    "restored from two places": (
        "reconstruct",
        ["--images", "{data}", "--dataset", "{data}", "--models", "{tmp}", "--output", "{tmp}/o"],
        "give one of them",
    ),
    "layout of no data set": (
        "reconstruct",
        ["--images", "{data}", "--layout", "mvtec", "--models", "{tmp}", "--output", "{tmp}/o"],
        "--layout goes with --dataset",
    ),
    "trained without a network": ("benchmark", ["train", "--preset", "gaussian"], "trains no network"),
    "nothing named to restore": (
        "reconstruct",
        ["--models", "{tmp}", "--output", "{tmp}/o"],
        "give --images",
    ),
    "calibrating what was never trained": (
        "train_all",
        ["--dataset", "{data}", "--models", "{tmp}", "--categories", "brick", "--calibrate-only"],
        "train_all.py",
    ),
    "calibrating two networks of one": (
        "train_all",
        ["--dataset", "{data}", "--models", "{tmp}", "--calibrate-only", "--select", "training.batch_size=[4,8]"],
        "--select settings of scoring",
    ),
    "nothing trained": (
        "evaluate",
        ["--dataset", "{data}", "--models", "{tmp}", "--results", "{tmp}/r"],
        "train_all.py",
    ),
    "nothing to measure or review": ("evaluate", ["--results", "{tmp}/r"], "--recalibrate REVIEW.csv"),
    "models without data set": ("evaluate", ["--results", "{tmp}/r", "--models", "{tmp}"], "--dataset"),
    "measuring and reviewing": (
        "evaluate",
        ["--results", "{tmp}", "--recalibrate", "{file}", "--dataset", "{data}", "--actors", "2"],
        "leave out --dataset, --actors",
    ),
    "a review's option without review": (
        "evaluate",
        ["--results", "{tmp}/r", "--dataset", "{data}", "--models", "{tmp}", "--false-alarm-rate", "0.1"],
        "--false-alarm-rate belongs to --recalibrate",
    ),
    "thresholds put in use nowhere": (
        "evaluate",
        ["--results", "{tmp}", "--recalibrate", "{file}", "--apply"],
        "--apply needs --models",
    ),
    "odd rate": (
        "evaluate",
        ["--results", "{tmp}", "--recalibrate", "{file}", "--false-alarm-rate", "1"],
        "below 0.5",
    ),
    "no such review": ("evaluate", ["--results", "{tmp}", "--recalibrate", "{tmp}/none.csv"], "does not exist"),
    "an empty review": ("evaluate", ["--results", "{tmp}", "--recalibrate", "{file}"], "image_id,verdict"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_a_remedy_and_status_2(start, mistake: str, dataset: Path, tmp_path: Path) -> None:
    name, arguments, expected = MISTAKES[mistake]
    file = tmp_path / "file"
    file.write_text("")
    status, _, errors = start(name, *(a.format(tmp=tmp_path, data=dataset, file=file) for a in arguments))
    assert status == 2, errors
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ")
    assert expected in line


SUBCOMMANDS = {"benchmark": ("score", "train", "metrics", "decode", "pipeline", "fleet", "restore")}
COMMANDS = [
    (path.stem, *subcommand)
    for path in sorted((ROOT / "jobs").glob("*.py"))
    if path.stem != "__init__"
    for subcommand in [(each,) for each in SUBCOMMANDS.get(path.stem, ())] or [()]
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_every_option(start, command: tuple[str, ...]) -> None:
    status, output, _ = start(*command, "--help")
    assert status == 0
    assert "--" in output
    assert "default" in output
