"""Processes that train one network together: which of them speaks and writes, and what they agree on.

torchrun and `accelerate launch` start them and give each its number. Of a process alone everything here is free.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import accelerate
import torch
import torch.distributed as dist

from textgen_cli.errors import UsageError
from textgen_cli.finetune import division, zero
from textgen_cli.finetune.division import Division, Zero

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # of those that wait while one works; who dies ends the others


@dataclass(frozen=True)
class Group:
    """This process among those that train together."""

    number: int = 0
    size: int = 1
    division: Division | Zero | None = None  # of the weights; None: each process has all of them
    channel: Any = None  # of their own words: on the CPU, whatever the gradients go through

    @property
    def leads(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.number == 0

    @property
    def alone(self) -> bool:
        """Whether a step may be left in its midst: nobody waits, and the weights change behind it alone."""
        return self.size == 1 and self.division is None

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            dist.barrier(group=self.channel)

    def largest(self, value: int) -> int:
        """The largest of what all of them say here."""
        if self.size == 1:
            return value
        said = torch.tensor([value])
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self.channel)
        return int(said)

    def first(self, value: T) -> T:
        """What the first one says here."""
        if self.size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.channel)
        return said[0]


ALONE = Group()


@contextmanager
def joined(cpu: bool) -> Iterator[Group]:
    """Meet the processes that were started with this one. `cpu`: gradients are exchanged there."""
    parts = division.taken()
    if cpu:
        # Where DeepSpeed is installed, the libraries import it: it is to look for no GPU, and not to tell of it.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not isinstance(parts, Zero):
        yield ALONE
        return
    if isinstance(parts, Zero) and "RANK" not in os.environ:
        fact, hint = "is set, and no launcher has started this process", "torchrun, or accelerate launch"
        raise UsageError("E-CONFLICT", division.DEEPSPEED, fact, hint=hint)
    if isinstance(parts, Zero):  # one process too: what it does not need at once may lie elsewhere
        zero.begin(parts.settings)
    # It takes the device of this process and opens the connection as the Trainer will find it.
    state = accelerate.PartialState(cpu=cpu)
    channel = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield Group(state.process_index, state.num_processes, parts, channel)
    dist.destroy_process_group()
