"""The READMEs: their pictures come from the records, and their links lead somewhere."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import figures
import pytest
from tiny import ROOT

READMES = sorted(file.relative_to(ROOT).as_posix() for file in (
    ROOT / "README.md", *ROOT.glob("minismoe/**/README.md"), *ROOT.glob("tests/**/README.md")))


@pytest.mark.parametrize("name", figures.PICTURES)
def test_pictures_show_what_the_records_hold(name) -> None:
    """A changed record or drawing needs `python tests/benchmarks/figures.py`."""
    committed = (figures.RESULTS / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == figures.PICTURES[name]()
    tags = {element.tag.split("}")[1] for element in ET.fromstring(committed).iter()}
    assert tags <= {"svg", "title", "defs", "marker", "path", "rect", "circle", "text"}


@pytest.mark.parametrize("name", READMES)
def test_links_lead_to_files_and_headings(name) -> None:
    here, wrong = ROOT / name, []
    for link in re.findall(r"\]\(([^)\s]+)\)", here.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = here.parent / path if path else here
        if not target.exists() or heading and heading not in headings(target):
            wrong.append(link)
    assert not wrong


def headings(file: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown file."""
    found = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}
