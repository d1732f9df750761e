"""The options that textgen download alone has: getting models, knowing and keeping them, copies of them."""

from textgen_cli.cli.flags.opt import Opt, words

GETTING = "Getting"
KNOWING = "Knowing before it comes"
KEEPING = "Keeping"
COPIES = "Copies in another form"

DOWNLOAD: dict[str, Opt] = {
    "include": Opt(
        GETTING,
        "Fetch the files that match this pattern alone; with --info or --for, the GGUF file it is about; repeatable.",
        metavar="PATTERN",
        typed=True,
    ),
    "exclude": Opt(
        GETTING, "Leave out the files that match this pattern; repeatable.", metavar="PATTERN", typed=True
    ),
    "all_files": Opt(GETTING, "Fetch every file that runs no code, not only what loading needs.", typed=True),
    "download.to": Opt(
        GETTING, "Put the model into this folder, whole or not at all.", metavar="DIR", typed=True
    ),
    "lock": Opt(
        GETTING,
        "Write to this file which model it is, to the byte; see --locked.",
        metavar="FILE",
        typed=True,
    ),
    "dry_run": Opt(GETTING, "Tell what would be fetched, removed or cleaned, and do nothing.", typed=True),
    "info": Opt(
        KNOWING,
        "Tell what MODEL is made of and what it takes; of its weights the headers are read.",
        typed=True,
    ),
    "for_": Opt(
        KNOWING,
        "Tell what MODEL takes to generate, score or finetune here: memory, work, time, and does it fit.",
        metavar="JOB",
        complete=words("generate", "score", "finetune"),
        typed=True,
    ),
    "method": Opt(
        KNOWING,
        "With --for finetune: full, lora or qlora.",
        metavar="METHOD",
        complete=words("full", "lora", "qlora"),
        typed=True,
    ),
    "batch": Opt(KNOWING, "With --for: rows computed together.", metavar="N", typed=True),
    "length": Opt(KNOWING, "With --for: tokens of a row.", metavar="N", typed=True),
    "download.recompute": Opt(KNOWING, "With --for finetune: gradient checkpointing.", typed=True),
    "catalog": Opt(
        KNOWING,
        "Show models worth knowing, and which fit into the free memory here; MODEL is a use then: base, instruct, "
        "masked, seq2seq, translation, classification, tagging or answers.",
        typed=True,
    ),
    "list": Opt(KEEPING, "List the models that are here.", typed=True),
    "verify": Opt(
        KEEPING, "Read the files of MODEL, or of all models, again and compare their hashes.", typed=True
    ),
    "remove": Opt(KEEPING, "Take MODEL out of the cache.", typed=True),
    "clean": Opt(KEEPING, "Take away what interrupted runs and older versions left.", typed=True),
    "download.quantize": Opt(
        COPIES,
        "Make a copy of MODEL in --to with weights in int8 or int4.",
        metavar="FORMAT",
        complete=words("int8", "int4"),
        typed=True,
    ),
    "convert": Opt(
        COPIES, "Make a copy of MODEL in --to as safetensors in --dtype, adapters merged.", typed=True
    ),
    "compile": Opt(
        COPIES, "Make native code of MODEL for this machine, which generate then takes.", typed=True
    ),
}
