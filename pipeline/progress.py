"""Progress on the terminal: live where there is one, otherwise a line now and then that suits a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.live import Live
from rich.table import Table

from pipeline.batch import ShardOutcome, Totals
from pipeline.command import console
from pipeline.training import Progress, State

LOG_EVERY = 30.0
"""Seconds between progress lines when the output is not a terminal."""


def training_table(rows: list[Progress], title: str) -> Table:
    """State, step, losses, minutes so far and to go, and the outcome of every category."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("network", "state", "step", "noise", "bound", "feature", "time", "left", "result"):
        text = name in ("network", "state", "result")
        table.add_column(name, justify="left" if text else "right", no_wrap=name != "result", overflow="fold")
    for row in rows:
        losses = [f"{row.losses[name]:.3f}" if row.losses else "" for name in ("noise", "bound", "feature")]
        left = row.seconds / row.step * (row.iterations - row.step) if row.step else 0.0
        table.add_row(
            row.name,
            row.state,
            f"{row.step}/{row.iterations}",
            *losses,
            _minutes(row.seconds),
            _minutes(left) if row.state == "running" else "",
            ", ".join(sorted({found["version"] for found in row.found.values()})) or row.reason or "",
        )
    return table


def show_training(snapshots: Iterable[list[Progress]]) -> list[Progress]:
    """Draw every snapshot until the last, which is returned after a final table."""
    rows: list[Progress] = []
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2, transient=True) as live:
            for rows in snapshots:
                live.update(training_table(rows, "training"))
    else:
        shown = 0.0
        states: dict[str, State] = {}
        for rows in snapshots:
            now = {row.name: row.state for row in rows}
            if now != states or time.monotonic() - shown > LOG_EVERY:
                shown, states = time.monotonic(), now
                for row in rows:
                    if row.state == "running":
                        console.print(f"{row.name}: step {row.step}/{row.iterations} {_minutes(row.seconds)}")
    console.print(training_table(rows, "trained"))
    return rows


def model_line(category: str, found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """What a category's new model chose, how it does on implanted defects, and what its threshold promises."""
    prediction = "minus prediction " if found["subtract_prediction"] else ""
    context = f" ({100 * found['context_weight']:g} % context)" if found["context_weight"] else ""
    settings = "".join(f", {name}={value}" for name, value in chosen.items())
    figures = " / ".join(f"{100 * found[name]:.1f}" for name in ("pixel_auroc", "pro_0.30", "image_auroc"))
    return (
        f"{category}: weight of the pixel branch {found['alpha']:g}, features {prediction}by covariance "
        f"{found['covariance']}{context}, image score of {found['top_pixels']} px{settings}; "
        f"implanted defects {figures} (pixel AUROC / PRO / image AUROC); "
        f"false alarms {100 * found['false_alarm_rate']:g} % requested, 95 % interval "
        f"{100 * found['false_alarms_low']:.2g}-{100 * found['false_alarms_high']:.2g} % "
        f"from {found['held_out_images']} held-out images if their scores follow a normal law"
    )


class ScoringProgress:
    """Counts images as shards commit, and says so at most every few seconds."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.shown = self.started
        self.scored = self.failed = self.anomalous = 0

    def __call__(self, outcome: ShardOutcome) -> None:
        """Take one more shard into account."""
        self.scored += outcome.scored
        self.failed += outcome.failed
        self.anomalous += outcome.anomalous
        now = time.monotonic()
        if now - self.shown > (2 if console.is_terminal else LOG_EVERY):
            self.shown = now
            rate = (self.scored + self.failed) / (now - self.started)
            console.print(
                f"{self.scored} scored ({self.anomalous} anomalous), {self.failed} failed, {rate:.1f} images/s"
            )


def show_totals(totals: Totals) -> None:
    """The balance of a scoring run, and what went wrong."""
    if totals.skipped_shards and not totals.shards and not totals.errors:
        console.print(f"nothing to do: all {totals.skipped_shards} shards were scored before")
        return
    skipped = f", {totals.skipped_shards} shards were scored before" if totals.skipped_shards else ""
    console.print(
        f"{totals.images} images in = {totals.scored} scored ({totals.anomalous} anomalous) + {totals.failed} failed; "
        f"{totals.shards} shards written{skipped}"
    )
    for error in totals.errors:
        console.print(f"not scored: {error}", style="red", markup=False)
    if not totals.balanced:
        console.print("some images are neither scored nor failed: run the same command again", style="bold red")


def metrics_table(found: Mapping[str, Any]) -> Table:
    """Metrics of every category and their mean, rates in percent."""
    table = Table(title="metrics in percent", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("category")
    names = list(found["mean"])
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for category, metrics in [*found["categories"].items(), ("mean", found["mean"])]:
        table.add_row(category, *(_metric(name, metrics[name]) for name in names))
    return table


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if name in ("images", "regions") else f"{100 * value:.1f}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
