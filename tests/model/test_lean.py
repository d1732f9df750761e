"""Loading without torch's compiler: it is not imported, and whoever asks for it afterwards gets the real one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import transformers
from parts import gguf_files

pytestmark = pytest.mark.slow

AFTERWARDS = """
import sys, torch
from textgen_cli.config import ModelConfig
from textgen_cli.events import silent
from textgen_cli.model import lean

lean.allowed = True
configs = [ModelConfig(model=name, device="cpu", dtype="float32") for name in sys.argv[1:]]
models = [lean.load(config, "score", silent) for config in configs]
model = models[0]
unwanted = {"torch._dynamo", "torch.distributed.tensor", "sympy", "torch.fx.experimental.symbolic_shapes"}
assert not unwanted & sys.modules.keys()
assert not hasattr(torch, "_dynamo") or torch._dynamo.__spec__ is not None

def held(net):
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}

from textgen_cli.model.load import load
for config, lightly in zip(configs, models):
    torch.testing.assert_close(held(lightly.net), held(load(config, "score", silent).net), rtol=0, atol=0)

# A mask that is made under vmap enters a context manager of the compiler's.
from transformers.masking_utils import sdpa_mask
seen = lambda batch, head, query, key: key <= torch.zeros(1, dtype=torch.long)[query * 0] + query
mask = sdpa_mask(1, 4, 4, mask_function=seen, use_vmap=True, allow_is_causal_skip=False)
assert torch.equal(mask[0, 0], torch.ones(4, 4).tril().bool()), mask

# Symbols come when they are asked for: an export with a size of its own has them.
class Twice(torch.nn.Module):
    def forward(self, x):
        return x * 2

free = torch.export.export(Twice(), (torch.ones(3),), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=99)},))
assert free.module()(torch.ones(7)).shape == (7,)

ids = torch.arange(6)[None]
plain = model.net(ids).logits
compiled = torch.compile(lambda ids: model.net(ids).logits, backend="eager")(ids)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
torch.testing.assert_close(compiled, plain)
"""


def test_the_compiler_comes_only_when_asked_for(small_model: Callable[..., Path]) -> None:
    names = ("llama", "gpt2", "t5", "bert", "bart-classifier")
    argv = [sys.executable, "-c", AFTERWARDS, *(str(small_model(name)) for name in names)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_program_does_without_it(small_model: Callable[..., Path]) -> None:
    argv = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "textgen_cli",
        "generate",
        "once",
        "-n",
        "3",
        "--seed",
        "1",
    ]
    argv += ["-m", str(small_model("llama"))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "transformers.core_model_loading" in imported
    assert not imported & {"torch._dynamo", "torch.distributed.tensor", "scipy", "sympy"}


def test_a_first_run_converts(tmp_path: Path) -> None:
    """Saving what is converted asks whether the compiler made the network."""
    file = tmp_path / "model.gguf"
    gguf_files.write_llama(file, gguf_files.tiny_llama())
    argv = [sys.executable, "-m", "textgen_cli", "generate", "once", "-n", "3", "-m", str(file)]
    argv += ["--device", "cpu", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_adapter_is_loaded_with_all_that_peft_asks_for(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = small_model("llama")
    settings = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    net = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(net, settings).save_pretrained(str(tmp_path / "adapter"))
    argv = [sys.executable, "-m", "textgen_cli", "generate", "once", "-n", "3", "-m", str(base)]
    argv += ["--device", "cpu", "--adapter", str(tmp_path / "adapter")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
