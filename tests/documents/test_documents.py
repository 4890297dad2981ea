"""The documents name files, commands and words that exist."""

import re
from pathlib import Path

import pytest

from dynamollm.cli import COMMANDS
from simulator.workload.adapters.catalogue import NAMED

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PACKAGES = ("benchmarks", "docs", "dynamollm", "energy", "pools", "proxy", "simulator", "solver", "tests")
NAMED_PATH = re.compile(r"`((?:{})/[\w./-]*)`".format("|".join(PACKAGES)))
LINK = re.compile(r"\]\(([^)#\s]+)")
COMMAND = re.compile(r"^(?:\$ )?dynamollm ([a-z]+)", re.MULTILINE)
TOO_WIDE_WORDS = ("Manager", "Handler", "Helper", "Utils", "Backend")


def test_there_are_documents():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "glossary.md", "paper-map.md"} <= {
        d.name for d in DOCUMENTS
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_named_files_are_there(document):
    named = NAMED_PATH.findall(document.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_commands_exist(document):
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL)
    used = {name for block in blocks for name in COMMAND.findall(block)}
    assert used <= set(COMMANDS)


def test_workloads_named_in_the_benchmarking_guide_exist():
    text = (ROOT / "docs" / "benchmarking.md").read_text()
    named = set(re.findall(r"`((?:synthetic|poisson|azure|servegen)-[a-z0-9-]+)`", text))
    assert named
    assert named <= set(NAMED)


def test_decision_records_are_numbered_without_gaps():
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs" / "adr").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_paper_map_says_of_every_row_how_far_it_is():
    rows = [
        line
        for line in (ROOT / "docs" / "paper-map.md").read_text().splitlines()
        if line.startswith("| ") and "`" in line
    ]
    with_state = [row for row in rows if row.count("|") == 6]
    assert with_state
    for row in with_state:
        assert row.split("|")[4].strip() in {"✔", "◐", "✘"}, row
        tested = "`tests/" in row.split("|")[3]
        assert tested or row.split("|")[4].strip() != "✔", f"said to be done, but no test is named: {row}"


def test_no_class_is_called_by_a_word_that_means_too_much():
    pattern = re.compile(r"^class (\w*(?:{}))\b".format("|".join(TOO_WIDE_WORDS)), re.MULTILINE)
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in PACKAGES
        if package not in ("docs", "tests")
        for path in (ROOT / package).rglob("*.py")
        for name in pattern.findall(path.read_text())
    }
    assert found == set()
