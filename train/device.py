"""What depends on the device. Code for CUDA is in this file alone, so that tests on a CPU run all of the others."""

import logging
import os
import resource
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from shards.common.errors import UsageError
from shards.common.machine import available_cores, give_back_freed_memory, keep_all_freed_memory

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Decision:
    """What `auto` chose, and why. It stands in the log and in the run folder."""

    value: str
    reason: str


# ------------------------------------------------------------------ which device


def choose(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name: `auto` (CUDA if there is a GPU), `cpu`, `cuda` or `cuda:N`.

    local_rank: number of this process on its machine; it picks the GPU. Raises UsageError for a device that is unknown
    or not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name != "auto" and name != "cuda" and not (name.startswith("cuda:") and name[5:].isdecimal()):
        raise UsageError(f"--device '{name}' is unknown: use auto, cpu, cuda or cuda:N")
    found = gpu_count()
    number = int(name[5:]) if name.startswith("cuda:") else local_rank
    if number >= found:
        raise UsageError(f"--device {name}: GPU {number} was asked for and PyTorch sees {found}; use --device cpu")
    return torch.device("cuda", number)


def gpu_count() -> int:
    """The GPUs that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_uuid(device: torch.device) -> str | None:
    """The driver's name of a GPU, `GPU-…` or `MIG-…`; None for a CPU. NVML and CUDA may number GPUs differently."""
    if device.type == "cpu":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def prepare(device: torch.device, *, keep_memory: bool = False, processes: int = 1) -> None:
    """Set up the process for a device: TF32, cuDNN's choice of kernels for static shapes, the current GPU.

    On a CPU it hides a warning of torch.compile about CUDA. keep_memory: for training on a CPU: memory that a step
    frees is kept for the next one, until `give_back`. processes: those that share the device. On a GPU, PyTorch
    then allocates no more than this process's share of the memory.
    """
    if keep_memory and device.type == "cpu":
        keep_all_freed_memory()
    if device.type == "cpu":
        logging.getLogger("torch.utils.cpp_extension").addFilter(_helps_the_user)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if processes > 1:
            torch.cuda.set_per_process_memory_fraction(1 / processes, device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def _helps_the_user(record: logging.LogRecord) -> bool:
    """False for the warning of torch.compile on a machine with nvcc and no GPU: nothing is wrong there."""
    return not record.getMessage().startswith("No CUDA runtime is found")


def give_back(device: torch.device) -> None:
    """On a CPU, give memory that was kept for training steps back to the system."""
    if device.type == "cpu":
        give_back_freed_memory()


def describe(device: torch.device) -> str:
    """The device's name as people know it. psutil does not know a CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, Any]:
    """The device and its software, for environment.json."""
    found: dict[str, Any] = {"device": str(device), "device_name": describe(device), "cuda": torch.version.cuda}
    if device.type == "cuda":
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def process_group_backend(device: torch.device) -> str:
    """Gloo for tensors on the CPU (flags, predictions) and, on a GPU, NCCL for the gradients."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def sync_batch_norm(model: nn.Module) -> None:
    """Replace every batch norm in `model` by PyTorch's own over all processes, which needs a GPU for each."""
    from timm.layers.norm_act import convert_sync_batchnorm  # also converts timm's layers with an activation inside

    convert_sync_batchnorm(model)


def use_threads(wanted: int | None, earlier: Decision | None = None) -> Decision:
    """Set the number of PyTorch's CPU threads; return it with the reason. It decides the last bits on a CPU.

    wanted: `--threads`. earlier: what an earlier start of the run used, which stays if nothing is wanted. The default
    is PyTorch's own number, which `OMP_NUM_THREADS` sets, but not more than the cores that this process may use. More
    than these are taken where they are asked for, and the reason says so.
    """
    own, cores = torch.get_num_threads(), available_cores()
    shared = f"; this process may use {cores} cores, and threads that share one are many times as slow"
    if wanted is not None:
        changed = earlier is not None and earlier.value != str(wanted)
        before = f"; {earlier.value} until now, so the last bits of the weights change" if earlier and changed else ""
        found = Decision(str(wanted), f"asked for{before}{shared if wanted > cores else ''}")
    elif earlier is not None:
        found = earlier
    elif own > cores and "OMP_NUM_THREADS" not in os.environ:
        found = Decision(str(cores), "the cores that this process may use")
    else:
        found = Decision(str(own), f"PyTorch's own choice{shared if own > cores else ''}")
    if int(found.value) != own:
        torch.set_num_threads(int(found.value))
    return found


# ------------------------------------------------------------------ precision


def precision(device: torch.device, wanted: str) -> Decision:
    """The number format of the matrix products: `fp32`, `bf16` or `fp16`.

    Raises UsageError if the device cannot compute in the wanted one.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        where = f"GPU of compute capability {capability[0]}.{capability[1]}"
        if wanted == "bf16" and capability < (8, 0):
            raise UsageError(f"--precision bf16: a {where} has no bfloat16 units (8.0 is needed); use fp16 or fp32")
        if wanted != "auto":
            return Decision(wanted, "asked for")
        best = "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
        return Decision(best, f"the best that a {where} does in hardware")
    if wanted == "fp16":
        raise UsageError("--precision fp16: needs a GPU; use fp32, or bf16 if the CPU has it")
    if wanted != "auto":
        return Decision(wanted, "asked for")
    found = torch.cpu.get_capabilities()
    if found.get("avx512_bf16") or found.get("amx_bf16") or found.get("amx_tile"):
        # resnet18 1.7 times as fast at 128 px, vit_b16 1.4 times at 64 px, on one core of an AMD EPYC (Zen 4)
        return Decision("bf16", "this CPU multiplies bfloat16 in hardware")
    return Decision("fp32", "this CPU has no bfloat16 instructions")


def autocast(device: torch.device, name: str) -> AbstractContextManager[Any]:
    """The context in which the forward pass and the loss run.

    Without the cache of cast weights: a CUDA graph must not use what was cast before it, and no weight is used twice.
    """
    return torch.autocast(device.type, dtype=_DTYPES.get(name), enabled=name in _DTYPES, cache_enabled=False)


def scaler(device: torch.device, name: str) -> torch.amp.GradScaler:
    """The loss scaler that fp16 needs; in any other precision it changes nothing."""
    return torch.amp.GradScaler(device.type, enabled=name == "fp16")


def compile_mode(device: torch.device, processes: int, graphed: bool = False) -> str | None:
    """The mode of `torch.compile`: `reduce-overhead` on a GPU, where CUDA graphs launch a whole step at once.

    With batches of 64, an H100 runs ResNet-18's kernels faster than Python launches them: on one cached batch it
    trained 12,149 img/s with graphs and 4,077 without (`benchmarks/results/gpu`). None, PyTorch's default mode, on a
    CPU, for several processes, where graphs have not been tried, and where the code becomes a part of a larger graph
    (graphed).
    """
    return "reduce-overhead" if device.type == "cuda" and processes == 1 and not graphed else None


def steps_to_compile(device: torch.device) -> int:
    """Steps until the compiled code is complete.

    A CUDA graph is run in the first step, recorded in the second and replayed in the third. What fails or takes long in
    them belongs before training.
    """
    return 3 if device.type == "cuda" else 1


# ------------------------------------------------------------------ CUDA graphs


class Recorder:
    """Records work on a GPU as CUDA graphs. They share memory, because only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], _T]) -> Callable[[], _T]:
        """What does on each call what `run` does, launched as one graph on a GPU, and `run` itself on a CPU.

        run: has no host sync, and takes numbers that change from tensors. It is called three times first, on the stream
        that records, because kernels are chosen and compiled and state is allocated in the first calls. What it reads
        must live as long as the graph. Its results are overwritten by the next graph of this recorder: copy them.
        Raises RuntimeError if the work cannot be recorded.
        """
        if self._device.type != "cuda":
            return run
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate memory meanwhile
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(current), recording:  # a recording that fails does not go back to this stream itself
            results = run()

        def replay() -> _T:
            graph.replay()
            return results

        return replay


def rate_type(device: torch.device) -> torch.dtype:
    """The type in which the fused optimizers take the learning rate as a tensor, as exactly as they can."""
    return torch.float32 if device.type == "cuda" else torch.float64


# ------------------------------------------------------------------ optimizer


def optimizer(groups: Iterable[dict[str, Any]], name: str, lr: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, AdamW, or Muon. The fused kernels need no host sync for the loss scaler.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes the update of each weight matrix
    orthogonal. It is timm's, which flattens filters as airbench does (https://github.com/KellerJordan/cifar10-airbench),
    scales updates to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one rate serves all, and gives
    biases, normalisation and whatever else is with them in `groups` to NAdamW. On one CPU core, ResNet-18's step of 64
    images of 64 px took 2.6 times as long with it as with SGD.
    """
    if name == "sgd-nesterov":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)
    if name == "muon":
        from timm.optim.muon import Muon

        groups = [one | {"use_muon": all(weight.ndim > 1 for weight in one["params"])} for one in groups]
        return Muon(groups, lr=lr, momentum=0.95, nesterov=True)
    raise ValueError(f"optimizer '{name}' is unknown")


# ------------------------------------------------------------------ time, memory, random state


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


BUSY_PERIOD_S = 1.0
"""The longest time that a value of `busy` is about."""


def busy(device: torch.device) -> float | None:
    """Share of the last moments in which some kernel ran on a GPU, of any process, 0 to 1. None on a CPU, and if the
    driver does not tell (parts of a GPU, for example).

    The driver counts it for `nvidia-smi`, over 1/6 to 1 s. It is asked only for it, which takes less than a
    millisecond. CUDA events at the ends of steps would count the gaps between the kernels of a step as work: half of an
    eager ResNet's step on an H100. A profiler adds up kernels, but it slows down the launches that it watches.
    `benchmarks/gpu_check.py` has its sum beside this number.
    """
    if device.type != "cuda":
        return None
    import pynvml

    try:
        return torch.cuda.utilization(device) / 100
    except (pynvml.NVMLError, RuntimeError):
        return None


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak_memory`: allocated on the GPU, or this process's resident memory on a CPU.

    psutil knows no peak on Linux.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Torch's generators as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
