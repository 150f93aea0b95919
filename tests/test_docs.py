"""What the documentation says about the code can be found there: messages, links, commands, variables."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from resnet_triton import cli
from resnet_triton.info import ENVIRONMENT
from resnet_triton.models import names

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench/README.md", ROOT / "kernels/README.md")
)


def strings() -> str:
    """Every piece of text in the package, implicit concatenations joined and what f-strings fill in left out."""
    found = []
    for path in (ROOT / "resnet_triton").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
    return "\n".join(found)


def test_every_message_of_the_troubleshooting_page_exists() -> None:
    source = strings()
    rows = [line for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("| ")]
    cells = [line.split("|")[1].strip() for line in rows]
    messages = [m for cell in cells if cell.startswith("`") for m in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 15
    assert [m for m in messages if m not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [t for t in targets if "://" not in t and not t.startswith("mailto:")]
    assert [t for t in local if not (page.parent / t).exists()] == []


def test_commands_in_the_documentation_parse() -> None:
    """Every `resnet-triton ...` line is one that the command accepts."""
    for page in PAGES:
        for line in re.findall(r"(?m)^(?:    |\$ )?resnet-triton (.+)$", page.read_text()):
            words = re.findall(r"'[^']*'|\S+", line.partition("#")[0])
            arguments = [w.strip("'") for w in words]
            if arguments[0] in cli.COMMANDS:
                cli.parser().parse_args(arguments)


def test_examples_of_the_commands_parse() -> None:
    import importlib

    for name in cli.COMMANDS:
        example = importlib.import_module(f"resnet_triton.cli.{name}").EXAMPLE
        words = [w.strip("'") for w in re.findall(r"'[^']*'|\S+", example)]
        assert words[0] == "resnet-triton"
        assert cli.parser().parse_args(words[1:]).command == name


def test_the_readme_lists_the_environment_variables() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in ENVIRONMENT if f"`{name}" not in text] == []
    read = set()
    for folder in ("resnet_triton", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            read |= set(re.findall(r"environ(?:\.get\(|\[)\s*[\"'](RESNET_TRITON_\w+)", path.read_text()))
    assert [name for name in sorted(read) if f"`{name}" not in text] == []


def test_promises_are_kept_by_tests_that_exist() -> None:
    section = (ROOT / "README.md").read_text().split("## Promises")[1].split("\n## ")[0]
    paths = re.findall(r"`((?:tests|resnet_triton)/[\w/.]+)`", section)
    assert len(paths) > 5
    assert [p for p in paths if not (ROOT / p).exists()] == []


def test_networks_of_the_papers_page_can_be_built() -> None:
    """Every name in the page's tables is one that ``--model`` takes, with arguments that it has."""
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    page = (ROOT / "docs/paper.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    found = re.findall(r"`((?:cifar_|preact_|plain\d|resnet\d|torchvision:|timm:)[^`]*)`", rows)
    assert len(found) > 30 and "preact_cifar_resnet1001" in found
    for text in found:
        name, _, arguments = text.partition(" --model-kwargs ")
        library, _, model = name.rpartition(":")
        if library:
            known = torchvision.models.list_models() if library == "torchvision" else timm.list_models()
            assert model in known, text
        else:
            assert names.is_known(name), text
            for argument in arguments.split():
                key, value = names.keyword(argument)
                assert (key, value) in {("shortcut", "A"), ("shortcut", "C"), ("stride_in_1x1", True)}, text
