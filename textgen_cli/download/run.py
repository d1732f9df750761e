"""The flow of `textgen download`: find the model, bring it into the cache, check it. Imports no torch."""

from pathlib import Path

from textgen_cli.config import DownloadConfig
from textgen_cli.events import Report
from textgen_cli.model.check import check_folder
from textgen_cli.model.source import locate


def run(config: DownloadConfig, report: Report) -> Path:
    """The folder of the model, whole and checked; plain `from_pretrained` of transformers loads it.

    Raises UsageError, NetworkError, ModelError, SafetyError and OutputError.
    """
    checked = check_folder(locate(config.model, report).folder)
    for notice in checked.notices:
        report(notice)
    return checked.folder
