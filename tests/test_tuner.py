"""The search over configurations, its journal, and how candidates are judged and timed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from resnet_triton import cost, measure, tuning
from resnet_triton.backend import dot_precision
from resnet_triton.devices import Target, known_devices
from resnet_triton.journal import INTERRUPTED, Journal
from resnet_triton.kernels.config import ConvConfig, Epilogue, heuristic
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.measure import ConvProblem, Errors
from resnet_triton.shapes import resnet_convs
from resnet_triton.tuner import LIMIT, DeviceLost, Timing, candidates, entry_of, key_of, search

H200, A100 = known_devices()["NVIDIA H200"], known_devices()["NVIDIA A100-SXM4-80GB"]
SHAPE, EPILOGUE, DTYPE = ConvShape(32, 14, 14, 256, 256, 3, 3, 1, 1), Epilogue(bn=True, relu=True), torch.bfloat16
NAME, CONFIGS = key_of(SHAPE, EPILOGUE, DTYPE), candidates(SHAPE, DTYPE, H200)


def fine(config: ConvConfig) -> str | None:
    return None


def planted(best: ConvConfig):
    """A timer for which one configuration is fastest."""

    def timer(config: ConvConfig) -> Timing:
        return Timing(5.0 if config == best else 10.0 + CONFIGS.index(config), 20.0)

    return timer


def tune(**kwargs) -> tuning.Entry | None:
    trials = search(NAME, **{"validate": fine, "candidates": CONFIGS, **kwargs})
    return entry_of(SHAPE, EPILOGUE, DTYPE, trials)


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", [H200, A100], ids=["H200", "A100"])
def test_candidates_can_run(target: Target, dtype: torch.dtype, batch: int) -> None:
    for shape, epilogue in {(s, e) for _, s, e in resnet_convs(50, batch)}:
        found = candidates(shape, dtype, target, epilogue=epilogue)
        assert 4 <= len(found) <= LIMIT
        assert len(set(found)) == len(found)
        assert found[0] == heuristic(shape, dtype.itemsize, target.tma)
        for config in found:
            assert cost.fits(config, shape, dtype.itemsize, epilogue.residual, target)
            assert (config.kernel == "conv_pointer") == (not target.tma)


def test_exact_fp32_is_tuned_without_tma() -> None:
    found = candidates(SHAPE, torch.float32, H200, precision="ieee")
    assert len(found) >= 4 and {config.kernel for config in found} == {"conv_pointer"}
    assert key_of(SHAPE, EPILOGUE, torch.float32, "ieee") != key_of(SHAPE, EPILOGUE, torch.float32)


def test_candidates_follow_the_cost_model() -> None:
    """A large 3x3 is bound by L2 reads, of which tiles of 128x256 make fewest; the heuristic still comes first."""
    shape = ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1)
    first, *rest = candidates(shape, DTYPE, H200)
    assert (first.bm, first.bn) == (128, 128)
    assert {(c.bm, c.bn) for c in rest[:2]} == {(128, 256), (256, 128)}


def test_finds_the_planted_best() -> None:
    for best in CONFIGS:
        entry = tune(timer=planted(best))
        assert entry == tuning.Entry(SHAPE, "bfloat16", False, best, 5.0, 20.0)


def test_second_measurement_of_the_finalists_counts() -> None:
    lucky, steady = CONFIGS[3], CONFIGS[1]
    seen: list[ConvConfig] = []

    def timer(config: ConvConfig) -> Timing:
        seen.append(config)
        us = {lucky: 5.0 if seen.count(lucky) == 1 else 9.0, steady: 6.0}.get(config, 10.0)
        return Timing(us, 20.0)

    entry = tune(timer=timer)
    assert entry is not None and entry.config == steady and entry.us == 6.0


def test_skips_what_raises_or_is_wrong() -> None:
    raises, wrong, best = CONFIGS[0], CONFIGS[1], CONFIGS[2]

    def validate(config: ConvConfig) -> str | None:
        if config == raises:
            raise RuntimeError("out of resource: shared memory")
        return "error 0.5 against 0.001 of the library" if config == wrong else None

    times = {raises: 1.0, wrong: 2.0, best: 3.0}
    trials = search(
        NAME,
        timer=lambda c: Timing(times.get(c, 9.0), 20.0),
        validate=validate,
        candidates=CONFIGS,
    )
    assert trials[0].config == best
    by_config = {t.config: t for t in trials}
    assert len(trials) == len(CONFIGS)
    assert by_config[raises].status == "error" and "shared memory" in by_config[raises].reason
    assert by_config[wrong].status == "wrong" and by_config[wrong].timing is None


def test_drops_what_the_compiler_finds_unfit(tmp_path) -> None:
    """Before it runs, and a resumed search does not ask again."""
    timed: list[ConvConfig] = []
    asked: list[ConvConfig] = []

    def unfit(config: ConvConfig) -> str | None:
        asked.append(config)
        return "spills 64 bytes a thread" if config in CONFIGS[:2] else None

    def timer(config: ConvConfig) -> Timing:
        timed.append(config)
        return planted(CONFIGS[0])(config)

    for _ in range(2):
        trials = search(
            NAME,
            timer=timer,
            validate=fine,
            candidates=CONFIGS,
            unfit=unfit,
            journal=Journal(tmp_path / "journal.jsonl"),
        )
        assert trials[0].config == CONFIGS[2]
        assert [(t.status, t.reason) for t in trials if t.config in CONFIGS[:2]] == [
            ("unfit", "spills 64 bytes a thread")
        ] * 2
    assert not set(CONFIGS[:2]) & set(timed)
    assert asked[: len(CONFIGS)] == CONFIGS and len(asked) == len(CONFIGS) + 2, "and the two finalists once more"


def test_nothing_computes_it() -> None:
    assert tune(timer=planted(CONFIGS[0]), validate=lambda config: "wrong") is None
    assert tune(timer=planted(CONFIGS[0]), candidates=[]) is None


class Killed(BaseException):
    """Stands for the death of the process."""


def test_goes_on_after_a_crash(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    best, killer = CONFIGS[-1], CONFIGS[3]
    timed: list[ConvConfig] = []

    def timer(config: ConvConfig) -> Timing:
        timed.append(config)
        if config == killer:
            raise Killed
        return planted(best)(config)

    with pytest.raises(Killed):
        tune(timer=timer, journal=Journal(path))
    assert timed == CONFIGS[:4]
    timed.clear()
    journal = Journal(path)
    entry = tune(timer=timer, journal=journal)
    assert entry is not None and entry.config == best
    assert timed[: len(CONFIGS) - 4] == CONFIGS[4:], "finished candidates are not measured again"
    crashed = [r for r in journal.finished.values() if r["status"] == "crashed"]
    assert [(r["kernel"], r["config"]) for r in crashed] == [(killer.kernel, str(killer))]
    timed.clear()
    assert tune(timer=timer, journal=Journal(path)) == entry
    assert not timed, "a finished search measures nothing"


def test_lost_device_stops_the_search(tmp_path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    culprit, best = CONFIGS[2], CONFIGS[4]

    def validate(config: ConvConfig) -> str | None:
        if config == culprit:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return None

    with pytest.raises(DeviceLost, match="illegal memory access"):
        tune(timer=planted(best), validate=validate, journal=journal, lost=lambda: True)
    entry = tune(timer=planted(best), validate=validate, journal=journal, lost=lambda: True)
    assert entry is not None and entry.config == best
    assert [r["status"] for r in journal.finished.values()].count("crashed") == 1


def test_entries_are_found_again(tmp_path, monkeypatch) -> None:
    """What the tuner measures is what the planner looks up."""
    entry = tune(timer=planted(CONFIGS[1]))
    assert entry is not None
    tuning.save(tmp_path / tuning.file_name("Some GPU"), "Some GPU", [entry])
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(tmp_path))
    tuning.forget()
    try:
        assert tuning.lookup("Some GPU", SHAPE, DTYPE, residual=False) == entry
        assert tuning.lookup("Some GPU", SHAPE, DTYPE, residual=True) is None
    finally:
        tuning.forget()


def test_journal_survives_torn_lines_and_ignores_other_code(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "new", "a")
    Journal(path, "old").finish("stale", "ok")
    journal.start("one", 5.0, kernel="conv_tma")
    journal.finish("one", "ok", us=1.5)
    journal.start("two")
    journal.finish("two", INTERRUPTED)
    with path.open("a") as file:
        file.write('{"event": "start", "key": "to')  # the machine went down while writing
    other = Journal(path, "new", "b")
    other.start("three")
    assert set(other.finished) == {"one"}
    assert other.finished["one"]["us"] == 1.5 and other.finished["one"]["kernel"] == "conv_tma"
    assert [r["key"] for r in other.open()] == ["three"] and not other.open("a")
    assert json.loads(path.read_text().splitlines()[-1])["key"] == "three"
    journal.reload()
    assert [r["key"] for r in journal.open("b")] == ["three"]


def test_a_killed_process_costs_nobody_at_first(tmp_path) -> None:
    """What was open is done again; what is open for the third time is taken for the culprit."""
    path = tmp_path / "journal.jsonl"
    for _ in range(2):
        journal = Journal(path, "code")
        journal.start("one")  # and then kill -9
        journal = Journal(path, "code")
        journal.resume()
        assert not journal.open() and not journal.finished
    journal.start("one")
    journal = Journal(path, "code")
    journal.resume()
    assert journal.finished["one"]["status"] == "crashed"


def test_the_precision_of_fp32_is_set_and_restored() -> None:
    before = dot_precision(torch.float32)
    for precision in ("ieee", "tf32"):
        with measure.fp32_precision(precision):
            assert dot_precision(torch.float32) == precision
    assert dot_precision(torch.float32) == before


def test_errors_are_judged_beside_the_library() -> None:
    library = Errors(1e-3, 4e-3)
    assert Errors(1.9e-3, 4e-3).exceeds(library) is None
    assert "error 0.003" in (Errors(3e-3, 4e-3).exceeds(library) or "")
    assert Errors(2.5e-3, 4e-3).exceeds(library, 3.0) is None
    assert "largest" in (Errors(1e-3, 0.5).exceeds(library) or "")
    assert Errors(math.nan, 0.0).exceeds(library)
    assert Errors(0.0, math.nan).exceeds(library)
    assert Errors(0.0, 0.0).exceeds(Errors(0.0, 0.0)) is None


def test_errors_see_what_was_not_written() -> None:
    wanted = torch.randn(64, 8, dtype=torch.float64)
    out = wanted.float()
    assert measure.errors(out, wanted).l2 < 1e-6
    out[-1, -1] = math.nan
    assert measure.errors(out, wanted).exceeds(Errors(1.0, 1.0))
    with pytest.raises(ValueError, match="shape"):
        measure.errors(out[1:], wanted)


def test_times_are_per_launch_and_cover_whole_rotations(monkeypatch) -> None:
    problem = ConvProblem(SHAPE, EPILOGUE, DTYPE, "cpu", sets=3)
    captured: list[int] = []
    monkeypatch.setattr(ConvProblem, "_capture", lambda self, run, launches: captured.append(launches))
    monkeypatch.setattr(measure, "target_of", lambda device: H200)
    replay_ms = {"library": [3.0, 3.0, 9.0], "conv": [1.0, 1.0, 1.0], "ours": [0.9, 1.2, 1.8]}
    monkeypatch.setattr(measure, "interleaved", lambda graphs, rounds: {name: replay_ms[name] for name in graphs})
    timing = problem.time(CONFIGS[0])
    launches = captured[0]
    assert launches % 3 == 0 and set(captured) == {launches}
    assert timing.us == pytest.approx(1200 / launches)
    assert (timing.library_us, timing.conv_us) == pytest.approx((3000 / launches, 1000 / launches))
    assert timing.spread == pytest.approx(0.9 / 1.2)
    problem.time(CONFIGS[1])
    assert len(captured) == 4, "PyTorch's side is captured once"


def test_random_problem_equals_its_reference() -> None:
    """The library side, in fp32 on the CPU: every epilogue that a ResNet has."""
    for epilogue in (EPILOGUE, Epilogue(bn=True, residual=True, relu=True), Epilogue(bias=True)):
        problem = ConvProblem(ConvShape(2, 8, 8, 16, 24, 3, 3, 2, 1), epilogue, torch.float32, "cpu")
        problem._prepare_reference()
        assert problem._library_errors[0].l2 < 1e-5
