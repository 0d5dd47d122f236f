"""Merge the many small result files of old nights into files of a good size for queries; the rows stay the same."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from pipeline.command import OK, PARTIAL_FAILURE, console, run
from pipeline.compaction import Compaction, compact_night, old_nights, plan_compaction
from pipeline.errors import UserError
from pipeline.night_lock import LockLostError, hold_night
from pipeline.storage import Location
from pipeline.storage_checks import require_exists, require_writable
from pipeline.storage_errors import STORAGE_ERRORS


@dataclass(frozen=True)
class Options:
    """Options of compact."""

    results: str
    """Where score_archives wrote the tables; a local path or s3:// URI."""
    categories: tuple[str, ...] = ()
    """Categories to compact; all when omitted."""
    before: str = ""
    """Compact the nights before this date, YYYY-MM-DD; yesterday (UTC) when omitted, so that a night which is still
    being scored is left alone."""
    nights: tuple[str, ...] = ()
    """Compact these nights instead."""
    target_mib: int = 128
    """Size of a file, MiB; a file ends with the shard that reaches it."""
    dry_run: bool = False
    """Print what would be merged and stop."""


def compact(options: Options) -> int:
    """Compact; returns the exit status."""
    if options.target_mib < 1:
        raise UserError(f"--target-mib {options.target_mib}: choose 1 or more")
    if options.nights and options.before:
        raise UserError("--nights and --before exclude each other: give one of them")
    try:
        before = date.fromisoformat(options.before) if options.before else datetime.now(UTC).date() - timedelta(days=1)
    except ValueError as error:
        raise UserError(f"--before {options.before}: write the date as YYYY-MM-DD") from error
    results = Location.parse(options.results)
    require_exists(results, "--results")
    if not options.dry_run:
        require_writable(results)
    found = old_nights(results, categories=options.categories, nights=options.nights, before=before)
    failed = []
    for number, (category, night) in enumerate(found, 1):
        try:
            if options.dry_run:
                done = plan_compaction(results, category, night)
            else:
                with hold_night(results, night, wait=False):
                    done = compact_night(results, category, night, target_bytes=options.target_mib * 2**20)
        except (UserError, LockLostError, *STORAGE_ERRORS) as error:
            failed.append(f"{category}, {night}: {' '.join(str(error).split())}")
            continue
        console.print(f"[{number}/{len(found)}] {category}, {night}: {told(done)}", markup=False)
    console.print(f"{len(found) - len(failed)} of {len(found)} nights {'looked at' if options.dry_run else 'compact'}")
    for line in failed:
        console.print(f"not compacted: {line}", style="red", markup=False)
    return PARTIAL_FAILURE if failed else OK


def told(done: Compaction) -> str:
    """One night in words."""
    leftovers = f", {done.leftovers} files left by an interrupted compaction to remove" if done.leftovers else ""
    if not done.shards:
        return f"nothing to merge{leftovers}"
    into = f" into {done.written}" if done.written else ""
    return f"{done.shards} shards in {done.merged} files{into}{leftovers}"


if __name__ == "__main__":
    run(compact, Options, __doc__ or "")
