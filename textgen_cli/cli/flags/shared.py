"""The options that several commands have: explanations, many records, the model, the run."""

from textgen_cli.cli.flags.opt import Opt, catalogue, words

WHY = "Why it says that"
BATCH = "Many records"
MODEL = "Model"
RUN = "Run"

EXPLANATIONS_AND_BATCHES: dict[str, Opt] = {
    "explain": Opt(
        WHY,
        "attention, gradient, integrated-gradients, occlusion, logit-lens or contrast.",
        metavar="METHOD",
        complete=words(
            "attention", "gradient", "integrated-gradients", "occlusion", "logit-lens", "contrast"
        ),
    ),
    "contrast": Opt(
        WHY,
        "Why the answer rather than this text or label; the runner-up with --explain contrast.",
        metavar="TEXT",
    ),
    "explain_unit": Opt(
        WHY, "Give weights to each token or each word.", metavar="UNIT", complete=words("token", "word")
    ),
    "explain_target": Opt(
        WHY,
        "Explain the whole answer, or each of its tokens besides.",
        metavar="TARGET",
        complete=words("whole", "each"),
    ),
    "attention": Opt(
        WHY,
        "Which attention: mean, rollout, all, LAYER or LAYER.HEAD (from 0).",
        metavar="WHICH",
        complete=words("mean", "rollout", "all"),
    ),
    "generate.html": Opt(WHY, "Write the explanation as a page.", metavar="FILE"),
    "input": Opt(BATCH, "Read records from this file; - is standard input.", short="-i", metavar="FILE"),
    "output": Opt(BATCH, "Write JSONL to this file, whole or not at all.", short="-o", metavar="FILE"),
    "jsonl": Opt(BATCH, "JSONL out, and in where no other form is named; one object a record."),
    "lines": Opt(BATCH, "One prompt or text a line."),
    "csv": Opt(BATCH, "CSV in, with a header row."),
    "resume": Opt(BATCH, "Go on with the unfinished output file."),
    "restart": Opt(BATCH, "Start the output file anew."),
    "strict": Opt(BATCH, "Stop at the first record that cannot be read."),
    "unique_ids": Opt(BATCH, "Refuse an input file in which an id comes twice."),
    "max_failures": Opt(BATCH, "Stop when more than N records, or P% of them, have failed.", metavar="N|P%"),
    "max_time": Opt(BATCH, "Stop after so many seconds, ready to resume.", metavar="SECONDS"),
    "shard": Opt(BATCH, "Take every N-th record from the I-th on.", metavar="I/N"),
    "batch_size": Opt(
        BATCH, "Sequences computed together at most, or auto; 1: each result at once.", metavar="N"
    ),
}

MODELS: dict[str, Opt] = {
    "model": Opt(
        MODEL,
        "A catalogue name, org/name@revision on the Hugging Face Hub (ms:… on ModelScope), ./folder, or file.gguf.",
        short="-m",
        metavar="MODEL",
        complete=catalogue,
    ),
    "draft_model": Opt(MODEL, "A smaller model that guesses tokens.", metavar="MODEL", complete=catalogue),
    "prompt_lookup": Opt(MODEL, "Guess N tokens at once from the prompt.", metavar="N"),
    "device": Opt(
        MODEL,
        "auto, cpu, cuda, cuda:N or mps.",
        metavar="DEVICE",
        complete=words("auto", "cpu", "cuda", "mps"),
    ),
    "dtype": Opt(MODEL, "auto, float32, bfloat16 or float16.", metavar="DTYPE"),
    "threads": Opt(MODEL, "CPU threads; all cores where not given.", metavar="N"),
    "adapter": Opt(
        MODEL,
        "LoRA adapter, ./folder or org/name, to add with a weight or with 1; may be repeated.",
        metavar="ADAPTER[=WEIGHT]",
    ),
    "quantize": Opt(
        MODEL,
        "Keep the weights in int8 or int4: less memory; faster on a CPU, in bfloat16.",
        metavar="FORMAT",
        complete=words("int8", "int4"),
    ),
    "offline": Opt(MODEL, "Open no network connection."),
    "mirror": Opt(MODEL, "Address of a mirror of the Hugging Face Hub.", metavar="URL"),
    "locked": Opt(
        MODEL, "Take the model that this file of download --lock pins, to the byte.", metavar="FILE"
    ),
    "cache_dir": Opt(MODEL, "Folder for fetched and converted models.", metavar="FOLDER"),
}

RUNS: dict[str, Opt] = {
    "download.json": Opt(RUN, "One JSON object a line, for scripts.", typed=True),
    "logprobs": Opt(RUN, "Report the N most probable alternatives of each token.", metavar="N"),
    "engine": Opt(
        RUN,
        "auto, eager or compiled; auto: compiled for a single prompt where there is such a model.",
        metavar="ENGINE",
        complete=words("auto", "eager", "compiled"),
    ),
    "verbose": Opt(RUN, "Tell on standard error what is chosen and done.", short="-v"),
}
