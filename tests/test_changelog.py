"""The newest section of the changelog is the version of the package."""

import re
from pathlib import Path

import textgen_cli

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def test_newest_version_is_the_package_version() -> None:
    sections = re.findall(
        r"^## \[(\d[^\]]*)\] - (unreleased|\d{4}-\d{2}-\d{2})$", CHANGELOG.read_text(), re.MULTILINE
    )
    assert sections[0][0] == textgen_cli.__version__
