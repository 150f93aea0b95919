"""Chains that were measured: which are worth measuring, what is tried, and what the plan makes of the times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_triton import chains, cost, explain, measure, plan, sites, tuning, use_backend
from resnet_triton import resnet50 as build
from resnet_triton.chains import Chain, Tail, bottleneck_tails, choose_chain
from resnet_triton.devices import Target, target_of
from resnet_triton.kernels.config import CHAIN_KERNELS, ConvConfig
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from resnet_triton.measure import ChainProblem
from resnet_triton.sites import ChainSite, chain_gains, merged, site_of, sites_of
from resnet_triton.tuner import LIMIT, Timing, Trial, chain_candidates, chain_entry_of, key_of
from resnet_triton.tuning import ChainEntry, Entry

H200 = target_of("NVIDIA H200")
SIBLING = replace(H200, name="NVIDIA Sibling")
BF16 = torch.bfloat16
TAILS = dict(bottleneck_tails(50, 256, 224))
TAIL = TAILS["layer2.1"]
WAYS = dict(chains.ways(TAIL))
WHOLE, SHORT = WAYS[frozenset({"conv", "reduce"})], WAYS[frozenset({"reduce"})]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No measurements but those in this folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "shipped_dir", lambda: tmp_path / "shipped")
    plan.forget()
    yield tmp_path
    plan.forget()


def measured(shape: ChainShape, us: float, library_us: float = 900.0, config: ConvConfig | None = None) -> ChainEntry:
    """A chain's entry, of its last candidate if no configuration is given."""
    return ChainEntry(shape, "bfloat16", config or chain_candidates(shape, BF16, H200)[-1], us, library_us)


def conv_entries(us: float, tail: Tail = TAIL) -> list[Entry]:
    """Entries of all the convolutions of a block's end, each of so many microseconds, on which cuDNN spends 900."""
    return [
        Entry(shape, "bfloat16", epilogue.residual, plan.own_config(shape, epilogue, BF16, "tf32", H200), us, 900.0)
        for shape, epilogue in tail.sites().values()
    ]


def choose(folder: Path, *entries: Entry | ChainEntry, of: str = H200.name, target: Target = H200, **changes) -> Chain:
    """The chain that is chosen where these times are known."""
    tuning.save(folder / tuning.file_name(of), of, entries, target.sm)
    plan.forget()
    tail, backend = changes.get("tail", TAIL), changes.get("backend", "auto")
    return choose_chain(tail, BF16, "tf32", target, backend)


# What the plan makes of the times


def test_a_measured_chain_is_taken_with_its_configuration(folder: Path) -> None:
    entry = measured(WHOLE, 100.0)
    chain = choose(folder, entry)
    assert (chain.shape, chain.choice.config, chain.choice.measured_us) == (WHOLE, entry.config, 100.0)
    assert chain.choice.predicted_us is None and chain.choice.limit
    assert chain.choice.reason.startswith("measured 100.0 us against 900.0 us by cudnn, ")
    assert chain.choice.config != choose_without(WHOLE).config, "the case tests nothing"


def choose_without(shape: ChainShape):
    """What is predicted fastest."""
    return min(
        (Trial(config, "ok") for config in chains.configs_of(shape, BF16, H200)),
        key=lambda trial: cost.predict_chain(shape, trial.config, BF16, "tf32", H200).us,
    )


def test_a_chain_slower_than_the_library_is_not_taken(folder: Path) -> None:
    slow = [measured(shape, 901.0) for shape in WAYS.values()]
    assert choose(folder, *slow) is None
    assert choose(folder, *slow, *conv_entries(1000.0), backend="triton") is not None, "there is no library"


def test_measured_convolutions_beat_a_slower_measured_chain(folder: Path) -> None:
    """Way by way: a chain counts with what it leaves to other kernels."""
    ways = [measured(WHOLE, 200.0), measured(SHORT, 110.0), measured(WAYS[frozenset({"conv"})], 210.0)]
    chain = choose(folder, *ways, *conv_entries(80.0))
    assert chain.shape == SHORT, "110 + 80 against 200 and 240"
    assert "against 900.0 us by cudnn, 160.0 us one kernel a convolution" in chain.choice.reason
    assert choose(folder, *ways, *conv_entries(60.0)).shape == SHORT, "170 against 180"
    assert choose(folder, *ways, *conv_entries(50.0)) is None, "160 against 150"


def test_a_predicted_chain_must_clearly_beat_measured_convolutions(folder: Path) -> None:
    us = cost.predict_chain(WHOLE, choose_without(WHOLE).config, BF16, "tf32", H200).us
    assert choose(folder, *conv_entries(us / 3 / 0.79)) is not None
    assert choose(folder, *conv_entries(us / 3 / 0.81)) is None
    # a measured one has to be faster only
    assert choose(folder, *conv_entries(us / 3 / 0.81), measured(WHOLE, us)).choice.measured_us == us


def test_times_of_another_batch_are_compared_with_that_batch(folder: Path) -> None:
    """Measured at batch 128, a chain does not look twice as fast beside the convolutions of batch 256."""
    half = dict(bottleneck_tails(50, 128, 224))["layer2.1"]
    shape = dict(chains.ways(half))[frozenset({"conv", "reduce"})]
    both = [*conv_entries(60.0), *conv_entries(30.0, half)]
    chain = choose(folder, *both, measured(shape, 85.0))
    assert chain.choice.measured_us == 85.0
    assert "us by cudnn at batch 128, 90.0 us one kernel a convolution" in chain.choice.reason
    assert choose(folder, *both, measured(shape, 95.0)) is None


def test_a_sibling_gives_the_configuration_of_a_clear_win(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = measured(WHOLE, 100.0)
    chain = choose(folder, entry, of=SIBLING.name)
    assert (chain.choice.config, chain.choice.measured_us) == (entry.config, None)
    predicted = cost.predict_chain(WHOLE, entry.config, BF16, "tf32", H200).us
    assert chain.choice.predicted_us == predicted
    assert chain.choice.reason.startswith("unmeasured here; 100.0 us against 900.0 us by cudnn on NVIDIA Sibling")
    assert "those of NVIDIA Sibling" in caplog.text
    unclear = [measured(shape, 730.0) for shape in WAYS.values()]
    assert choose(folder, *unclear, of=SIBLING.name) is None


def test_a_configuration_that_cannot_run_is_not_used(folder: Path) -> None:
    config = ConvConfig("conv_chain", (256, 2, 2), 256, 64, 8, 8)
    assert not chains.fits(config, WHOLE, BF16, H200)
    assert choose(folder, measured(WHOLE, 1.0, config=config)).choice.measured_us is None


def test_an_unmeasured_chain_is_warned_about(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_warned", set())
    assert choose(folder, *conv_entries(500.0)).choice.measured_us is None
    assert "resnet-triton tune" in caplog.text


def test_explain_shows_the_measured_time(folder: Path) -> None:
    model = build().bfloat16().eval()
    chain = choose(folder, measured(WHOLE, 100.0))
    rows = explain(model, (256, 3, 224, 224), device=H200.name).rows
    times = [row.measured_us for row in rows if row.config == str(chain.choice.config)]
    assert times.count(100.0) == 2, "layer2.1 and layer2.2"


# What is worth measuring


def test_chains_near_the_fastest_way_are_worth_measuring() -> None:
    """In two of ResNet-50's blocks, by hand."""
    for name in ("layer2.1", "layer3.1"):
        tail = TAILS[name]
        found = dict(chain_gains(tail, BF16, H200))
        alone = {
            part: min(
                cost.predict(s, e, plan.own_config(s, e, BF16, "tf32", H200), BF16, "tf32", H200).us,
                cost.predict_unfused(s, e, BF16, "tf32", H200).us,
            )
            for part, (s, e) in tail.sites().items()
        }
        totals = {}
        for holds, shape in chains.ways(tail):
            us = cost.predict_chain(shape, choose_without(shape).config, BF16, "tf32", H200).us
            totals[shape] = us + sum(alone[part] for part in alone if part not in ("last", *holds))
        best = min(sum(alone.values()), *totals.values())
        assert set(found) == {shape for shape, us in totals.items() if us <= 1.5 * best}
        for shape, gain in found.items():
            assert gain == pytest.approx(sum(alone.values()) - totals[shape])


def test_what_is_measured_does_not_depend_on_what_was(folder: Path) -> None:
    before = chain_gains(TAIL, BF16, H200)
    chain_gains.cache_clear()
    choose(folder, *conv_entries(1.0), measured(WHOLE, 1.0))
    assert chain_gains(TAIL, BF16, H200) == before


def test_the_chains_of_a_model_come_behind_its_convolutions() -> None:
    model = build().bfloat16().eval()
    found = merged(sites_of(model, (256, 3, 224, 224), BF16, H200))
    kinds = [isinstance(site, ChainSite) for site in found]
    assert kinds == sorted(kinds) and 15 < sum(kinds) < 40
    last = [site for site in found if isinstance(site, ChainSite)]
    assert [site.gain for site in last] == sorted((site.gain for site in last), reverse=True)
    by_shape = {site.shape: site for site in last}
    assert len(by_shape) == len(last)
    assert by_shape[WHOLE].layers == ("layer2.1.conv3", "layer2.2.conv3")
    ((_, one),) = [pair for pair in chain_gains(TAIL, BF16, H200) if pair[0] == WHOLE]
    assert by_shape[WHOLE].gain / by_shape[WHOLE].share == pytest.approx(one / by_shape[WHOLE].library_us(H200))
    with use_backend("auto"):
        plan.forget()
        rows = explain(model, (256, 3, 224, 224), device=H200.name).rows
    chosen = {row.op for row in rows if row.realisation in CHAIN_KERNELS}
    assert chosen and chosen <= {f"chain {site.shape}" for site in last}, "what the plan takes can be measured"


def test_no_chains_where_none_can_run() -> None:
    model = build().eval()
    for dtype, target in ((torch.float32, H200), (BF16, target_of("NVIDIA A100-SXM4-80GB"))):
        found = sites_of(model.to(dtype), (2, 3, 64, 64), dtype, target)
        assert found and not any(isinstance(site, ChainSite) for site in found)


def test_a_site_survives_the_way_to_a_worker() -> None:
    site = ChainSite(WHOLE, BF16, ("a",), 0.5, 0.1)
    assert site_of(site.payload()) == ChainSite(WHOLE, BF16)
    assert site_of(site.payload()).key == site.key == f"tune {WHOLE} bfloat16"
    assert key_of(WHOLE, None, torch.float16) != key_of(SHORT, None, torch.float16)


@pytest.mark.parametrize("name", TAILS)
def test_candidates_of_chains_can_run(name: str) -> None:
    for shape in dict(chains.ways(TAILS[name])).values():
        found = chain_candidates(shape, BF16, H200)
        known = chains.configs_of(shape, BF16, H200)
        assert bool(found) == bool(known) and len(set(found)) == len(found) <= LIMIT
        if known:
            assert found[0] == choose_without(shape).config and set(known) <= set(found)
            assert len(found) > len(known) or len(found) == LIMIT, "variations too"
        for config in found:
            assert config.kernel in CHAIN_KERNELS and chains.fits(config, shape, BF16, H200)


def test_half_strips_are_tried() -> None:
    shape = dict(chains.ways(TAILS["layer1.1"]))[frozenset({"conv", "reduce"})]
    rolling = [c.box for c in chain_candidates(shape, BF16, H200) if c.kernel == "chain_rolling"]
    assert any((tn, -(-rows // 2), tw) in rolling for tn, rows, tw in rolling)


def test_the_entry_of_a_chain() -> None:
    config = choose_without(WHOLE).config
    entry = chain_entry_of(WHOLE, BF16, [Trial(config, "ok", Timing(3.0, 9.0))])
    assert entry == ChainEntry(WHOLE, "bfloat16", config, 3.0, 9.0)
    assert entry.versions["torch"] == torch.__version__
    assert chain_entry_of(WHOLE, BF16, [Trial(config, "error")]) is None and chain_entry_of(WHOLE, BF16, []) is None


# How it is measured


def test_a_random_chain_equals_its_reference() -> None:
    """The library side, in fp32 on the CPU: a projection, the next convolution, every second pixel."""
    for first in (False, True):
        shape = chain(first)
        problem = ChainProblem(shape, torch.float32, "cpu")
        problem._prepare_reference()
        y, t_next = problem._wanted
        assert tuple(y.shape) == shape.stored and t_next.shape == (2, 5, 5, 16)
        assert all(found.l2 < 1e-5 for found in problem._library_errors)
        assert all(0.3 < wanted.std() < 3 for wanted in problem._wanted)
        assert (problem.ts is problem.shortcuts) == first


def chain(first: bool) -> ChainShape:
    """A tiny one."""
    return ChainShape(
        ConvShape(2, 5, 5, 16, 16, 3, 3, 1, 1), ConvShape(2, 5, 5, 16, 32), ConvShape(2, 5, 5, 24, 32),
        ConvShape(2, 5, 5, 32, 16), 2, ConvShape(2, 5, 5, 24, 16) if first else None,
    )  # fmt: skip


def test_a_chain_is_timed_beside_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ChainProblem(chain(False), torch.float16, "cpu", sets=2)
    captured: list[int] = []
    monkeypatch.setattr(ChainProblem, "_capture", lambda self, run, launches: captured.append(launches))
    monkeypatch.setattr(measure, "target_of", lambda device: H200)
    replay_ms = {"library": [3.0, 3.0, 9.0], "ours": [0.9, 1.2, 1.8]}
    monkeypatch.setattr(measure, "interleaved", lambda graphs, rounds: {name: replay_ms[name] for name in graphs})
    timing = problem.time(ConvConfig("conv_chain", (1, 8, 8), 16, 16))
    launches = captured[0]
    assert launches % 2 == 0 and captured == [launches] * 2
    assert (timing.us, timing.library_us) == pytest.approx((1200 / launches, 3000 / launches))
    assert timing.conv_us is None


def test_the_journal_tells_sites_apart() -> None:
    keys = [site.key for site in (ChainSite(shape, BF16) for shape in WAYS.values())]
    assert len(set(keys)) == len(keys) and all(key.startswith(sites.PREFIX) for key in keys)
