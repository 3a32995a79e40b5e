"""How much memory a device has left."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: str) -> int:
    """What can be allocated on `device`: `cpu`, `cuda` or `cuda:N`.

    On CUDA, what the driver has free and what PyTorch's allocator holds unused. On the CPU, what Linux calls
    available, within the limit of the container.
    """
    if device == "cpu":
        return min(_available(_MEMINFO), _container_room(_CGROUP))
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _available(meminfo: Path) -> int:
    """MemAvailable of /proc/meminfo, in bytes."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo}: no MemAvailable; Linux 3.14 or newer is needed")


def _container_room(cgroup: Path) -> int:
    """Bytes up to the limit of the control group (version 2), file cache that can be dropped counted as free."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except FileNotFoundError:
        return 1 << 62
    if limit == "max":
        return 1 << 62
    return max(int(limit) - used + int(stat.get("inactive_file", 0)), 0)
