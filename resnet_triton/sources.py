"""Finds a model by name: the ``--model`` of every command.

``resnet50``                    a network of this package
``cifar_resnet20``              a family of this package and a depth; also ``cifar_plain``, ``preact_cifar_resnet``
``torchvision:resnet50``        any name of ``torchvision.models.list_models()``
``timm:resnet50``               any name of ``timm.list_models()``
``hf:FOLDER``                   a Hugging Face model in a local folder, or its ``config.json``
``package.module:function``     a function or class called without arguments; also ``mymodel.py:build``

Nothing is downloaded, but for weights that the user names (``IMAGENET1K_V2``).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .convert import unconvert
from .fold import fold
from .models import CifarResNet, build_by_name
from .models.names import builders, is_known, takes, with_arguments
from .weights import is_name, load_weights

#: Metadata keys of a ``.safetensors`` file that holds the state_dict of a folded model: the model's name, and the
#: arguments of its builder, for nothing in a folded state_dict says how the shortcuts are padded.
FOLDED = "resnet_triton.folded"
ARGUMENTS = "resnet_triton.arguments"


def load_model(spec: str, *, weights: str | None = None, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that ``spec`` names, in eval mode, not converted.

    Args:
        spec: see this module's text. A module is looked for in the current folder first. Behind the name of a network
            of this package may come arguments of its builder: ``"resnet50 shortcut=A"``.
        weights: a file that :func:`resnet_triton.weights.load_weights` reads, or the name of torchvision's weights for
            this model, which are downloaded; None is random weights, or those that ``spec`` brings itself. A CIFAR
            network takes its classes and shortcuts from the file. A file that ``resnet-triton fold`` wrote gives the
            folded model.
        arguments: more of them, such as ``{"shortcut": "A"}``.

    Raises:
        ValueError: for a name that is not known, with the nearest known ones; for what the user's function raises,
            with the line; for weights that do not fit.
        ImportError: for a library that is not installed.
        OSError: for files that cannot be read, and downloads that fail.
    """
    spec, words = with_arguments(spec)
    arguments = {**words, **(arguments or {})}
    prefix, _, rest = spec.partition(":")
    if not spec.strip():
        raise ValueError(f"model is empty; allowed: {', '.join(builders())}, {_FORMS}")
    if ":" not in spec:
        return _own(spec, weights, arguments)
    if arguments:
        raise ValueError(
            f"model {spec!r} takes no arguments here ({', '.join(arguments)}): only this package's networks do; name a "
            "function that passes them: package.module:function"
        )
    if not rest:
        raise ValueError(f"model {spec!r} ends with a colon; allowed: {_FORMS}")
    if prefix == "torchvision":
        return _torchvision(rest, weights)
    if prefix == "timm":
        return _finish(_timm(rest), weights)
    if prefix == "hf":
        return _finish(_hugging_face(rest, random=weights is not None), weights)
    return _finish(_call(spec), weights)


_FORMS = "torchvision:NAME, timm:NAME, hf:FOLDER, package.module:function"


def _own(name: str, weights: str | None, arguments: dict[str, Any]) -> nn.Module:
    """A network of this package."""
    if not is_known(name):
        known = builders()
        hint = [f"torchvision:{name}"] if name in _torchvision_names() else difflib.get_close_matches(name, known)
        raise ValueError(f"model {name!r} is not known{_did_you_mean(hint)}; allowed: {', '.join(known)}, {_FORMS}")
    folded = None if weights is None else _folded(weights)
    if folded is not None:
        stored = json.loads(folded.get(ARGUMENTS, "{}"))
        arguments = {
            key: value for key, value in stored.items() if takes(name, key) or takes(name, "kwargs")
        } | arguments
    elif weights is not None and not is_name(weights) and takes(name, "in_channels"):
        # A CIFAR network: how it is built depends on the file.
        return _finish(build_by_name(name, weights=weights, **arguments), None)
    return _finish(build_by_name(name, **arguments), weights)


def arguments_of(model: nn.Module) -> dict[str, Any]:
    """Arguments that give a CIFAR network again, whatever its file said; none of others or with another classifier."""
    if not isinstance(model, CifarResNet) or not isinstance(model.fc, nn.Linear):
        return {}
    return {
        "num_classes": model.fc.out_features,
        "in_channels": model.conv1.in_channels,
        "shortcut": model.shortcut,
    }


def _did_you_mean(names: Iterable[str]) -> str:
    names = list(names)
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _finish(model: nn.Module, weights: str | None) -> nn.Module:
    """The model with its weights, in eval mode, not converted."""
    model.eval()
    if weights is not None and _folded(weights) is not None:
        fold(model, inplace=True)
    load_weights(model, weights)
    return unconvert(model, inplace=True)


def _folded(weights: str) -> dict[str, str] | None:
    """The metadata of a file that ``resnet-triton fold`` wrote; None for others.

    Any fault of the file is for ``load_weights`` to name.
    """
    path = Path(weights).expanduser()
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return metadata if FOLDED in metadata else None


def _torchvision_names() -> list[str]:
    try:
        import torchvision.models
    except (ImportError, RuntimeError):  # absent, or built for another torch
        return []
    return torchvision.models.list_models()


def _torchvision(name: str, weights: str | None) -> nn.Module:
    try:
        from torchvision.models import get_model, get_model_builder, get_model_weights, list_models
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"model 'torchvision:{name}' needs torchvision: pip install torchvision ({error})") from error
    if name not in list_models():
        close = [f"torchvision:{match}" for match in difflib.get_close_matches(name, list_models())]
        raise ValueError(f"torchvision has no model {name!r}{_did_you_mean(close)}")
    # A detector's own default would download its backbone.
    options = {"weights_backbone": None} if _takes(get_model_builder(name), "weights_backbone") else {}
    if weights is None or not is_name(weights):
        return _finish(get_model(name, weights=None, **options), weights)
    members = get_model_weights(name).__members__
    member = members.get(weights.rpartition(".")[2])
    if member is None:
        raise ValueError(
            f"weights={weights!r} is neither a file nor a name of torchvision's weights for {name}; "
            f"allowed: {', '.join(members)}, or a .pth or .safetensors file"
        )
    try:
        return get_model(name, weights=member, **options).eval()
    except OSError as error:
        raise OSError(
            f"weights={weights!r} could not be downloaded ({error}). Fetch {member.url} where there is a network, "
            "and pass the path of the file."
        ) from error


def _takes(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"model 'timm:{name}' needs timm: pip install timm") from error
    if not timm.is_model(name):
        if ":" in name:
            raise ValueError(
                f"model 'timm:{name}' would be downloaded, which is not done here; name the architecture "
                "(timm:resnet50), and pass its weights as a file"
            )
        close = [f"timm:{match}" for match in difflib.get_close_matches(name, timm.list_models())]
        raise ValueError(f"timm has no model {name!r}{_did_you_mean(close)}")
    return timm.create_model(name, pretrained=False)


def _hugging_face(folder: str, random: bool) -> nn.Module:
    """The model of a local folder; ``random`` leaves its weights unread, for others to come."""
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        raise ImportError(f"model 'hf:{folder}' needs transformers: pip install transformers") from error
    path = Path(folder).expanduser()
    if not path.exists():
        raise ValueError(
            f"model 'hf:{folder}': there is no such folder, and nothing is downloaded here. Download it first: "
            f"hf download {folder} --local-dir {path.name}, then hf:{path.name}"
        )
    random = random or path.is_file()
    if not random and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model 'hf:{folder}' has no .safetensors file; allowed: a folder with one, or its config.json "
            f"(hf:{path / 'config.json'}) for random weights. Files that are pickles (.bin) are not read."
        )
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **local)
        if random:
            return AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        model, report = AutoModelForImageClassification.from_pretrained(
            path, config=config, dtype="float32", use_safetensors=True, output_loading_info=True, **local
        )
    except Exception as error:  # of transformers, huggingface_hub, safetensors, json
        text = traceback.format_exception_only(error)[-1].strip()
        raise ValueError(f"model 'hf:{folder}' cannot be loaded: {text}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model 'hf:{folder}' lacks {len(missing)} weights ({', '.join(missing[:4])}, ...)")
    return model


def _call(spec: str) -> nn.Module:
    """The model that ``package.module:function`` gives."""
    place, _, attribute = spec.rpartition(":")
    module = _import(place, spec)
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [key for key in vars(found) if not key.startswith("_")]
            close = [f"{place}:{match}" for match in difflib.get_close_matches(name, public)]
            raise ValueError(f"model {spec!r}: {place} has no {name!r}{_did_you_mean(close)}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(
            f"model {spec!r} is of type {type(found).__name__}; allowed: a function or class that returns a model"
        )
    try:
        model = found if isinstance(found, nn.Module) else found()
    except (Exception, SystemExit) as error:
        raise ValueError(_users_error(spec, error, getattr(module, "__file__", None))) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r} gave {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _import(place: str, spec: str) -> Any:
    """The user's module, by name or by file; its folder stays on the path for what it imports later."""
    path = Path(place).expanduser()
    by_file = path.suffix == ".py"
    if by_file and not path.is_file():
        raise ValueError(f"model {spec!r}: there is no file {str(path)!r} (looked in {path.absolute().parent})")
    folder = str(path.absolute().parent if by_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem if by_file else place
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(f"{missing}.")):
            raise ValueError(
                f"model {spec!r}: no module {missing!r} in {folder} or among the installed packages; allowed: {_FORMS}"
            ) from error
        source = path if by_file else Path(folder, *name.split(".")).with_suffix(".py")
        raise ValueError(_users_error(spec, error, str(source))) from error


def _users_error(spec: str, error: BaseException, file: str | None) -> str:
    """One line: what was raised, and the last line of the user's file that led there."""
    text = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, SyntaxError):
        return f"model {spec!r} raised {text} ({error.filename}, line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    if not frames:
        return f"model {spec!r} raised {text}; it is called without arguments"
    frame = next((f for f in reversed(frames) if file and Path(f.filename) == Path(file)), frames[-1])
    return f"model {spec!r} raised {text} ({frame.filename}, line {frame.lineno}: {frame.line})"
