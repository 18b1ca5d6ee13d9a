"""The body of a case's process."""

from __future__ import annotations

import logging
import warnings
from multiprocessing.connection import Connection

import torch

from benchmarks.coverage import measure as measuring
from benchmarks.coverage.case import Setting


def run_case(sender: Connection, name: str, setting: Setting, backend: str, platform: str, mode: str) -> None:
    from benchmarks.coverage.registry import find_case

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    case = find_case(name)
    record = measuring.measure(case, setting, backend, platform, mode)
    sender.send(record)
    sender.close()
