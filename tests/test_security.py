"""Nothing that this project reads can run code, and nothing is downloaded unless asked.

The sources are scanned for calls that would run code out of data, so a new one has to be argued for here.
"""

from __future__ import annotations

import ast
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import resnet_triton
from resnet_triton.models.names import builders
from resnet_triton.sources import load_model

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("resnet_triton", "kernels", "bench", "tools", "examples")
SOURCES = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "kernels/kernels" not in str(path)
)

#: Calls that run code or commands out of data, by the end of their dotted name.
FORBIDDEN = {
    "eval": "evaluates text",
    "exec": "runs text",
    "pickle.load": "runs what a pickle names",
    "pickle.loads": "runs what a pickle names",
    "pickle.Unpickler": "runs what a pickle names",
    "marshal.loads": "loads byte code",
    "shelve.open": "reads pickles",
    "joblib.load": "reads pickles",
    "dill.load": "reads pickles",
    "cloudpickle.load": "reads pickles",
    "pandas.read_pickle": "reads pickles",
    "yaml.load": "builds any object; yaml.safe_load does not",
    "yaml.unsafe_load": "builds any object",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
    "torch.jit.load": "runs what the archive holds",
    "torch.hub.load": "downloads and runs code",
    "torch.package.PackageImporter": "runs what the package holds",
    "tempfile.mktemp": "leaves its name to others",
}
#: What else inherits from such a reader, and why it may: tests/test_cifar_files.py shows that it does what is said.
ARGUED_FOR = {
    "resnet_triton/runs/cifar.py": ["_Unpickler inherits from pickle.Unpickler"],  # names stand for its own classes
}
#: Arguments that make a call safe, and arguments that make one unsafe.
NEEDED = {"torch.load": ("weights_only", True)}
UNSAFE_ARGUMENTS = {
    "shell": True,
    "allow_pickle": True,
    "weights_only": False,
    "trust_remote_code": True,
    "use_safetensors": False,
    "check_hash": False,
}
#: Modules that open connections. torchvision fetches its own weights, when they are asked for by name.
NETWORK = {"urllib.request", "requests", "httpx", "aiohttp", "http.client", "ftplib", "huggingface_hub", "telnetlib"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Dotted names of what is called, with ``import ... as`` undone."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node.func).partition(".")
            yield aliases.get(first, first) + dot + rest, node


def unsafe(text: str) -> list[str]:
    """What in a source runs code out of data or opens connections, as ``line: call: why``."""
    tree, found = ast.parse(text), []
    for name, call in calls(tree):
        given = {keyword.arg: getattr(keyword.value, "value", ...) for keyword in call.keywords}
        if name in FORBIDDEN:
            found.append(f"{call.lineno}: {name}: {FORBIDDEN[name]}")
        if name in NEEDED and given.get(NEEDED[name][0]) is not NEEDED[name][1]:
            found.append(f"{call.lineno}: {name} without {'='.join(map(str, NEEDED[name]))}")
        found += [
            f"{call.lineno}: {name} with {key}={value}"
            for key, value in given.items()
            if key in UNSAFE_ARGUMENTS and value is UNSAFE_ARGUMENTS[key]
        ]
    for node in ast.walk(tree):
        bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
        found += [f"{node.lineno}: {node.name} inherits from {base}" for base in bases if base.endswith("Unpickler")]
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"{node.lineno}: imports {name}, which opens connections" for name in names if name in NETWORK]
    return found


def test_no_source_runs_code_out_of_data() -> None:
    found = {str(path.relative_to(ROOT)): unsafe(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert len(found) > 50 and "resnet_triton/weights.py" in found
    problems = {path: [line.partition(": ")[2] for line in lines] for path, lines in found.items() if lines}
    assert problems == ARGUED_FOR, found


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "import pickle\npickle.load(f)",
        "import pickle\nclass Reader(pickle.Unpickler):\n    pass",
        "import pickle as p\np.loads(b)",
        "from pickle import loads as read\nread(b)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "from torch import load\nload(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "import yaml\nyaml.load(f)",
        "import torch\ntorch.hub.load('a', 'b')",
        "from urllib import request",
        "import urllib.request",
        "def f():\n    import requests",
        "from huggingface_hub import hf_hub_download",
        "model.from_pretrained('a', trust_remote_code=True)",
    ],
)
def test_the_scan_finds(text: str) -> None:
    assert unsafe(text)


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "import torch\ntorch.load(f, map_location='cpu', weights_only=True)",
        "import numpy as np\nnp.load(f)",
        "import json\njson.loads(text)",
        "import subprocess\nsubprocess.run(['ls'])",
        "import urllib.parse",
    ],
)
def test_the_scan_lets_pass(text: str) -> None:
    assert unsafe(text) == []


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.mark.usefixtures("no_network")
def test_connections_are_seen() -> None:
    with pytest.raises(AssertionError, match="a connection was opened"):
        socket.create_connection(("127.0.0.1", 9))
    with socket.socket() as s, pytest.raises(AssertionError, match="a connection was opened"):
        s.connect(("127.0.0.1", 9))


@pytest.mark.usefixtures("no_network")
def test_no_builder_opens_a_connection() -> None:
    for name, build in builders().items():
        with torch.device("cpu" if name.startswith("mnist5k") else "meta"):  # that one has its weights on disk
            assert isinstance(build(), torch.nn.Module)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "spec", ["resnet18", "torchvision:resnet18", "timm:resnet18", "torchvision:fcn_resnet50", "timm:resnet18.a1_in1k"]
)
def test_no_model_by_name_opens_a_connection(spec: str) -> None:
    for package in ("torchvision", "timm"):
        if spec.startswith(package):
            pytest.importorskip(package)
    with torch.device("meta"):
        model = load_model(spec)
        resnet_triton.explain(resnet_triton.convert(model), (1, 3, 64, 64))
