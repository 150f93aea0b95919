"""What is left of the epochs: metrics.csv, TensorBoard where it is installed, and the curves as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import plot
from . import files

#: Columns of metrics.csv. Errors are shares of images, losses means over them; of training, as the epoch went along
#: and on augmented images. The error of the averaged weights is empty without ``--ema``.
COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_error",
    "test_loss",
    "test_error",
    "ema_test_error",
    "seconds",
)

Row = Mapping[str, Any]


def write_metrics(path: Path, history: Sequence[Row]) -> None:
    """Writes the whole table; numbers read back to the same bits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    files.replace_file(path, text.getvalue().encode())


def draw_curves(path: Path, history: Sequence[Row], title: str) -> None:
    """Draws train and test error over epochs.

    Raises:
        ImportError: without matplotlib.
        OSError: the file cannot be written.
    """
    figure = plot.new_figure(7, 4)
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    lines = {"train_error": "training (augmented)", "test_error": "test", "ema_test_error": "test, averaged weights"}
    for column, label in lines.items():
        if history and history[0].get(column) is not None:
            axes.plot(epochs, [100 * row[column] for row in history], marker=".", label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("error, %")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    plot.save(figure, path)


class Board:
    """Scalars for TensorBoard; does nothing where it is not installed, which ``present`` tells.

    Args:
        folder: of the event files.
        epochs: already done; what an interrupted run wrote beyond them is hidden.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer: Any = None
        else:
            self._writer = SummaryWriter(str(folder), purge_step=epochs + 1)

    @property
    def present(self) -> bool:
        """Whether TensorBoard is installed."""
        return self._writer is not None

    def add(self, row: Row) -> None:
        """Adds an epoch."""
        if self._writer is None:
            return
        for column in COLUMNS[1:]:
            if row[column] is not None:
                self._writer.add_scalar(column, row[column], row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Finishes the file."""
        if self._writer is not None:
            self._writer.close()
