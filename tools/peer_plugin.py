"""The pytest plugin of ``tools/peer_tests.py``: a peer's tests on converted models.

It patches the peer's model builders before the tests import them, keeps the cases whose model is a ResNet, fails a case
in which no converted block was built, and prints what ran.
"""

from __future__ import annotations

import functools
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tools.peer_tests import PEERS


class Counter:
    """What the current case has built and run."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts a case."""
        self.models, self.blocks, self.calls = 0, 0, 0

    def convert(self, built: Any) -> Any:
        """The model that a builder made, converted."""
        from resnet_triton.convert import convert, is_converted, residual_blocks

        converted = convert(built, inplace=True)
        self.models += 1
        self.blocks += sum(is_converted(block) for _, block, _ in residual_blocks(converted))
        return converted


COUNTER = Counter()


def converting(builder: Callable) -> Callable:
    """A model builder whose models are converted."""

    @functools.wraps(builder)
    def build(*args: Any, **kwargs: Any) -> Any:
        return COUNTER.convert(builder(*args, **kwargs))

    return build


def patch_timm() -> None:
    """Makes ``timm.create_model`` return converted models."""
    import timm
    import timm.models._factory

    create_model = converting(timm.create_model)
    for module in (timm, timm.models, timm.models._factory):
        module.create_model = create_model  # type: ignore[attr-defined]


def patch_torchvision(names: Sequence[str]) -> None:
    """Makes these builders of torchvision's registry and namespaces return converted models."""
    from torchvision import models
    from torchvision.models import _api

    for name in names:
        builder = _api.BUILTIN_MODELS[name]
        _api.BUILTIN_MODELS[name] = build = converting(builder)
        for module in (models, models.segmentation, models.detection):
            if getattr(module, name, None) is builder:
                setattr(module, name, build)


def count_fused_calls() -> None:
    """Counts how many residual blocks run fused."""
    from resnet_triton import functional

    block_tail = functional.block_tail

    @functools.wraps(block_tail)
    def counted(*args: Any, **kwargs: Any) -> Any:
        COUNTER.calls += 1
        return block_tail(*args, **kwargs)

    functional.block_tail = counted


def pytest_addoption(parser: Any) -> None:
    """``--peer`` and ``--peer-models``, given by :func:`main`."""
    parser.addoption("--peer", choices=tuple(PEERS))
    parser.addoption("--peer-models", type=lambda text: text.split(","))


def pytest_configure(config: Any) -> None:
    """Patches the peer before its tests import it."""
    if config.option.peer == "timm":
        patch_timm()
    else:
        patch_torchvision(PEERS["torchvision"].models)
    count_fused_calls()


def pytest_collection_modifyitems(config: Any, items: list) -> None:
    """Keeps the cases of the chosen models."""
    peer, names = PEERS[config.option.peer], set(config.option.peer_models)
    if config.option.peer == "timm":
        names |= set(_default_tags(config.option.peer_models))
    kept = [item for item in items if _is_picked(item, peer.cases, names)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _default_tags(names: Sequence[str]) -> Iterator[str]:
    """Names with the tag of their default weights; timm has up to thirty tags for one architecture."""
    from timm.models import get_pretrained_cfg

    for name in names:
        cfg = get_pretrained_cfg(name)
        yield f"{name}.{cfg.tag}" if cfg is not None else name


def _is_picked(item: Any, cases: Sequence[str], names: set[str]) -> bool:
    import torch

    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("dev") == "cuda" and not torch.cuda.is_available():
        return False
    model = parameters.get("model_name") or getattr(parameters.get("model_fn"), "__name__", None)
    return item.originalname in cases and (model is None or model in names)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """Fails a case in which no converted block was built."""
    COUNTER.clear()
    try:
        yield
    finally:
        counts = {"models": COUNTER.models, "blocks": COUNTER.blocks, "calls": COUNTER.calls}
        item.user_properties.append(("peer", counts))
    if not COUNTER.blocks:
        pytest.fail("this case built no model with a converted residual block")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what ran: cases passed, models and blocks converted, blocks run fused."""
    peer = terminalreporter.config.option.peer
    rows: dict[str, list[int]] = defaultdict(lambda: [0] * 5)
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            counts = dict(report.user_properties).get("peer", {})
            row = rows[report.nodeid.split("::")[-1].split("[")[0]]
            row[outcome != "passed"] += 1
            for i, key in enumerate(("models", "blocks", "calls")):
                row[2 + i] += counts.get(key, 0)
    write = terminalreporter.write_line
    versions = ", ".join(
        f"{name} {importlib.import_module(name).__version__}" for name in dict.fromkeys((peer, "torch"))
    )
    write(f"\n{versions}, on converted models")
    head = ("test", "passed", "not passed", "models", "blocks converted", "blocks run fused")
    width = max(map(len, (*rows, "test")))
    write("  ".join([head[0].ljust(width), *head[1:]]))
    for name, row in rows.items():
        write("  ".join([name.ljust(width), *(str(n).rjust(len(h)) for n, h in zip(row, head[1:], strict=True))]))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: Any) -> None:
    """A skipped case, no case at all, or no block that ran fused is a failure too."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:
        return
    passed = reporter.stats.get("passed", ())
    fused = any(dict(report.user_properties).get("peer", {}).get("calls") for report in passed)
    if not fused or reporter.stats.get("skipped"):
        session.exitstatus = max(1, session.exitstatus)
