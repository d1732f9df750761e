"""The options that textgen score alone has: what is asked, by which convention, what is told."""

from textgen_cli.cli.flags.opt import Opt, catalogue, words

ASKED = "What is asked"
CONVENTION = "Convention"
TOLD = "What is told"

SCORE: dict[str, Opt] = {
    "text_field": Opt(ASKED, "Field of a record that is scored.", metavar="FIELD"),
    "context": Opt(
        ASKED,
        "What stands before the text and is not scored: a record's FIELD, or TEXT; an encoder-decoder's source.",
        metavar="FIELD|TEXT",
    ),
    "score.template": Opt(ASKED, "The context, with a record's named {fields}.", metavar="TEXT"),
    "score.template_file": Opt(ASKED, "File with such a template.", metavar="FILE"),
    "score.choices": Opt(ASKED, "Field with a list of continuations to choose from.", metavar="FIELD"),
    "labels": Opt(ASKED, "Choose from these for every record.", metavar="A,B,C"),
    "pairs": Opt(
        ASKED, "Each record is two texts (CrowS-Pairs, StereoSet, BLiMP, two columns): the likelier one."
    ),
    "second": Opt(
        ASKED,
        "The second texts of the pairs, where each line of -i is a first one (WinoBias).",
        metavar="FILE",
    ),
    "delimiter": Opt(
        ASKED, "Between context and text; nothing where not given, before a choice one space.", metavar="TEXT"
    ),
    "gold": Opt(ASKED, "Field with the right answer: how often it is met is summed up.", metavar="FIELD"),
    "against": Opt(
        ASKED,
        "A second model: bits per byte more or less, and the KL divergence.",
        metavar="MODEL",
        complete=catalogue,
    ),
    "watermark": Opt(
        ASKED, "Whether the text bears the watermark of this key; loads no weights.", metavar="KEY"
    ),
    "score.truncate": Opt(
        ASKED, "left: cut a context that is too long; classifiers: left or right.", metavar="SIDE"
    ),
    "normalization": Opt(
        CONVENTION,
        "What the pick among choices goes by: raw, token, byte or pmi.",
        metavar="RULE",
        complete=words("raw", "token", "byte", "pmi"),
    ),
    "bits": Opt(CONVENTION, "Bits instead of nats."),
    "bos": Opt(
        CONVENTION,
        "A token before the text, in every window: auto, always, never; first: in the first window alone.",
        metavar="WHEN",
        complete=words("auto", "always", "never", "first"),
    ),
    "window": Opt(CONVENTION, "Tokens the model sees at once; its context where not given.", metavar="N"),
    "stride": Opt(
        CONVENTION,
        "Tokens scored in each window behind the first; half a window where not given.",
        metavar="N",
    ),
    "pll": Opt(
        CONVENTION,
        "Masked models: hide a token with the rest of its word (within_word_l2r, the default), or alone (original).",
        metavar="KIND",
        complete=words("original", "within_word_l2r"),
    ),
    "tokens": Opt(TOLD, "Tell of every token: place, log-probability, rank, entropy."),
    "score.top": Opt(TOLD, "With --tokens: the K most likely alternatives of each.", metavar="K"),
    "words": Opt(TOLD, "Sum up by words; in Chinese and Japanese by characters."),
    "summary": Opt(TOLD, "Print the figures of the whole input alone."),
    "html": Opt(
        TOLD, "Write the text, coloured by surprisal or by what explains it, as a page.", metavar="FILE"
    ),
}
