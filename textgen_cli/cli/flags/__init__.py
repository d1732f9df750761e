"""Every option once, in the order of --help. `score.choices`: the option `choices` as the command score has it."""

from textgen_cli.cli.flags import download, finetune, generate, score, shared
from textgen_cli.cli.flags.opt import Opt

OPTIONS: dict[str, Opt] = {
    **generate.WORDS,
    **score.SCORE,
    **generate.SAFETY,
    **shared.EXPLANATIONS_AND_BATCHES,
    **finetune.FINETUNE,
    **download.DOWNLOAD,
    **shared.MODELS,
    **generate.ENDPOINT,
    **shared.RUNS,
}
