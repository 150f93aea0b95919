"""The contestant JAX: what it translates, what it declines in words, and what a machine without it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_triton import cli, compare, errors, jax_provider, providers
from resnet_triton.compare import Group
from resnet_triton.providers import DTYPES, Provider, Unavailable
from resnet_triton.results import OK
from resnet_triton.timing import Sample
from tests.comparers import identical
from tests.networks import basics, bottlenecks, images, randomise


class Calling(nn.Module):
    """A model of one function."""

    def __init__(self, function: Callable[..., Any], *children: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(children)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


def checked(model: nn.Module, x: Tensor, dtype: str = "float32") -> list[Tensor]:
    """JAX's outputs, after they passed the gate of the comparison."""
    pytest.importorskip("jax")
    model = model.float().eval()
    exact = errors.reference_outputs(model, x.float())
    with torch.no_grad():
        outputs = jax_provider.build(model, x.float(), DTYPES[dtype])()
        eager = errors.tensors_of(copy.deepcopy(model).to(DTYPES[dtype])(x.to(DTYPES[dtype])))
    assert len(outputs) == len(exact)
    for out, theirs, reference in zip(outputs, eager, exact, strict=True):
        assert out.dtype == DTYPES[dtype]
        found = (errors.relative_error(each, reference) for each in (out, theirs))
        assert errors.gate(*found, dtype, False) == OK
    return outputs


def test_torchvision_s_networks():
    checked(basics((1, 1, 1, 1)), images(h=40, w=33))
    dilated = {"replace_stride_with_dilation": (False, False, True)}
    checked(bottlenecks((1, 1, 1, 1), groups=4, width_per_group=16, **dilated), images())


def test_timm_s_networks():
    resnet = pytest.importorskip("timm.models.resnet")
    options = {"num_classes": 5, "stem_type": "deep", "avg_down": True, "stem_width": 8}
    model = resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), block_args={"attn_layer": "se"}, **options)
    checked(randomise(model), images(h=33, w=39))


def test_low_precision():
    checked(basics((1, 1, 1, 1)), images(1), "bfloat16")


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d((3, 2), dilation=2, ceil_mode=True),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 2, (1, 0), divisor_override=5),
    ],
    ids=str,
)
def test_pools(pool):
    x = torch.randn(2, 3, 9, 12)
    (out,) = checked(pool, x)
    assert out.shape == pool(x).shape
    if isinstance(pool, nn.MaxPool2d):
        identical(out, pool(x))


def test_bn_that_cannot_be_folded_is_a_scale_and_a_shift():
    def twice(x: Tensor, first: nn.Module, conv: nn.Module, norm: nn.Module) -> Tensor:
        y = conv(first(x))
        return norm(y).sigmoid() * y

    norms = nn.BatchNorm2d(3), nn.BatchNorm2d(4, affine=False)
    for norm in norms:
        norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    model = Calling(twice, norms[0], nn.Conv2d(3, 4, (3, 1), padding=(1, 0)), norms[1])
    checked(model, torch.randn(2, 3, 6, 5))


def test_outputs_are_those_of_the_model_in_its_order_and_shape():
    def several(x: Tensor, conv: nn.Module, linear: nn.Module) -> dict[str, Any]:
        y = conv(x)
        return {"map": y, "rest": [y.mean((2, 3)), y.flatten(1)], "rows": linear(y), "columns": y.mean(2)}

    model = Calling(several, nn.Conv2d(1, 4, 3, stride=2), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    outputs = checked(model, torch.randn(2, 1, 9, 7))
    assert [tuple(out.shape) for out in outputs] == [(2, 4, 4, 3), (2, 4), (2, 48), (2, 4, 4, 2), (2, 4, 3)]
    for name, value in model.state_dict().items():
        identical(value, before[name])


@pytest.mark.parametrize(
    ("function", "children", "words"),
    [
        (lambda x: x.softmax(1), (), "does not know aten.softmax.int"),
        (lambda x: x.exp().sin().cos().tan(), (), "aten.cos.default, aten.exp.default, aten.sin.default and 1 more"),
        (lambda x, conv: nn.functional.conv2d(x, conv.weight * 2), (nn.Conv2d(3, 4, 1),), "aten.mul.Tensor of a param"),
        (lambda x: nn.functional.conv2d(x, x), (), "aten.conv2d.default with computed parameters"),
        (lambda x: x if x.sum() > 0 else -x, (), "torch.export: "),
    ],
    ids=["operator", "operators", "parameter", "filter", "control flow"],
)
def test_what_is_not_known_is_named_without_jax_too(function, children, words):
    with torch.no_grad(), pytest.raises(Unavailable, match=words):
        jax_provider.build(Calling(function, *children).eval(), torch.randn(2, 3, 4, 4), torch.float32)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x + x.mean((0, 3)), "operands of 2 and 4 dimensions"),
        (lambda x: nn.functional.adaptive_avg_pool2d(x, (2, 1)), r"to \(2, 1\), only to \(1, 1\)"),
    ],
)
def test_shapes_that_are_not_known_are_named(function, words):
    pytest.importorskip("jax")
    with torch.no_grad(), pytest.raises(Unavailable, match=words):
        jax_provider.build(Calling(function), torch.randn(2, 4, 4, 4), torch.float32)()


def test_memory_that_runs_out_in_jax_is_told_like_pytorch_s():
    jnp = pytest.importorskip("jax").numpy
    with pytest.raises(torch.OutOfMemoryError, match="JAX: "), jax_provider._memory_errors():
        jnp.zeros(1 << 46).block_until_ready()
    with pytest.raises(RuntimeError, match="planted"), jax_provider._memory_errors():
        raise RuntimeError("planted")


def test_jax_competes_in_the_bench(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jax")
    layers = "nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()"
    source = f"from torch import nn\ndef build():\n    return nn.Sequential({layers})\n"
    (tmp_path / "model_for_jax.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    small = ["--model", "model_for_jax:build", "--size", "8", "--batch", "1", "--device", "cpu", "--minutes", "0.00001"]
    code = cli.main(["bench", *small, "--providers", "jax", "ours"])
    out = capsys.readouterr().out
    assert code in (0, 1) and "WRONG" not in out
    (line,) = (line for line in out.splitlines() if line.startswith("batch 1, float32: "))
    assert "JAX" in line
    assert jax_provider.why_not("cpu") is None
    if not torch.cuda.is_available():
        assert "JAX sees no GPU" in jax_provider.why_not("cuda")


def test_without_jax_it_is_not_listed_and_asking_for_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    for device in ("cpu", "cuda"):
        assert providers.JAX not in providers.providers_on(device)
        assert providers.absent_on(device) == [providers.JAX]
    code = cli.main(["bench", "--model", "resnet18", "--device", "cpu", "--providers", "jax", "ours"])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and "pip install jax" in err
    cli.main(["bench", "--model", "resnet18", "--device", "cpu", "--providers", "nobody"])
    assert "is not known on cpu" in capsys.readouterr().err


def test_a_jax_that_does_not_start_is_a_reason(monkeypatch):
    def broken(device: str) -> None:
        raise ImportError("libcudart.so.13: not found\nmore")

    monkeypatch.setattr(jax_provider, "_device", broken)
    assert providers.JAX.needs("cpu") == "JAX does not start: libcudart.so.13: not found"


def test_a_provider_that_cannot_run_a_model_costs_its_row_only(monkeypatch):
    def build(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
        raise Unavailable("it does not know aten.sort.default")

    foreign = Provider("foreign", lambda model, x, dtype: providers.eager(model, x, dtype), package="torch")
    ours = Provider("ours", providers.eager, ours=True)
    monkeypatch.setattr(providers, "PROVIDERS", [providers.EAGER, Provider("other", build), foreign, ours])
    monkeypatch.setattr(compare, "clock_for", lambda device: lambda call: Sample(1.0, host=0.5))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    rows = compare.measure(Group("cpu", "tiny", 2, 8, ("float32",), 0.0), model, torch.randn(4, 3, 8, 8)).values()
    assert [row.status for row in rows] == [OK, "not available: it does not know aten.sort.default", OK, OK]
    assert [row.host_time for row in rows] == [500, None, None, 500], "a call that waits has no host time of its own"
