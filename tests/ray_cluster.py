"""Rays that run before jobs come: a node of one CPU, and a cluster of a head without CPUs and two workers, started as operators
start it and reached as users reach it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
import requests

from pipeline.ray_session import START_AT_ONCE
from tests.job_runs import JOB_S, ROOT
from tests.seaweed_server import free_ports

RAY = str(Path(sys.executable).parent / "ray")
START_S = 120


@dataclass(frozen=True)
class RayCluster:
    """Addresses and environment of a running cluster."""

    address: str
    dashboard: str
    sessions: tuple[Path, ...]
    """Where each node keeps logs and what was uploaded."""
    environment: dict[str, str]
    """Of a user who may submit jobs to it."""

    def submit(self, *command: object) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python ...` from the project's root, until the job has ended."""
        line = [RAY, "job", "submit", "--working-dir", ".", "--", "python", *map(str, command)]
        return subprocess.run(
            line, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=JOB_S, check=False
        )


@contextmanager
def one_node(folder: Path) -> Iterator[dict[str, str]]:
    """A node of one CPU for jobs that come one after the other: it starts once, they sooner. The environment in which they
    find it."""
    port, client, agent = free_ports(3)
    found = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex}
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
    command += ["--object-store-memory=200000000", f"--temp-dir={folder}"]
    environment = os.environ | found | dict([START_AT_ONCE]) | {"RAY_ADDRESS": ""}
    with (folder / "node.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_S
            while not (folder / "session_latest/sockets/raylet").exists():
                assert process.poll() is None and time.monotonic() < deadline, (folder / "node.log").read_text()
                time.sleep(0.1)
            yield found
        finally:
            _kill_tree(process.pid)


@contextmanager
def ray_cluster(folder: Path, environment: dict[str, str]) -> Iterator[RayCluster]:
    """A cluster whose nodes have this environment; with token authentication, as Ray does by default."""
    gcs, dashboard, client, *agents = free_ports(6)
    # A submitter's machine needs no credentials of the storage: nodes have them.
    user = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    user |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs say "python"
    node = {**user, **environment, **dict([START_AT_ONCE]), "RAY_ADDRESS": f"127.0.0.1:{gcs}", "PATH": path}
    head = ["--head", f"--port={gcs}", "--num-cpus=0", f"--dashboard-port={dashboard}"]
    head += ["--include-dashboard=true", f"--ray-client-server-port={client}", "--disable-usage-stats"]
    worker = [f"--address=127.0.0.1:{gcs}", "--num-cpus=1"]
    with ExitStack() as stack:
        for number, (options, agent) in enumerate(zip([head, worker, worker], agents, strict=True)):
            command = [RAY, "start", "--block", f"--dashboard-agent-listen-port={agent}", *options]
            # Folders of their own: nodes that share one replace the uploaded code under each other's feet.
            command += ["--object-store-memory=200000000", f"--temp-dir={folder / str(number)}"]
            log = stack.enter_context((folder / f"node{number}.log").open("wb"))
            starting = {**node, "RAY_ADDRESS": ""} if number == 0 else node
            process = subprocess.Popen(command, env=starting, stdout=log, stderr=log)
            stack.callback(_kill_tree, process.pid)
            if number == 0:
                log_of_head = folder / "node0.log"
                _wait(process, f"http://127.0.0.1:{dashboard}/api/version", user["RAY_AUTH_TOKEN"], log_of_head)
            sessions = tuple(folder / str(each) / "session_latest" for each in range(number + 1))
            cluster = RayCluster(f"127.0.0.1:{gcs}", user["RAY_ADDRESS"], sessions, user)
            # One after the other: nodes of one machine that start together may choose the same ports.
            _wait_for_nodes(cluster, number + 1, folder / f"node{number}.log")
        yield cluster


def state_of(cluster: RayCluster, expression: str) -> str:
    """What a Python expression of `ray` and its API `state` gives in a process that is connected to the cluster."""
    connect = f"ray.init({cluster.address!r}, logging_level='ERROR', log_to_driver=False)"
    code = f"import ray, ray.util.state as state; {connect}; print({expression})"
    # The state API looks for it by itself, and other clusters may run on the machine.
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip().splitlines()[-1]


def _wait(process: subprocess.Popen[bytes], url: str, token: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=5).raise_for_status()
        except requests.RequestException:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"the dashboard does not answer:\n{log.read_text(errors='replace')[-3000:]}")


def _wait_for_nodes(cluster: RayCluster, count: int, log: Path) -> None:
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    deadline = time.monotonic() + START_S
    while True:
        try:
            found = requests.get(f"{cluster.dashboard}/nodes?view=summary", headers=headers, timeout=30).json()
            if sum(node["raylet"].get("state") == "ALIVE" for node in found["data"]["summary"]) == count:
                return
        except (requests.RequestException, KeyError):  # it has just begun; what is no JSON is the former, too
            pass
        if time.monotonic() > deadline:
            raise AssertionError(f"node {count - 1} is missing:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.5)


def _kill_tree(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    processes = [*parent.children(recursive=True), parent]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)  # they write to folders that are removed next
