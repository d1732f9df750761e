"""What the bytes of a batch of generate depend on, as JSON values to compare when it is resumed."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from textgen_cli.config import GenerateConfig
from textgen_cli.events import Report
from textgen_cli.model.fingerprint import content, given, of_machine, of_model, of_program, of_weights


def fingerprint(
    config: GenerateConfig, form: str, record: dict[str, Any] | None, source: str | None, report: Report
) -> dict[str, Any]:
    """All that the bytes depend on.

    `form`: the input's format; `record`: the one given as an argument; `source`: the input's sha256, None for a
    pipe. Raises what `of_model` and `given` raise.
    """
    remote = config.endpoint.endpoint is not None
    libraries = ["llguidance"] if any(asdict(config.constraint).values()) else []
    found = of_program()
    found |= _of_endpoint(config) if remote else of_model(config.model, report, libraries)
    found["decoding"] = given(config.decoding, files=("bad_words",), secrets=("watermark",))
    if config.decoding.draft_model is not None and not remote:
        found["decoding"]["draft_model"] = of_weights(config.model, config.decoding.draft_model, report)
    if config.engine == "compiled":
        found["engine"] = config.engine
    found["prompting"] = given(config.prompting, files=("template_file",))
    found["constraint"] = given(config.constraint, files=("json_schema", "grammar"))
    found["guarding"] = _of_safety(config, report)
    found["explaining"] = given(config.explaining)
    found |= {"format": form, "shard": config.batch.shard, "batch_size": config.batch.batch_size}
    return found | {"input": source if record is None else record}


def _of_safety(config: GenerateConfig, report: Report) -> dict[str, Any]:
    """The lists by name, which stands in records, and content; the classifier, and what computes it beside a server."""
    asked = config.guarding
    if not asked.judges:
        return {}
    found: dict[str, Any] = {"on_unsafe": asked.on_unsafe}
    found["safety"] = [[Path(p).name, content(p)] for p in asked.safety]
    if asked.safety_model is not None:
        judge = config.judge()
        found["safety_model"] = [judge.model, of_weights(judge, judge.model, report)]
        found["safety_labels"] = list(asked.label_list())
        found["safety_threshold"] = asked.safety_threshold
        if config.endpoint.endpoint is not None:
            found["machine"] = of_machine(judge)
    return found


def _of_endpoint(config: GenerateConfig) -> dict[str, Any]:
    asked = config.endpoint
    found = {"endpoint": asked.endpoint, "model": config.model.model}
    return found | {"endpoint_server": asked.endpoint_server, "split_sequences": asked.split_sequences}
