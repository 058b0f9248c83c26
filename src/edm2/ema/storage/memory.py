"""How much memory a process may still use."""

from pathlib import Path

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 4 << 30


def free_memory() -> int:
    """Free memory in bytes, within the limits of a container; 4 GB where the system does not say."""
    known = [room for room in (_of_the_machine(), _of_the_container()) if room is not None]
    return min(known, default=_UNKNOWN)


def _of_the_machine() -> int | None:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError):  # no Linux
        return None


def _of_the_container() -> int | None:
    try:
        limit, used = ((_CONTROL_GROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return None
