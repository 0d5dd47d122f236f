"""One quiet Ray session for a job: the running cluster when there is one, else a local one that ends with the job."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.data

from pipeline.batch import Workers
from pipeline.errors import UserError


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all."""

    cpus: int
    gpus: int

    def scoring_workers(self, actors: int = 0) -> Workers:
        """Scoring actors and their shares: one CPU stays free for reading and decoding where there is more than one."""
        count = actors or self.gpus or 1
        if count > (self.gpus or max(1, self.cpus - 1)):
            kind = f"{self.gpus} GPUs" if self.gpus else f"{self.cpus} CPUs, one of which reads and decodes"
            raise UserError(f"--actors {count} are too many for {kind}: lower it, or 0 to choose by itself")
        return Workers(count, max(1, (self.cpus - 1) // count) if not self.gpus else 1, 1.0 if self.gpus else 0.0)


@contextmanager
def ray_session() -> Iterator[Resources]:
    """Connect to RAY_ADDRESS (set inside `ray job submit`) or start Ray on this machine; disconnect at the end.

    Ray's own messages below errors are silenced: the terminal belongs to progress, results and problems. The logs
    of all workers stay in Ray's session folder.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.filterwarnings("ignore", module=r"ray\..*")
    remote = bool(os.environ.get("RAY_ADDRESS"))
    _quiet_native_log()
    options = {} if remote else {"include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        total = ray.cluster_resources()
        yield Resources(int(total.get("CPU", 1)), int(total.get("GPU", 0)))
    finally:
        ray.shutdown()


def _quiet_native_log() -> None:
    """Ray's C++ side writes warnings of its own working to file descriptor 2: give it a file, keep ours on the terminal."""
    if sys.stderr.fileno() != 2:
        return
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    log = Path(tempfile.gettempdir()) / f"defectmap-ray-{os.getpid()}.log"
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
