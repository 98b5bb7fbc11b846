"""What the package promises at its edges: names, import weight, version, layers, the list of commands."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import crispedit
from crispedit.cli import app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "crispedit"

LAYERS = (
    "_version errors settings hardware ranks memory progress artifacts heartbeat distributed store isolated "
    "statistics endpoint workers replies bundled edits shapes offload models ownership sharding texts threshold eigen "
    "moments patch spectrum subspace completion rotation updates priced rule_choice adam pieces fisher factors "
    "pass_state estimation description halves spectra curvature_file curvature merging history cache rows forward "
    "costs speed room recording replay remembered precision training natural generation capability drift_meter triage "
    "budget editors judge grading llm_judge wild teacher_forced live benchmarks untouched harness_tasks harness "
    "harness_job tasks checkpoint adapter proof certificate editing evaluation processes moved assumed workload pace "
    "stages planning methods typical session plot frontier inputs edit_job mend_job evaluate_job plan_job "
    "session_evaluation demo session_plot tradeoff scatter experiments comparison_row comparing paired "
    "report_definitions report_verdict report_curvature report report_markdown report_html console console_evaluation "
    "console_edit console_plan console_session console_second_order options curvature_cli plan_cli edit_cli "
    "compare_cli mend_cli evaluate_cli lenet_cli patch_cli session_cli cli"
).split()
"""Every module imports only from those before it (console and command line show what the others do)."""


def test_every_public_name_exists_and_is_documented():
    for name in crispedit.__all__:
        assert getattr(crispedit, name) is not None
        assert name == "__version__" or getattr(crispedit, name).__doc__
    assert set(crispedit.__all__) == {*crispedit._WHERE, "__version__"}


def test_importing_is_cheap():
    code = "import sys, crispedit.cli; print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch" not in found
    assert "transformers" not in found


def test_version_is_the_newest_in_the_changelog():
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == crispedit.__version__


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_list_only(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("__init__", "__main__"):
        return
    rank = LAYERS.index(parts[0])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == len(parts):
            for name in [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]:
                if name in LAYERS:
                    assert LAYERS.index(name) <= rank, f"{file.name} imports {name}"


def test_the_documented_command_line_is_the_programs():
    """docs/cli.md names every command and every option, and no others."""
    from typer.main import get_command

    documented: dict[str, set[str]] = {}
    for block in re.split(r"^## ", (ROOT / "docs" / "cli.md").read_text(), flags=re.M)[1:]:
        heading, _, body = block.partition("\n")
        if heading.startswith("crispedit "):
            documented[heading.removeprefix("crispedit ")] = set(re.findall(r"^\| `(--[a-z-]+)", body, re.M))

    def options(name, command):
        if hasattr(command, "commands"):  # a group of commands
            return dict(kv for sub, c in command.commands.items() for kv in options(f"{name} {sub}", c).items())
        found = {max(p.opts, key=len) for p in command.params if p.param_type_name == "option" and p.name != "help"}
        return {name.strip(): found}

    assert documented == options("", get_command(app))
