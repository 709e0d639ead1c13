"""Ranks: a thin layer over torch.distributed that also works without it.

Started by torchrun, `start` joins the process group (nccl on GPUs, gloo on CPUs); started by plain
python there is one rank and every function here is the identity.
"""
import os
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common.config import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among its peers: `rank` of `world`, and the device it computes on."""
    rank: int
    world: int
    device: torch.device

    @property
    def main(self):
        """Whether this is the rank that prints and writes."""
        return self.rank == 0


def start(device="auto"):
    """Join the process group that torchrun announces, or be alone. Returns Ranks. Raises UserError on a bad device."""
    rank, world, local = (int(os.environ.get(key, default))
                          for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device} is no device; use auto, cpu, cuda or cuda:N.") from None
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device} was asked for and torch sees no GPU; use --device cpu.")
        target = torch.device("cuda", local if world > 1 else target.index or 0)
        if target.index >= torch.cuda.device_count():
            raise UserError(f"--device {target} does not exist: torch sees {torch.cuda.device_count()} GPUs.")
        torch.cuda.set_device(target)
    if world > 1:
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    return Ranks(rank, world, target)


def finish():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(ranks):
    """Wait until every rank is here."""
    if ranks.world > 1:
        dist.barrier()


def deal(ranks, items):
    """This rank's share of `items`, one in turn to each rank, nothing padded and nothing twice."""
    return items[ranks.rank::ranks.world]


def gather(ranks, item):
    """A list of every rank's `item` (any picklable object), in the order of ranks, on every rank."""
    if ranks.world == 1:
        return [item]
    items = [None] * ranks.world
    dist.all_gather_object(items, item)
    return items


def total(ranks, tensor):
    """The sum of `tensor` over the ranks; no gradient flows through it."""
    if ranks.world > 1:
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
    return tensor


def any_rank(ranks, flag):
    """Whether `flag` is true on any rank: all ranks then take the same branch."""
    return bool(total(ranks, torch.tensor(int(flag), device=ranks.device)))


def resolve_amp(amp, device):
    """--amp auto -> `bf16` where `device` has instructions for it, else `off`; the other values as they are."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return "bf16" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", file.read()) else "off"
    except OSError:  # no Linux: nothing tells, and emulation would be slower than none
        return "off"
