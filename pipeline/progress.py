"""Progress on the terminal: live where there is one, otherwise a line now and then that suits a log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.command import console
from pipeline.totals import ShardOutcome, Totals

if TYPE_CHECKING:  # scoring shows its progress without waiting for torch
    from pipeline.model_versions import StoredVersion
    from pipeline.training_board import Progress, State

SHOWN_ODD = 3
"""Of the oddest normal photographs."""
LOG_EVERY = 30.0
"""Seconds between progress lines when the output is not a terminal."""
WORKED_ON: tuple[State, ...] = ("running", "calibrating")
STATES: tuple[State, ...] = (*WORKED_ON, "queued", "done", "failed")


def training_table(rows: Sequence[Progress], title: str) -> Table:
    """State, step, losses, time so far and to go, and the outcome of every network."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("network", "state", "step", "noise", "bound", "feature", "time", "left", "result"):
        text = name in ("network", "state", "result")
        table.add_column(name, justify="left" if text else "right", no_wrap=name != "result", overflow="fold")
    for row in rows:
        losses = [f"{row.losses[name]:.3f}" if row.losses else "" for name in ("noise", "bound", "feature")]
        steps = row.step - row.first_step
        left = row.seconds / steps * (row.iterations - row.step) if steps > 0 else 0.0
        table.add_row(
            Text(row.name),  # as they are: an error's text may look like markup
            row.state,
            f"{row.step}/{row.iterations}",
            *losses,
            duration_text(row.seconds),
            duration_text(left) if row.state == "running" and left else "",
            Text(_result(row)),
        )
    return table


def _result(row: Progress) -> str:
    versions = ", ".join(sorted({found["version"] for found in row.found.values()}))
    return "; ".join(text for text in (versions, row.reason, row.warning) if text)


def training_title(rows: Sequence[Progress], elapsed: float) -> str:
    """How many networks are where, and an estimate of the time left that grows with what is queued."""
    states = Counter(row.state for row in rows)
    total = sum(row.iterations for row in rows)
    done = sum(row.iterations if row.state in ("done", "failed") else row.step for row in rows)
    left = f", about {duration_text(elapsed * (total - done) / done)} left" if 0 < done < total else ""
    counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    return f"{counts}; {duration_text(elapsed)}{left}"


def show_training(snapshots: Iterable[list[Progress]]) -> list[Progress]:
    """Draw every snapshot until the last, which is returned after a final table.

    A live table has the networks that are trained or have failed, as many as the terminal's height allows.
    """
    rows: list[Progress] = []
    started = time.monotonic()
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2, transient=True) as live:
            for rows in snapshots:
                shown = [row for row in rows if row.state == "failed"] + [row for row in rows if row.state in WORKED_ON]
                title = training_title(rows, time.monotonic() - started)
                live.update(training_table(shown[-max(1, console.height - 4) :], title))
    else:
        last = 0.0
        states: dict[str, State] = {}
        for rows in snapshots:
            changed = [row for row in rows if row.state != states.get(row.name, "queued")]
            due = time.monotonic() - last > LOG_EVERY
            states = {row.name: row.state for row in rows}
            for row in rows if due else changed:
                if row in changed or row.state in WORKED_ON:
                    result = f" {_result(row)}" if _result(row) else ""
                    step = f"{row.state} {row.step}/{row.iterations} {duration_text(row.seconds)}"
                    console.print(f"{row.name}: {step}{result}", markup=False)
            if due:
                last = time.monotonic()
                console.print(training_title(rows, time.monotonic() - started), markup=False)
    console.print(training_table(rows, "trained"))
    return rows


def versions_table(found: Sequence[StoredVersion]) -> Table:
    """Stored models: which is in use, what it was trained on and how it does on implanted defects."""
    table = Table(title="* in use, ! pinned", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("category", "", "version", "preset", "images", "steps", "false alarms", "remark"):
        table.add_column(name, no_wrap=name != "remark", justify="right" if name in ("images", "steps") else "left")
    for stored in found:
        mark = ("*" if stored.in_use else "") + ("!" if stored.pinned else "")
        info = stored.info
        if info is None:
            table.add_row(Text(stored.category), mark, stored.version, "", "", "", "", Text(stored.problem))
            continue
        known = info.provenance
        interval = [100 * info.calibration[name] for name in ("false_alarms_low", "false_alarms_high")]
        marks = {
            "recalibrated": "recalibrated" in known,
            "calibrated anew": "network_of" in known,
            "joint": info.classes,
            "outdated": info.outdated,
        }
        remark = ", ".join(mark for mark, true in marks.items() if true)
        table.add_row(
            Text(stored.category),
            mark,
            stored.version,
            info.config.preset,
            str(known.get("training_images", "")),
            str(info.config.training.iterations),
            f"{100 * info.config.scoring.false_alarm_rate:g} % ({interval[0]:.2g}-{interval[1]:.2g})",
            remark,
        )
    return table


def model_line(category: str, found: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """What a category's new model chose, how it does on implanted defects, and what its threshold promises."""
    prediction = "minus prediction " if found["subtract_prediction"] else ""
    notes = [f"{100 * found['context_weight']:g} % context"] if found["context_weight"] else []
    notes += [f"reach {found['reach']}"] if found["reach"] else []
    notes += ["turned"] if found["turned"] else []
    details = f" ({', '.join(notes)})" if notes else ""
    settings = "".join(f", {name}={value}" for name, value in chosen.items())
    odd = ", ".join(f"{each['image']} {each['score']:.3g}" for each in found["oddest"][:SHOWN_ODD])
    law = "" if found["by_rank"] else " if they follow a normal law"
    alone = " (held-out ones alone: the network knows the others by heart)" if found["known_by_heart"] else ""
    figures = " / ".join(f"{100 * found[name]:.1f}" for name in ("pixel_auroc", "pro_0.30", "image_auroc"))
    return (
        f"{category}: weight of the pixel branch {found['alpha']:g}, features {prediction}by covariance "
        f"{found['covariance']}{details}, image score of {found['top_pixels']} px{settings}; "
        f"implanted defects {figures} (pixel AUROC / PRO / image AUROC); "
        f"false alarms {100 * found['false_alarm_rate']:g} % requested, 95 % interval "
        f"{100 * found['false_alarms_low']:.2g}-{100 * found['false_alarms_high']:.2g} % "
        f"by the scores of {found['normal_images']} normal images{alone}{law}; threshold {found['threshold']:.3g}, "
        f"the oddest of those scored: {odd}"
    )


@dataclass
class _ArchiveProgress:
    """How far one archive is."""

    size: int
    """Bytes on storage."""
    read: int = 0
    """Bytes of images that are scored or failed."""
    shards: int = 0
    expected: int | None = None
    """Shards to score; None until the reader has said."""
    skipped: int = 0

    @property
    def done(self) -> bool:
        return self.expected is not None and self.shards >= self.expected

    @property
    def worked(self) -> int:
        """Bytes of the archive that this run has gone through: an estimate, until it is done."""
        return self.size if self.done and not self.skipped else min(self.read, self.size)

    @property
    def left(self) -> float:
        """Bytes still to go through: by shards once they are counted; too many for a tar that an earlier run has begun."""
        if self.expected is None:
            return self.size - min(self.read, self.size)
        return self.size * (self.expected - self.shards) / max(1, self.expected + self.skipped)


class ScoringProgress:
    """Counts a scoring run and shows it: a live line on a terminal, otherwise a line now and then that suits a log.

    Used as a context manager around the run and called with every outcome. `sizes` are the archives' bytes on storage,
    in the order of the plan; the time left follows from them and from what has been gone through so far.
    """

    def __init__(
        self, sizes: Sequence[int], clock: Callable[[], float] = time.monotonic, *, verb: str = "scored"
    ) -> None:
        self._verb = verb
        self.scored = self.failed = self.anomalous = self.bytes = 0
        self._archives = [_ArchiveProgress(size) for size in sizes]
        self._clock = clock
        self._started = self._shown = clock()
        self._live = Live(console=console, get_renderable=self.line, refresh_per_second=2, transient=True)

    def __enter__(self) -> ScoringProgress:
        self._started = self._shown = self._clock()
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def __call__(self, outcome: ShardOutcome) -> None:
        """Take one more shard, or one more archive's totals, into account."""
        self.scored += outcome.scored
        self.failed += outcome.failed
        self.anomalous += outcome.anomalous
        self.bytes += outcome.bytes
        archive = self._archives[outcome.archive]
        if outcome.shard is None:
            archive.expected, archive.skipped = outcome.shards, outcome.skipped
        else:
            archive.read += outcome.bytes
            archive.shards += 1
        now = self._clock()
        if not console.is_terminal and now - self._shown >= LOG_EVERY:
            self._shown = now
            console.print(self.line(), markup=False)

    def line(self) -> str:
        """Where the run stands."""
        seconds = self._clock() - self._started
        images = self.scored + self.failed
        done = sum(archive.done for archive in self._archives)
        left = self.seconds_left()
        return (
            f"{done}/{len(self._archives)} archives, {self.scored} {self._verb} ({self.anomalous} anomalous), "
            f"{self.failed} failed, {images / seconds if seconds > 0 else 0:.1f} images/s, {size_text(self.bytes)} read, "
            f"{duration_text(seconds)}{'' if left is None else f', about {duration_text(left)} left'}"
        )

    def seconds_left(self) -> float | None:
        """An estimate; None while there is nothing to go by."""
        worked = sum(archive.worked for archive in self._archives)
        if not worked:
            return None
        return (self._clock() - self._started) * sum(archive.left for archive in self._archives) / worked


def show_totals(
    totals: Totals,
    max_failure_fraction: float = 1.0,
    *,
    verb: str = "scored",
    failures_in: str = "the failures table",
) -> None:
    """The balance of a run that scored or restored, and what went wrong."""
    if totals.skipped_shards and not totals.shards and not totals.errors:
        console.print(f"nothing to do: all {totals.skipped_shards} shards were {verb} before")
    else:
        skipped = f", {totals.skipped_shards} shards were {verb} before" if totals.skipped_shards else ""
        console.print(
            f"{totals.images} images in = {totals.scored} {verb} ({totals.anomalous} anomalous) + {totals.failed} failed; "
            f"{totals.shards} shards written, {size_text(totals.bytes)} read{skipped}"
        )
    if totals.failures:
        codes = ", ".join(f"{count} {error}" for error, count in totals.failures.items())
        console.print(f"failed: {codes}; see {failures_in}", markup=False)
    for category, fraction in totals.failed_fractions.items():
        if fraction > max_failure_fraction:
            console.print(
                f"{category}: {100 * fraction:.1f} % of the images failed, "
                f"--max-failure-fraction allows {100 * max_failure_fraction:g} %",
                style="red",
                markup=False,
            )
    if totals.archive_failures:
        console.print(
            f"{totals.archive_failures} archives could not be read to their end: see {failures_in}",
            style="red",
            markup=False,
        )
    for error in totals.errors:
        console.print(f"not {verb}: {error}", style="red", markup=False)
    if not totals.balanced:
        console.print(f"some images are neither {verb} nor failed: run the same command again", style="bold red")


def size_text(size: int) -> str:
    """Bytes for people: 999 B, 1.2 MiB."""
    amount, units = float(size), ["B", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{size} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def duration_text(seconds: float) -> str:
    """M:SS, from an hour on H:MM:SS."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


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
