"""The options that textgen finetune alone has: data, what learns, how, what comes of it."""

from textgen_cli.cli.flags.opt import Opt, words

DATA = "Data"
LEARNING = "What learns"
TRAINING = "Training"
RESULT = "Result"

FINETUNE: dict[str, Opt] = {
    "finetune.task": Opt(
        DATA,
        "clm, mlm, chat, seq2seq, text-classification, token-classification or question-answering; told by the "
        "data's fields where not given.",
        metavar="TASK",
        complete=words(
            "clm",
            "mlm",
            "chat",
            "seq2seq",
            "text-classification",
            "token-classification",
            "question-answering",
        ),
    ),
    "format": Opt(
        DATA,
        "text, lines, jsonl, csv, tsv, parquet, conll or squad; told by a file's name where not given.",
        metavar="FORMAT",
        complete=words("text", "lines", "jsonl", "csv", "tsv", "parquet", "conll", "squad"),
    ),
    "finetune.text_field": Opt(DATA, "Field with the text, the prompt or the source.", metavar="FIELD"),
    "pair_field": Opt(DATA, "text-classification: field with a second text.", metavar="FIELD"),
    "label_field": Opt(DATA, "Field with the label, the tags or the target.", metavar="FIELD"),
    "source_prefix": Opt(
        DATA, "seq2seq: put this before every source; generate will do so too.", metavar="TEXT"
    ),
    "valid": Opt(DATA, "File with held-out data; repeatable.", metavar="FILE"),
    "valid_share": Opt(DATA, "Share of the data that is held out where no file is given.", metavar="X"),
    "skip_bad": Opt(DATA, "Leave out up to N rows that cannot be used.", metavar="N"),
    "finetune.max_length": Opt(DATA, "Tokens of an example at most.", metavar="N"),
    "finetune.truncate": Opt(DATA, "Cut an example that is longer instead of refusing it."),
    "pack": Opt(DATA, "Several short examples in one row."),
    "whole_words": Opt(DATA, "mlm: hide whole words."),
    "mlm_probability": Opt(DATA, "mlm: share of the tokens that are hidden.", metavar="X"),
    "check": Opt(DATA, "Read every row, tell what there is and what it would take, and stop."),
    "lora": Opt(LEARNING, "Train a LoRA adapter of rank N instead of all weights.", metavar="N"),
    "lora_alpha": Opt(LEARNING, "Strength of the adapter; twice its rank where not given.", metavar="X"),
    "lora_dropout": Opt(LEARNING, "Share of the adapter's inputs that are dropped.", metavar="X"),
    "lora_targets": Opt(LEARNING, "Names of the layers that get one; all linear ones.", metavar="A,B,C"),
    "finetune.quantize": Opt(
        LEARNING,
        "QLoRA: hold the weights beside which the adapter learns in int8 or int4.",
        metavar="FORMAT",
        complete=words("int8", "int4"),
    ),
    "rslora": Opt(LEARNING, "Divide alpha by the root of the rank."),
    "dora": Opt(LEARNING, "Learn directions and lengths of the weights apart."),
    "merge": Opt(LEARNING, "Fold the adapter into the weights, and prove that nothing else changed."),
    "freeze": Opt(LEARNING, "Leave the embeddings and the first N layers as they are.", metavar="N"),
    "from_scratch": Opt(
        LEARNING, "Begin with random weights: a preset's name, or a config.json.", metavar="PRESET|FILE"
    ),
    "tokenizer": Opt(LEARNING, "From scratch: take this model's tokenizer.", metavar="MODEL"),
    "vocab_size": Opt(LEARNING, "From scratch: tokens of the tokenizer that is trained.", metavar="N"),
    "learning_rate": Opt(
        TRAINING, "2e-4 with LoRA, 5e-5 for encoders, 5e-4 from scratch, else 2e-5.", metavar="X"
    ),
    "epochs": Opt(TRAINING, "How often every example is seen.", metavar="X"),
    "max_steps": Opt(TRAINING, "Stop after N steps.", metavar="N"),
    "finetune.max_time": Opt(TRAINING, "Stop after so many seconds.", metavar="SECONDS"),
    "finetune.batch_size": Opt(TRAINING, "Examples of one step, or auto.", metavar="N"),
    "accumulate": Opt(TRAINING, "Add up the gradients of N batches before each step.", metavar="N"),
    "order": Opt(
        TRAINING,
        "Rows of like length in a batch, or random ones; else the first, from scratch the second.",
        metavar="NAME",
        complete=words("length", "random"),
    ),
    "schedule": Opt(
        TRAINING,
        "How the learning rate goes on: linear, cosine or constant.",
        metavar="NAME",
        complete=words("linear", "cosine", "constant"),
    ),
    "warmup": Opt(TRAINING, "Steps in which it rises: a share, or from 1 on a number.", metavar="X"),
    "weight_decay": Opt(TRAINING, "Pull of the weights towards 0.", metavar="X"),
    "max_grad_norm": Opt(TRAINING, "Longest gradient; longer ones are shortened to it.", metavar="X"),
    "recompute": Opt(TRAINING, "Gradient checkpointing: less memory, some values are computed twice."),
    "eval_steps": Opt(TRAINING, "Measure the held-out data every N steps; else once an epoch.", metavar="N"),
    "save_steps": Opt(TRAINING, "Save a checkpoint every N steps; else with each measuring.", metavar="N"),
    "patience": Opt(TRAINING, "Stop after N measurings without a better one.", metavar="N"),
    "keep": Opt(TRAINING, "Checkpoints that stay besides the best.", metavar="N"),
    "finetune.seed": Opt(TRAINING, "Start of everything random.", metavar="N"),
    "report_to": Opt(TRAINING, "A tracker of transformers' Trainer, such as tensorboard.", metavar="NAME"),
    "finetune.output": Opt(
        RESULT, "Folder of the finished model, there whole or not at all.", short="-o", metavar="DIR"
    ),
    "finetune.resume": Opt(RESULT, "Go on from the newest checkpoint."),
    "resume_previous": Opt(RESULT, "Where that is damaged, go on from the one before it."),
    "finetune.restart": Opt(RESULT, "Begin anew in a folder of ours."),
}
