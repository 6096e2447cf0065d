"""README and docs hold: links resolve, commands parse, Python compiles, and what a tiny model can run is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from tiny import tiny_head

import slipstream
from slipstream.cli import COMMANDS, _known, _parser
from slipstream.distill.target import load_target

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "data/README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fences(page: Path, *languages: str) -> list[str]:
    """Code blocks of a page in these languages."""
    found = re.findall(r"^```(\w*).*?\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Shell lines of a page as words, without comments; a trailing backslash joins two lines."""
    text = "\n".join(fences(page, "sh", "bash", "console")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def anchors(page: Path) -> set[str]:
    """Headings as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pages
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("figure", sorted(ROOT.glob("docs/figures/*.svg")), ids=lambda figure: figure.stem)
def test_figures_say_what_they_show_and_are_shown(figure):
    root = ElementTree.parse(figure).getroot()
    words = {node.attrib["id"]: node.text for node in root if node.tag.endswith(("title", "desc"))}
    assert root.attrib["role"] == "img"
    assert all(len(words[name]) > 20 for name in root.attrib["aria-labelledby"].split())
    assert any(f"](figures/{figure.name})" in page.read_text(encoding="utf-8") for page in ROOT.glob("docs/*.md"))


def test_every_page_is_in_the_sites_navigation():
    named = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(named) == sorted(page.name for page in ROOT.glob("docs/*.md"))


@pages
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if Path(words[0]).name == "slipstream":
            _parser().parse_args(words[1:])


@pages
def test_commands_named_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"`(?:\.venv/bin/)?slipstream (\w+[^`]*)`", text):
        name, *options = shlex.split(code)
        assert name in COMMANDS, code
        for option in (word for word in options if word.startswith("--")):
            assert option[2:] in _known(name), code


@pages
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    inline = re.findall(r"`make ([^`]*)`", page.read_text(encoding="utf-8"))
    calls = [words[1:] for words in commands(page) if words[0] == "make"] + [shlex.split(call) for call in inline]
    assert {word for call in calls for word in call if "=" not in word} <= targets


@pages
def test_python_compiles(page):
    for code in fences(page, "python"):
        compile(code, page.name, "exec")


@pages
def test_python_runs_on_a_tiny_model(page, tiny_target_folder, monkeypatch, capsys, tmp_path):
    """In order, in one namespace, whatever the page loads; a model or draft of the reader's own is left out."""
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    head, load = tiny_head(target), slipstream.load
    monkeypatch.setattr(slipstream, "load", lambda *names, **settings: load(target, head, **settings))
    code = fences(page, "python")
    monkeypatch.chdir(tmp_path)  # what they write
    names = {"input_ids": torch.tensor([[5, 6, 7]])}
    for block in code:
        if "path/to/" not in block:
            exec(compile(block, page.name, "exec"), names)
