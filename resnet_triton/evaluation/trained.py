"""The network of a run of ``resnet-triton train``, from one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..runs.build import build
from ..runs.checkpoint import Checkpoints, name_of
from ..runs.data import DEFAULTS
from ..weights import load_weights


class Trained(NamedTuple):
    """A checkpoint of a run.

    Args:
        name: of the checkpoint.
        configuration: the run's settings by name.
        weights: state_dict of its network; the moving average where the run kept one.
        averaged: whether it is that average.
    """

    name: str
    configuration: dict[str, Any]
    weights: dict[str, Any]
    averaged: bool

    def network(self, classes: int) -> nn.Module:
        """The network, converted, in eval mode.

        Raises:
            ValueError: the weights do not fit it, as where it was trained on other classes.
            ImportError, OSError: its builder is not there any more.
        """
        kind = self.configuration["data"]
        model = build(self.configuration["model"], classes, DEFAULTS[kind].channels)
        load_weights(model, self.weights)
        return model.eval()


def load_run(folder: str, best: bool = False) -> Trained:
    """The last, or the ``best``, checkpoint of the run in ``folder``.

    Raises:
        ValueError: a checkpoint is damaged.
        FileNotFoundError: there is none.
    """
    checkpoints = Checkpoints(Path(folder).expanduser() / "checkpoints")
    names = checkpoints.names()
    if not names:
        raise FileNotFoundError(
            f"--run {folder!r}: there is no checkpoint in {str(checkpoints.folder)!r}; it takes the --output of "
            "resnet-triton train"
        )
    found = checkpoints.load(names[-1])
    if best and found.facts["best"] is not None:
        found = checkpoints.load(name_of(found.facts["best"]["epoch"], 0))
    averaged = "ema" in found.tensors
    weights = found.tensors["ema" if averaged else "model"]
    if averaged:
        weights = {key.removeprefix("module."): value for key, value in weights.items() if key != "n_averaged"}
    return Trained(found.path.name, found.facts["configuration"], weights, averaged)
