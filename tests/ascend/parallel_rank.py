"""One of several ranks that share the sequence of a model on the stand-in, over gloo; prints a line of JSON per case.

python parallel_rank.py RANK WORLD STORE
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import stand_in

stand_in.start()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from parallel_cases import build, check, inputs, on_ranks  # noqa: E402
from stand_in import collectives, kernels  # noqa: E402

LENGTHS = (44,)


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    kernels.install()
    collectives.install()
    dist.init_process_group("cpu:gloo,npu:gloo", f"file://{store}", timedelta(seconds=60), world_size=world, rank=rank)
    for model, degrees in on_ranks(world):
        before = collectives.calls.copy()
        found = check(model, degrees, "npugraph_ex", {"force_eager": True}, LENGTHS)
        ran = collectives.calls - before
        with torch.no_grad():
            expected = [build(model)(*inputs(model, length)) for length in LENGTHS]
        pairs = zip(found, expected, strict=True)
        errors = [((a.float() - b.float()).abs().max() / b.abs().max()).item() for a, b in pairs]
        average = (found[0].float() - expected[0].float()).abs().mean().item()
        case = {"model": model, "degrees": degrees, "errors": errors, "average": average, "ran": ran}
        print(json.dumps(case), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
