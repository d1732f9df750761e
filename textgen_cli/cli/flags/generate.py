"""The options that textgen generate alone has: prompt, words, form, what must not be said, the server."""

from textgen_cli.cli.flags.opt import Opt, words

PROMPT = "Prompt"
LENGTH = "Length and number"
CHOICE = "Choice of words"
FORM = "Form of the text"
SAFE = "What must not be said"
SERVER = "Server"

WORDS: dict[str, Opt] = {
    "chat": Opt(PROMPT, "Treat the prompt as a user's message: apply the model's chat template."),
    "system": Opt(PROMPT, "System message; implies --chat.", short="-s", metavar="TEXT"),
    "task": Opt(PROMPT, "translate, summarize, qa, chat or story.", metavar="TASK"),
    "from_": Opt(
        PROMPT, "translate: the language of the text (English where not given).", metavar="LANGUAGE"
    ),
    "to": Opt(PROMPT, "translate: the language wanted.", metavar="LANGUAGE"),
    "question": Opt(PROMPT, "qa: what is asked about the text.", metavar="TEXT"),
    "template": Opt(PROMPT, "Prompt with named fields, such as 'Name a {kind}: {text}'.", metavar="TEXT"),
    "template_file": Opt(PROMPT, "File with such a template.", metavar="FILE"),
    "top": Opt(PROMPT, "Masked models and qa: show the K best fillings or answers.", metavar="K"),
    "truncate": Opt(PROMPT, "Cut a prompt that is too long at its left or right end.", metavar="SIDE"),
    "show_prompt": Opt(PROMPT, "Print what the model would see, and stop."),
    "no_stdin": Opt(PROMPT, "Leave standard input alone."),
    "max_new_tokens": Opt(LENGTH, "Tokens to generate at most.", short="-n", metavar="N"),
    "min_new_tokens": Opt(LENGTH, "Do not end before this many tokens.", metavar="N"),
    "max_length": Opt(LENGTH, "Tokens of prompt and text together at most.", metavar="N"),
    "stop": Opt(LENGTH, "End the text before this string; repeatable.", metavar="TEXT"),
    "num_return_sequences": Opt(LENGTH, "Texts to generate for the prompt.", metavar="N"),
    "temperature": Opt(CHOICE, "Below 1: more predictable; above 1: more varied.", short="-t", metavar="X"),
    "top_k": Opt(CHOICE, "Draw from the K most probable tokens; 0: from all.", metavar="K"),
    "top_p": Opt(CHOICE, "Draw from the most probable tokens that together reach P.", metavar="P"),
    "min_p": Opt(CHOICE, "Drop tokens less probable than P times the most probable one.", metavar="P"),
    "typical_p": Opt(CHOICE, "Draw from the most typical tokens that together reach P.", metavar="P"),
    "greedy": Opt(CHOICE, "Always take the most probable token instead of drawing."),
    "seed": Opt(CHOICE, "Start of the random draw: a number, or 'random'.", metavar="SEED"),
    "num_beams": Opt(CHOICE, "Follow N texts at once and keep the most probable.", metavar="N"),
    "length_penalty": Opt(CHOICE, "For beams; above 0: favour longer texts.", metavar="X"),
    "repetition_penalty": Opt(CHOICE, "Above 1: repeat less.", metavar="X"),
    "no_repeat_ngram_size": Opt(CHOICE, "Let no run of N tokens occur twice; 0: allow it.", metavar="N"),
    "bias": Opt(CHOICE, "Add X to the score of TEXT's last token; repeatable.", metavar="TEXT=X"),
    "generate.watermark": Opt(
        CHOICE, "Favour tokens that this key chooses; score --watermark finds them.", metavar="KEY"
    ),
    "watermark_bias": Opt(CHOICE, "How much it favours them: added to their scores.", metavar="X"),
    "set": Opt(CHOICE, "Set any other field of GenerationConfig; repeatable.", metavar="KEY=VALUE"),
    "json_schema": Opt(FORM, "JSON that this schema allows: a file, or JSON itself.", metavar="FILE|JSON"),
    "json": Opt(FORM, "Any JSON."),
    "regex": Opt(FORM, "Text that matches this regular expression.", metavar="REGEX"),
    "choices": Opt(FORM, "One of these strings.", metavar="A,B,C"),
    "grammar": Opt(FORM, "Text of this grammar (Lark or GBNF).", metavar="FILE"),
}

SAFETY: dict[str, Opt] = {
    "safety": Opt(
        SAFE,
        "Judge prompts and texts by this list: a word, a phrase or re:PATTERN a line; repeatable.",
        metavar="FILE",
    ),
    "safety_model": Opt(SAFE, "Judge them by this sequence classifier.", metavar="MODEL"),
    "safety_labels": Opt(SAFE, "The labels of it that are unsafe.", metavar="A,B,C"),
    "safety_threshold": Opt(
        SAFE, "The probability of such a label from which a text is unsafe.", metavar="P"
    ),
    "on_unsafe": Opt(
        SAFE,
        "What becomes of an unsafe text: flag, redact, drop or retry.",
        metavar="ACTION",
        complete=words("flag", "redact", "drop", "retry"),
    ),
    "bad_words": Opt(SAFE, "Never generate the words in this file, one a line.", metavar="FILE"),
}

ENDPOINT: dict[str, Opt] = {
    "endpoint": Opt(SERVER, "Address of an OpenAI-compatible server that generates.", metavar="URL"),
    "endpoint_server": Opt(
        SERVER, "vllm, sglang or llamacpp; asked of the server where not given.", metavar="KIND"
    ),
    "concurrency": Opt(SERVER, "Calls under way at one time.", metavar="N"),
    "split_sequences": Opt(SERVER, "One call for each sequence, for servers that ignore n."),
}
