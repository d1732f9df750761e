"""Settings of `--explain`, which generate and score share: by which method, of what, and for which parts of a text."""

import re
from dataclasses import dataclass
from typing import Literal

from textgen_cli.config.shared import ModelConfig, option_name
from textgen_cli.errors import UsageError

Method = Literal["attention", "gradient", "integrated-gradients", "occlusion", "logit-lens", "contrast"]

DIFFERENTIATE = ("gradient", "integrated-gradients", "contrast")  # go backwards through the network
COMPARE = (*DIFFERENTIATE, "occlusion")  # can tell why A rather than B


@dataclass(frozen=True)
class ExplainConfig:
    """Why a model said that."""

    explain: Method | None = None
    explain_unit: Literal["token", "word"] = "token"  # what one weight is given to
    explain_target: Literal["whole", "each"] = "whole"  # the answer together, or each of its tokens besides
    contrast: str | None = None  # rather than this: a label or another continuation
    attention: str = "mean"  # which of the weights: mean, rollout, all, LAYER or LAYER.HEAD, both from 0

    def __post_init__(self) -> None:
        default = {"explain_unit": "token", "explain_target": "whole", "contrast": None, "attention": "mean"}
        given = [name for name, value in default.items() if getattr(self, name) != value]
        if given and self.explain is None:
            raise UsageError("E-CONFLICT", option_name(given[0]), "needs --explain")
        if "attention" in given and self.explain != "attention":
            raise UsageError("E-CONFLICT", "--attention", "needs --explain attention")
        if self.contrast is not None and self.explain not in COMPARE:
            raise UsageError("E-CONFLICT", "--contrast", f"cannot be used with --explain {self.explain}")
        if self.contrast is not None and self.explain_target == "each":
            fact = "cannot be used with --contrast, whose tokens are others"
            raise UsageError("E-CONFLICT", "--explain-target each", fact)
        if self.explain == "logit-lens" and self.explain_unit == "word":
            fact = "cannot be used with --explain logit-lens"
            raise UsageError("E-CONFLICT", "--explain-unit word", fact)
        if not re.fullmatch(r"mean|rollout|all|\d{1,4}(\.\d{1,4})?", self.attention):
            fact = f"must be mean, rollout, all, LAYER or LAYER.HEAD, not {self.attention!r}"
            raise UsageError("E-RANGE", "--attention", fact)

    @property
    def contrasts(self) -> bool:
        """Whether what is explained is a difference."""
        return self.explain == "contrast" or self.contrast is not None


def check_gradients(config: ExplainConfig, model: ModelConfig) -> None:
    """UsageError where the weights that were asked for have no gradient."""
    if config.explain in DIFFERENTIATE and model.quantize and model.dtype == "bfloat16":
        fact = f"in bfloat16 has no gradient, which --explain {config.explain} needs"
        raise UsageError("E-CONFLICT", "--quantize", fact, hint="--dtype float32, or --explain occlusion")
