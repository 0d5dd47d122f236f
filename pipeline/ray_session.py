"""One quiet Ray session for a job: the running cluster when there is one, else a local one that ends with the job."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.data

from pipeline.errors import UserError
from pipeline.memory import ONE_HEAP
from pipeline.resources import Node, Resources
from pipeline.threads import wait_briefly

START_AT_ONCE = "RAY_prestart_worker_first_driver", "0"
"""For Ray where it starts. Its first driver would wait until a worker has started for every CPU, and for ever when one of them
does not come up (ray-project/ray#40131)."""


@contextmanager
def ray_session() -> Iterator[Resources]:
    """Connect to RAY_ADDRESS (set inside `ray job submit`), to a cluster that runs on this machine unless it is "local", or
    start Ray; disconnect at the end.

    Ray's own messages below errors are silenced: the terminal belongs to progress, results and problems. The logs
    of all workers stay in Ray's session folder.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    wait_briefly()  # and so will the workers of a Ray that starts here
    os.environ.setdefault(*ONE_HEAP)
    os.environ.setdefault(*START_AT_ONCE)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    remote = os.environ.get("RAY_ADDRESS", "local") != "local"
    _quiet_native_log()
    options = {} if remote else {"include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet_data()
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        resources = Resources([Node(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive])
        if not resources.cpus:
            raise UserError("the cluster has no CPU for workers: start worker nodes, then run the job again")
        yield resources
    finally:
        ray.shutdown()


def quiet_data() -> None:
    """No progress bars of Ray Data's own in this process."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _quiet_native_log() -> None:
    """Ray's C++ side writes warnings of its own working to file descriptor 2: give it a file, keep ours on the terminal."""
    if sys.stderr.fileno() != 2:
        return
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    if faulthandler.is_enabled():  # it, too, writes to descriptor 2
        faulthandler.enable(sys.stderr)
    log = Path(tempfile.gettempdir()) / f"defectmap-ray-{os.getpid()}.log"
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
