"""Small batches: which shared reductions and dependent launches are considered, planned, shown and tuned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torchvision.models import resnet50

from resnet_triton import convert, cost, explain, plan, tuning, use_backend
from resnet_triton.devices import Target, target_of
from resnet_triton.kernels.config import ConvConfig, Epilogue, alternatives, count_tiles, reduction_steps
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.small_grid import small_grid_configs
from resnet_triton.shapes import resnet_convs
from resnet_triton.tuner import candidates

H200, A100 = target_of("NVIDIA H200"), target_of("NVIDIA A100-SXM4-80GB")
LAST = ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1)
BN_RELU = Epilogue(bn=True, relu=True)


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "lookup", lambda *arguments: None)
    monkeypatch.setattr(tuning, "lookup_sibling", lambda *arguments: None)
    plan.forget()
    yield
    plan.forget()


def predicted_us(site, config: ConvConfig) -> float:
    return cost.predict(site.shape, site.epilogue, config, torch.bfloat16, "tf32", H200).us


def planned(site, target: Target = H200, dtype: torch.dtype = torch.bfloat16, precision: str = "tf32") -> ConvConfig:
    return plan.own_config(site.shape, site.epilogue, dtype, precision, target)


def test_a_full_wave_is_left_alone() -> None:
    config = ConvConfig("conv1x1", (1, 1, 64), 64, 64)
    shape = ConvShape(133, 8, 8, 64, 64)
    assert count_tiles(config, shape) == 133 and small_grid_configs(config, shape, 132) == []
    assert small_grid_configs(config, replace(shape, n=132), 132) == [replace(config, pdl=True)]
    assert small_grid_configs(config, replace(shape, n=67), 132) == [replace(config, pdl=True)]


def test_shares_fill_at_most_one_wave_with_two_steps_each() -> None:
    base = alternatives(LAST, 2, True)[0]
    found = small_grid_configs(base, LAST, 132)
    assert found[0] == replace(base, pdl=True) and len(set(found)) == len(found)
    assert {config.split for config in found} == {1, 2, 4, 8, 16}
    for config in found:
        assert config.pdl and cost.fits(config, LAST, 2, False, H200)
        assert config.split == 1 or count_tiles(config, LAST) * config.split <= 132
        assert reduction_steps(config, LAST) >= 2 * config.split or config.split == 1
    short = ConvShape(1, 7, 7, 192, 64)
    assert {c.split for c in small_grid_configs(alternatives(short, 2, True)[0], short, 132)} == {1}


def test_a_persistent_kernel_and_pointers() -> None:
    """The first has no shares, but its tile without persistence has; the second only starts early."""
    shape = ConvShape(1, 7, 7, 2048, 512)
    base = alternatives(shape, 2, True)[0]
    assert base.persistent and all(c.persistent == 0 for c in small_grid_configs(base, shape, 132)[1:])
    odd = ConvShape(1, 7, 7, 64, 64, 3, 3, 2, 1)
    base = alternatives(odd, 2, True)[0]
    assert base.kernel == "conv_pointer" and small_grid_configs(base, odd, 132) == [replace(base, pdl=True)]


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_the_plan_of_small_batches(batch: int) -> None:
    sites = list(resnet_convs(50, batch))
    configs = [planned(site) for site in sites]
    assert configs == [planned(site) for site in sites]
    before = [min(predicted_us(site, c) for c in alternatives(site.shape, 2, True)) for site in sites]
    after = [predicted_us(site, config) for site, config in zip(sites, configs, strict=True)]
    assert all(new <= old for new, old in zip(after, before, strict=True)) and sum(after) < 0.9 * sum(before)
    for site, config in zip(sites, configs, strict=True):
        tiles = count_tiles(config, site.shape)
        assert not config.pdl or tiles <= 132
        assert config.split == 1 or (tiles * config.split <= 132 and config.pdl)
    split = {site.name for site, config in zip(sites, configs, strict=True) if config.split > 1}
    assert {f"layer4.{i}.conv2" for i in range(3)} <= split
    assert not any(name.startswith("layer1") for name in split)


def test_large_batches_are_planned_as_ever() -> None:
    for site in resnet_convs(50, 256):
        config = planned(site)
        assert config.split == 1 and not config.pdl


def test_only_from_sm_90_on() -> None:
    for site in resnet_convs(50, 1):
        config = planned(site, A100)
        assert config.split == 1 and not config.pdl
    for site in resnet_convs(50, 1):  # exact fp32 has no kernel that shares
        assert planned(site, H200, torch.float32, "ieee").split == 1


def test_explain_shows_shares_and_counts_their_bytes() -> None:
    with torch.device("meta"):
        model = convert(resnet50().eval(), inplace=True)
    with use_backend("triton"):
        rows = {r.name: r for r in explain(model, (1, 3, 224, 224), dtype=torch.bfloat16, device="NVIDIA H200").rows}
    row = rows["layer4.2.conv2"]
    config = plan.own_config(LAST, BN_RELU, torch.bfloat16, "tf32", H200)
    assert config.split > 1 and row.config == str(config) and f" /{config.split} pdl" in str(config)
    assert row.bytes == LAST.bytes_moved(2) + 2 * 4 * config.split * 49 * 512


def test_the_tuner_measures_shares() -> None:
    for site in resnet_convs(50, 1):
        assert planned(site) in candidates(site.shape, torch.bfloat16, H200, epilogue=site.epilogue)
    found = candidates(LAST, torch.bfloat16, H200, epilogue=BN_RELU)
    assert sum(config.split > 1 for config in found) >= 4 and any(config.split == 1 for config in found)
    assert len({config.stages for config in found if config.split > 1}) > 1
