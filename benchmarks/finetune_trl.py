"""Whether `textgen finetune --task chat` learns what trl's SFTTrainer learns from the same conversations.

Two sides begin with the default model in float32 and go the same steps over the same rows in the same order. They must
count the same tokens, in the rows and among the answers, and have the same loss at every step: all weights learn, so a
token more, or a weight that differs, shows from the second step on. trl stands in an environment of its own, with the
versions of the libraries that are here. The figure is seconds a learnt token behind the first step.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import examples, peers
from benchmarks.bases import TEXTGEN, Parts
from benchmarks.runner import Ratio, Run, Side, in_turn

TRL = "trl==1.16.0"
SHARED = ("torch", "transformers", "accelerate", "tokenizers", "datasets")
ROWS, BATCH, LENGTH, RATE = 32, 4, 256, "5e-5"
LETTERS = 500  # of a conversation, so that none is too long
NEAR = 1e-3  # by so much losses differ at most: float32 whose sums go in another order, steps long

# The template of the default model with trl's marks around what an assistant says and the token that ends it.
MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CODE = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch, transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
folder, train, form, length, rows, rate, marked, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
found = [json.loads(line) for line in open(train)]
if form == "messages":
    data = [{"messages": row["messages"]} for row in found]
    for row in data:
        plain, own = (tokenizer.apply_chat_template(row["messages"], tokenize=False, **more)
                      for more in ({}, {"chat_template": marked}))
        assert plain == own
    tokenizer.chat_template = marked
else:
    data = [{"prompt": tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], tokenize=False,
                                                     add_generation_prompt=True),
             "completion": row["completion"]} for row in found]
settings = SFTConfig(
    output_dir=out, per_device_train_batch_size=int(rows), num_train_epochs=1, learning_rate=float(rate),
    lr_scheduler_type="linear", warmup_steps=0.03, seed=0, data_seed=0, logging_steps=1, save_strategy="no",
    report_to="none", use_cpu=True, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
    max_length=int(length), packing=False, assistant_only_loss=form == "messages", loss_type="nll",
)
class Clock(TrainerCallback):
    ends = []
    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())
transformers.set_seed(0)
net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
trainer = SFTTrainer(net, settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
                     callbacks=[Clock()])
whole = trainer.data_collator([trainer.train_dataset[at] for at in range(len(data))])
learnt = whole["labels"] != -100
trainer.train()
print(json.dumps({
    "seconds": Clock.ends[-1] - Clock.ends[0],
    "learnt": int(learnt.sum()),
    "seen": int(whole["attention_mask"].sum()),
    "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
}))
"""


def rows(parts: Parts, quick: bool) -> list[Ratio]:
    """Conversations, of which answers alone are learnt, and prompts with completions.

    Raises RuntimeError where the sides count other tokens or have other losses.
    """
    return [_row(parts, form, 1 if quick else 3) for form in ("messages", "completions")]


def _row(parts: Parts, form: str, rounds: int) -> Ratio:
    train = _data(parts, form)
    ours, theirs = in_turn([_ours(parts, train), _trl(parts, train, form)], rounds)
    for one, other in zip(ours, theirs, strict=True):
        here, there = json.loads(one.output), json.loads(other.output)
        apart = max(abs(a - b) for a, b in zip(here["losses"], there["losses"], strict=True))
        # Of a completion trl leaves the line's end behind it away, which we see and do not learn.
        ends = ROWS if form == "completions" else 0
        if (here["learnt"], here["seen"]) != (there["learnt"], there["seen"] + ends) or not apart <= NEAR:
            raise RuntimeError(f"{form}: the sides disagree: {here} and {there}")
        said = f"{here['learnt']:,} of {here['seen']:,} tokens learnt on both sides in {len(here['losses'])} steps"
        print(
            f"{form}: {said}; loss {here['losses'][0]:.4f} to {here['losses'][-1]:.4f}, {apart:.1g} apart at most"
        )
    return Ratio(f"chat by {form}: textgen / trl's SFTTrainer", ours, theirs, math.inf)


def _data(parts: Parts, form: str) -> Path:
    folder = parts.scratch / f"trl-{form}"
    folder.mkdir()
    found = examples.talks(folder).train
    talks = [json.loads(line)["messages"][:4] for line in found.read_text("utf-8").splitlines()]
    short = [talk for talk in talks if sum(len(message["content"]) for message in talk) < LETTERS][:ROWS]
    assert len(short) == ROWS
    told: list[dict[str, Any]] = [{"messages": talk} for talk in short]
    if form == "completions":
        told = [{"prompt": talk[0]["content"], "completion": talk[1]["content"]} for talk in short]
    found.write_text("".join(json.dumps(row) + "\n" for row in told), "utf-8")
    return found


def _ours(parts: Parts, train: Path) -> Callable[[], Run]:
    out = train.with_name("ours")
    shape = f"--task chat --max-length {LENGTH} --batch-size {BATCH} --epochs 1 --learning-rate {RATE} --order random"
    argv = [*TEXTGEN, "finetune", str(train), *parts.base("default"), *shape.split(), "--valid-share", "0",
            "--dtype", "float32", "-o", str(out)]  # fmt: skip

    def run() -> Run:
        done = Side("textgen", argv)()
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(out)
        steps = [step for step in steps if "loss" in step]
        seconds = sum(
            (after["tokens"] - before["tokens"]) / after["tokens_per_second"]
            for before, after in pairwise(steps)
        )
        learnt, seen = _counted(parts, train)
        said = {"learnt": learnt, "seen": seen, "losses": [step["loss"] for step in steps]}
        assert steps[-1]["tokens"] == seen
        return replace(done, seconds=seconds / learnt, output=json.dumps(said))

    return run


def _counted(parts: Parts, train: Path) -> tuple[int, int]:
    """Tokens that are learnt, and all, in the rows that ours trains on."""
    from textgen_cli.finetune.encode import ENCODERS, Setting
    from textgen_cli.model.load import load_tokenizer

    setting = Setting(load_tokenizer(parts.model("default"), "default"), LENGTH, truncate=False)
    told = [
        row
        for line in train.read_text("utf-8").splitlines()
        for row in ENCODERS["chat"](_talk(line), setting)
    ]
    learnt = sum(label != -100 for row in told for label in row["labels"])
    return learnt, sum(len(row["input_ids"]) for row in told)


def _talk(line: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line)
    if "messages" in row:
        return row
    roles = {"user": row["prompt"], "assistant": row["completion"]}
    return {"messages": [{"role": role, "content": said} for role, said in roles.items()]}


def _trl(parts: Parts, train: Path, form: str) -> Callable[[], Run]:
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in SHARED]
    python, folder, out = peers.environment(TRL, *pinned), parts.model("default"), train.with_name("trl")
    argv = [
        python,
        "-c",
        CODE,
        str(folder),
        str(train),
        form,
        str(LENGTH),
        str(BATCH),
        RATE,
        MARKED,
        str(out),
    ]

    def run() -> Run:
        done = Side("trl", argv)()
        said = json.loads(done.output.strip().splitlines()[-1])
        return replace(done, seconds=said["seconds"] / said["learnt"], output=json.dumps(said))

    return run
