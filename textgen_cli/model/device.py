"""Where a model runs: CUDA, MPS or CPU, in which dtype, on how many threads; each choice with its reason.

The only module that asks torch which devices are present. It knows nothing of models.
"""

import platform
from dataclasses import dataclass
from typing import Literal

import torch

from textgen_cli.config import Dtype, ModelConfig
from textgen_cli.errors import UsageError

Purpose = Literal["generate", "score", "explain", "finetune"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """A device, a dtype and why they were chosen."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def place(config: ModelConfig, purpose: Purpose) -> Placement:
    """Choose device and dtype; UsageError when a device that was asked for is absent."""
    device, why_device = _device(config.device)
    dtype, why_dtype = _dtype(config.dtype, device.type, purpose)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return Placement(device, dtype, f"{why_device}; {why_dtype}")


def _device(asked: str) -> tuple[torch.device, str]:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
        why = {"cuda": "a CUDA device is present", "mps": "no CUDA device, MPS is present"}
        return torch.device(name), why.get(name, "no CUDA or MPS device is present")
    kind = asked.partition(":")[0]
    if not {"cpu": True, "cuda": cuda, "mps": mps}[kind]:
        raise UsageError(
            "E-DEVICE", f"--device {asked}", f"no {kind.upper()} device is present", hint="use --device auto"
        )
    device = torch.device(asked)
    number: int | None = device.index
    if number is not None and number >= torch.cuda.device_count():
        raise UsageError(
            "E-DEVICE", f"--device {asked}", f"{torch.cuda.device_count()} CUDA devices are present"
        )
    return device, "asked for"


def _dtype(asked: Dtype, device: str, purpose: Purpose) -> tuple[torch.dtype, str]:
    if asked != "auto":
        return DTYPES[asked], "dtype asked for"
    if purpose == "explain":
        return torch.float32, "exact gradients"
    return _DTYPE_RULES[device](purpose)


def _cuda_dtype(purpose: Purpose) -> tuple[torch.dtype, str]:
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU computes in bfloat16"
    if purpose == "generate":
        return torch.float16, "this GPU has no bfloat16"
    return torch.float32, "this GPU has no bfloat16, float16 is too narrow for scores"


def _mps_dtype(purpose: Purpose) -> tuple[torch.dtype, str]:
    if purpose == "generate":
        return torch.float16, "half precision on MPS"
    return torch.float32, "exact scores"


def _cpu_dtype(purpose: Purpose) -> tuple[torch.dtype, str]:
    if purpose != "generate":
        return torch.float32, "exact scores"
    if cpu_has_bfloat16():
        return torch.bfloat16, "this CPU computes in bfloat16"
    return torch.float32, "this CPU has no bfloat16 arithmetic"


_DTYPE_RULES = {"cuda": _cuda_dtype, "mps": _mps_dtype, "cpu": _cpu_dtype}


def cpu_has_bfloat16() -> bool:
    """True where the CPU multiplies bfloat16 in hardware; emulation is slower than float32."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return bool(torch.cpu.get_capabilities().get("arm_bf16", False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16", False) or found.get("amx_bf16", False))


def rounds_products(config: ModelConfig, chosen: Placement, purpose: Purpose) -> bool:
    """Whether products of float32 with codes may be rounded to bfloat16: nobody asked for float32, it was chosen for
    a CPU whose kernels (AVX2 or more) multiply codes in bfloat16 several times as fast."""
    float32 = config.dtype == "auto" and purpose == "generate" and chosen.dtype == torch.float32
    kernels = chosen.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return float32 and kernels


def out_of_memory(error: BaseException) -> bool:
    """True when torch failed because memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("can't allocate memory", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def free_memory(device: torch.device) -> int | None:
    """Bytes of the device's own memory that are free; None where it shares that of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Give cached device memory back, so that a smaller attempt finds room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The state of torch's random numbers, of the CPU and of each CUDA device in use."""
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cards


def restore_random(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Go on with the random numbers from where `random_state` was."""
    cpu, cards = state
    torch.set_rng_state(cpu)
    if cards:
        torch.cuda.set_rng_state_all(cards)
