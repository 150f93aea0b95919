"""Loading weights into a model: by torchvision's names, from a state_dict, or from a file.

Everything is read and checked before the first value is copied, so an error leaves the model as it was.
Files are never allowed to run code: pickles are read with ``weights_only=True``. What was found in a checkpoint and
what was renamed is returned, and logged by ``resnet_triton.weights`` where it is more than tensors under our names.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoints import COUNTER, Report, cifar_network, read

logger = logging.getLogger("resnet_triton.weights")

#: What torch.save's files are called, safetensors, and the authors' own.
EXTENSIONS = (".pth", ".pt", ".th", ".tar", ".bin", ".ckpt", ".t7", ".safetensors", ".caffemodel")

#: An archive that unpacks to more than this multiple of its size was not written by torch.save, which packs nothing.
MAX_EXPANSION = 4

#: torchvision's enum for each architecture: (bottleneck, blocks of the stages, groups, width_per_group).
ENUMS = {
    (False, (2, 2, 2, 2), 1, 64): "ResNet18_Weights",
    (False, (3, 4, 6, 3), 1, 64): "ResNet34_Weights",
    (True, (3, 4, 6, 3), 1, 64): "ResNet50_Weights",
    (True, (3, 4, 23, 3), 1, 64): "ResNet101_Weights",
    (True, (3, 8, 36, 3), 1, 64): "ResNet152_Weights",
    (True, (3, 4, 6, 3), 32, 4): "ResNeXt50_32X4D_Weights",
    (True, (3, 4, 23, 3), 32, 8): "ResNeXt101_32X8D_Weights",
    (True, (3, 4, 23, 3), 64, 4): "ResNeXt101_64X4D_Weights",
    (True, (3, 4, 6, 3), 1, 128): "Wide_ResNet50_2_Weights",
    (True, (3, 4, 23, 3), 1, 128): "Wide_ResNet101_2_Weights",
}


class _NamedWeightsError(ValueError, TypeError, KeyError):
    """A ValueError that code written for torchvision catches too: there it is a TypeError or a KeyError."""

    __str__ = ValueError.__str__


def load_weights(model: nn.Module, weights: Any, *, progress: bool = True) -> Report | None:
    """Copy weights into a model, all of them or, on an error, none.

    Args:
        model: a ResNet of this package or of torchvision, converted or not, on any device and in any dtype.
        weights: None, which loads nothing, or one of

            - a member of a torchvision weights enum, or its name (``"IMAGENET1K_V2"``,
              ``"ResNet50_Weights.DEFAULT"``, ``"DEFAULT"``): downloaded and cached by torch.hub;
            - a state_dict, also one under a key such as ``"state_dict"`` or ``"model"``, one whose names start
              with ``module.`` or ``_orig_mod.``, and one in the names of a :class:`~resnet_triton.checkpoints.Family`;
            - the path of such a state_dict: a file of ``torch.save`` (``.pth``, ``.pt``, ``.th``, ``.pth.tar``,
              ``.bin``, ``.ckpt``, ``.t7``; saved on any device), ``.safetensors`` or ``.caffemodel``.
        progress: show the progress of a download.

    Returns:
        What was found and renamed; None where ``weights`` is None.

    Raises:
        FileNotFoundError: no file at the path.
        ValueError: an unknown extension; a file that is truncated, corrupt, unpacks to far more than its size
            or needs code to be read; missing or unexpected keys and other shapes than the model's; NaN or
            infinite values; an unknown name or one of another architecture; Caffe's weights for a network
            with today's strides or pooling.
        ImportError: weights by name without torchvision.
        OSError: a download or a file that cannot be read.
    """
    if weights is None:
        return None
    named = named_weights(_enum_name(model), weights)
    if named is not None:
        state, source = _download(named, progress), repr(named)
    else:
        _check_caffe(model, weights)
        state, source = _state(weights)
    target = model.state_dict()
    report = read(state, source, target)
    model.load_state_dict(_checked(report, target, type(model).__name__))
    logger.log(logging.INFO if report.mapped else logging.DEBUG, "weights: %s", report)
    zeros, shortcut = report.family and report.family.zeros, getattr(model, "shortcut", None)
    if zeros and shortcut in ("A", "A-both") and shortcut != zeros:
        logger.warning(
            "weights: %s has the names of %s, whose networks have shortcut=%r, but this model has shortcut=%r: its "
            "outputs will differ. Build it with cifar_resnet(depth, weights=...), which takes what the file needs.",
            source, report.family and report.family.name, zeros, shortcut,
        )  # fmt: skip
    return report


def inspect(weights: Any) -> Report:
    """What a checkpoint holds, without a model: its tensors under our names, whose names they were, which network.

    Args:
        weights: the path of a file, or a state_dict, as :func:`load_weights` takes them.

    Raises:
        FileNotFoundError, ValueError, OSError: for a file that cannot be read, as :func:`load_weights`.
    """
    return read(*_state(weights))


def shortcut_of(state: Mapping[str, Any]) -> str:
    """The ``shortcut`` that :class:`~resnet_triton.models.CifarResNet` needs for a state_dict: ``"A"``, ``"A-both"``,
    ``"B"`` or ``"C"``.

    The sides of the zeros follow from the naming (see :class:`~resnet_triton.checkpoints.Family`), for no value in the
    file depends on them. Plain nets have the tensors of option A.

    Raises:
        ValueError: for a state_dict of another network.
    """
    return cifar_network(read(state, "the state_dict")).shortcut


def _check_caffe(model: nn.Module, weights: Any) -> None:
    """Refuses the authors' Caffe weights for a network with today's strides or pooling: names and shapes would fit."""
    if isinstance(weights, Mapping) or Path(weights).suffix.lower() != ".caffemodel":
        return
    block, pool = getattr(model, "layer2", [None])[0], getattr(model, "maxpool", None)
    if getattr(getattr(block, "conv1", None), "stride", None) != (2, 2) or not getattr(pool, "ceil_mode", False):
        raise ValueError(
            f"weights={os.fspath(weights)!r} needs strides on the first 1x1 convolutions and Caffe's pooling: build "
            "the network with resnet_triton.caffe.caffe_resnet, or with stride_in_1x1=True, caffe_pool=True (and "
            "conv1_bias=True for ResNet-50)"
        )


def _state(weights: Any) -> tuple[Any, str]:
    """What a path or a state_dict holds, and its name in messages."""
    if isinstance(weights, Mapping):
        return weights, "the state_dict"
    return _read(Path(weights).expanduser()), repr(os.fspath(weights))


def named_weights(enum: str | None, weights: Any) -> Any | None:
    """The member of torchvision's ``enum`` that ``weights`` is or names; else None (state_dict, path, None).

    Args:
        enum: name of the enum in ``torchvision.models`` that fits the model; None where torchvision has none.
        weights: as in :func:`load_weights`.

    Raises:
        ValueError: a name that the enum does not have, a member of another enum, or an object of another
            kind.
        ImportError: a name without torchvision.
    """
    if weights is None or isinstance(weights, Mapping | os.PathLike):
        return None
    if isinstance(weights, str) and not is_name(weights):
        return None
    if not isinstance(weights, str | Enum):
        raise _NamedWeightsError(
            f"weights has type {type(weights).__name__}; allowed: None, a member or name of a torchvision "
            f"weights enum, a state_dict, or the path of a {', '.join(EXTENSIONS)} file"
        )
    if enum is None:
        raise _NamedWeightsError(
            f"weights={weights!r} is not a file, and torchvision has no weights for this architecture. Pass "
            f"a state_dict or the path of a {', '.join(EXTENSIONS)} file."
        )
    try:
        import torchvision.models
    except ImportError as error:
        raise ImportError(
            f"weights={weights!r} names weights of torchvision, which is not installed. Install torchvision, "
            f"or pass the path of a {', '.join(EXTENSIONS)} file."
        ) from error
    members = getattr(torchvision.models, enum)
    if isinstance(weights, members):
        return weights
    # __members__ lists aliases such as DEFAULT too.
    allowed = ", ".join(f"{enum}.{name}" for name in members.__members__)
    if isinstance(weights, Enum):
        raise _NamedWeightsError(f"weights={weights!r} belongs to another model; allowed for this one: {allowed}")
    prefix, _, name = weights.rpartition(".")
    if prefix not in ("", enum):
        raise _NamedWeightsError(f"weights={weights!r} belongs to another model; allowed for this one: {allowed}")
    if name not in members.__members__:
        raise _NamedWeightsError(
            f"weights={weights!r} is neither a file nor known by name; allowed: {allowed}, or the path of a "
            f"{', '.join(EXTENSIONS)} file"
        )
    return members[name]


def is_name(text: str) -> bool:
    """Whether a string is meant as a name: it has no folder and no extension, and no such file exists."""
    return re.fullmatch(r"(\w+Weights\.)?\w+", text) is not None and not Path(text).exists()


def _enum_name(model: nn.Module) -> str | None:
    """Name of torchvision's weights enum for a model, or None."""
    if not getattr(model, "is_torchvisions", True):  # another shortcut, stride or pool, under the same names
        return None
    stages = [getattr(model, f"layer{i}", None) for i in (1, 2, 3, 4)]
    if not all(isinstance(stage, nn.Sequential) and len(stage) for stage in stages):
        return None
    bottleneck = hasattr(stages[0][0], "conv3")  # type: ignore[index]
    depths = tuple(len(stage) for stage in stages)  # type: ignore[arg-type]
    groups, width = getattr(model, "groups", 1), getattr(model, "base_width", 64)
    return ENUMS.get((bottleneck, depths, groups, width))  # type: ignore[arg-type]


def _download(named: Any, progress: bool) -> Mapping[str, Any]:
    try:
        return named.get_state_dict(progress=progress, check_hash=True)
    except OSError as error:
        raise OSError(
            f"weights={named!r} could not be downloaded ({error}). Fetch {named.url} where there is a "
            "network, and pass the path of the file."
        ) from error


def _read(path: Path) -> Any:
    """What a file holds, on the CPU."""
    if path.suffix.lower() not in EXTENSIONS:
        raise ValueError(f"weights={str(path)!r} has extension {path.suffix!r}; allowed: {', '.join(EXTENSIONS)}")
    if not path.exists():
        raise FileNotFoundError(f"weights={str(path)!r}: there is no such file (looked in {path.absolute().parent})")
    if not path.is_file():
        raise ValueError(f"weights={str(path)!r} is not a file; pass the path of one {', '.join(EXTENSIONS)} file")
    if path.suffix.lower() == ".caffemodel":
        from .caffe import caffe_state_dict, read_caffemodel

        return caffe_state_dict(read_caffemodel(path))
    return _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _corrupt(path, error) from error


def _read_pickle(path: Path) -> Any:
    # Opened first, for its own OSError: torch.load raises one for some damaged files too.
    with path.open("rb") as file:
        pickled = file.read(1) == pickle.PROTO
    _check_expansion(path)
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file raises whatever its first bad byte leads to, KeyError included. Text read as a pickle
        # soon meets an unsupported operand, so that alone does not mean code.
        text = str(error)
        code = re.search(r"(?i)TorchScript|unsupported global", text) is not None
        if code or (pickled and "nsupported operand" in text):
            what = re.search(r"(?i)unsupported (global:? )?(GLOBAL )?[\w.]+", text)
            raise ValueError(
                f"weights={str(path)!r} is refused: reading it would run code that it names "
                f"({what[0] if what else 'a TorchScript archive'}); allowed: a state_dict of tensors. If you "
                "trust the file, convert it once: state = torch.load(path, map_location='cpu', "
                "weights_only=False), take the state_dict out of it (state['model'], state['state_dict'] or "
                "state.state_dict()), and store it with safetensors.torch.save_file(state_dict, "
                "'weights.safetensors')."
            ) from error
        raise _corrupt(path, error) from error


def _numpy_numbers() -> list[Any]:
    """What single numbers of numpy are pickled as: scripts store accuracies beside the weights. Arrays stay refused."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = (type(np.dtype(kind)) for kind in ("?", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8"))
    # The module was renamed in numpy 2; files have the name of their day.
    return [*((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")), np.dtype, *kinds]


def _check_expansion(path: Path) -> None:
    """Refuses an archive that would fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # no archive, or a damaged one: torch.load says what is wrong
        return
    size = path.stat().st_size
    if expanded > MAX_EXPANSION * size:
        raise ValueError(
            f"weights={str(path)!r} is refused: its {size} bytes unpack to {expanded}, which no file of torch.save "
            "does. Unpack it and store the state_dict with torch.save, or with safetensors.torch.save_file."
        )


def _corrupt(path: Path, error: Exception) -> ValueError:
    reason = f"{type(error).__name__} " + (str(error).splitlines() or [""])[0].split(". ")[0]
    return ValueError(
        f"weights={str(path)!r} ({path.stat().st_size} bytes) is truncated, corrupt or no {path.suffix} file "
        f"({reason.strip()}). Download or copy it again."
    )


def _checked(report: Report, target: Mapping[str, Tensor], model: str) -> Mapping[str, Tensor]:
    """A state_dict with the keys, shapes and kinds of ``target``, or a ValueError that says why not."""
    state, source = report.state, report.source
    # num_batches_tracked came to BN late: older checkpoints have none at all, nor has FrozenBatchNorm2d.
    ours, theirs = ({key for key in d if key.endswith(COUNTER)} for d in (target, state))
    if not theirs:
        state = {**state, **{key: target[key] for key in ours}}
    if not ours:
        state = {key: value for key, value in state.items() if key not in theirs}
    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in target.items()
        if key in state and state[key].shape != value.shape
    ]
    kinds = [
        f"{key} {state[key].dtype} on {state[key].device} instead of {value.dtype} on {value.device}"
        for key, value in target.items()
        if key in state and not _copyable(state[key], value)
    ]
    problems = [
        f"{len(items)} {what} ({_first(items)})"
        for what, items in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("other shapes", shapes),
            ("tensors that cannot be copied", kinds),
        )
        if items
    ]
    if not problems:
        _check_finite({key: state[key] for key in target}, source)
        return state
    hint = "Build the model with the checkpoint's depth, groups and width"
    if any(problem.startswith("fc.weight") for problem in shapes) and state["fc.weight"].dim() == 2:
        hint += f" and with num_classes={len(state['fc.weight'])}"
    holds = f"It holds {report.network}. " if report.network else ""
    raise ValueError(f"weights: {source} does not fit {model}: {'; '.join(problems)}. {holds}{hint}.")


def _check_finite(state: Mapping[str, Tensor], source: str) -> None:
    floats = ((key, value) for key, value in state.items() if value.is_floating_point())
    # isfinite knows no 8-bit floats.
    bad = [key for key, v in floats if not bool((v if v.itemsize > 1 else v.float()).isfinite().all())]
    if bad:
        raise ValueError(
            f"weights: {source} holds NaN or infinity in {len(bad)} of {len(state)} tensors ({_first(bad)}): its "
            "training diverged, or the file is damaged. To load them all the same: model.load_state_dict(...)."
        )


def _copyable(value: Tensor, target: Tensor) -> bool:
    """Whether copying keeps the numbers: fractions do not fit counters, and meta tensors have no numbers."""
    if value.is_meta or target.is_meta or value.is_quantized or value.layout != torch.strided:
        return False
    return value.is_floating_point() == target.is_floating_point() and not value.is_complex()


def _first(items: Iterable[str], limit: int = 4) -> str:
    items = list(items)
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
