"""Checkpoints of unfinished training runs on storage: one file per run, replaced in one step, read without pickle."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass

import torch

from pipeline.fit import Fit
from pipeline.storage import Location

FORMAT = 2
"""Of what a checkpoint holds; to be raised where `Fit.state_dict` changes, or the network of the same settings."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint of one run."""

    folder: Location
    fingerprint: str
    """Of the photographs: a checkpoint made from others is not continued."""

    @property
    def _file(self) -> Location:
        return self.folder / "fit.pt"

    def save(self, fit: Fit) -> None:
        """Replace the checkpoint by where the fit stands."""
        buffer = io.BytesIO()
        kept = {"format": FORMAT, "fingerprint": self.fingerprint, "threads": torch.get_num_threads()}
        torch.save(kept | {"fit": fit.state_dict()}, buffer)
        self._file.write_bytes(buffer.getvalue())

    def resume(self, fit: Fit) -> str | None:
        """Continue from the checkpoint, if there is one of these photographs, with as many threads as it was made with:
        sums of another number of threads round differently. Returns why a checkpoint that is there cannot be used."""
        try:
            data = self._file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            state = torch.load(io.BytesIO(data), map_location=fit.device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            return "the checkpoint is damaged: training begins anew"
        if state.get("format") != FORMAT:
            return "the checkpoint is of another release: training begins anew"
        if state["fingerprint"] != self.fingerprint:
            return "the photographs have changed since the checkpoint: training begins anew"
        torch.set_num_threads(state["threads"])
        fit.load_state_dict(state["fit"])
        return None

    def remove(self) -> None:
        """The run is done."""
        self.folder.remove_tree()
