"""`sgl-npu export`: write what a model is compiled to, for review before there is an NPU.

A part is one compilation of the model: the rewritten graph by itself, and each of the two Ascend compilers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgl_npu.compiler.explain_target import Setting, load_target, parse_dtype, telling_call_errors
from sgl_npu.compiler.export_compile import compile_only
from sgl_npu.compiler.export_files import REWRITE, Entry, all_missing, failure_log, one_line, write_files
from sgl_npu.compiler.export_process import broken, run_part, version, why_not
from sgl_npu.compiler.options import ASCEND_INNERS, OptionsError, parse_options
from sgl_npu.compiler.progress import Step
from sgl_npu.compiler.sequence_ranks import require_process_group

MANIFEST = "manifest.json"
STEPS = 2

# What `--inner` may be, and the compilers it stands for.
CHOICES = {
    "both": ASCEND_INNERS,
    "npugraph_ex": ("npugraph_ex",),
    "torchair": ("torchair",),
    "none": (),
}


class ExportError(ValueError):
    """A request that cannot be met; one line that names the value and the remedy."""


@dataclass(frozen=True)
class Request:
    """What to export. Plain data: it is handed to other processes as JSON."""

    target: str
    out: str
    options: dict[str, Any]
    seq: int = 4096
    batch: int = 1
    dtype: str = "bf16"
    layers: int | None = None
    dynamic: bool = True
    asked: tuple[str, ...] = ()  # those of the sizes that the user gave


@dataclass(frozen=True)
class Exported:
    """What a part found: its files, what the model is, and where its tensors were."""

    note: str
    device: str
    entries: list[Entry]


def check_request(request: Request, inner: str, force: bool) -> None:
    """Raise for what the user got wrong, before anything is built or written."""
    if inner not in CHOICES:
        raise ExportError(f"--inner {inner}: should be one of {', '.join(CHOICES)}")
    if "inner" in request.options:
        raise OptionsError(f"inner = {request.options['inner']!r}: export has --inner, one of {', '.join(CHOICES)}")
    parse_dtype(request.dtype)
    for name in (REWRITE, *CHOICES[inner]):
        require_process_group(parse_options(_options_of(request, name)).parallel)
    out = Path(request.out)
    if out.exists() and not out.is_dir():
        raise ExportError(f"--out {out}: is a file; give a folder")
    if not force and out.is_dir() and any(out.iterdir()):
        raise ExportError(f"--out {out}: the folder is not empty; give another one, or --force to write into it")


def export(request: Request, inner: str, arguments: Sequence[str], step: Step) -> dict[str, Any]:
    """Write every artefact that this machine can make; returns what the manifest says.

    `arguments` are those of the command, for the manifest. There are STEPS steps.
    """
    out = Path(request.out)
    _clear(out)
    reasons = {name: why_not(name) for name in CHOICES[inner]}
    step(f"rewriting {request.target}")
    found = _rewritten(request)
    entries = list(found.entries)
    usable = [name for name, reason in reasons.items() if not reason]
    step(f"compiling {request.target} with {' and '.join(usable) or 'no Ascend compiler'}")
    with ThreadPoolExecutor() as pool:
        made = {name: pool.submit(run_part, asdict(request), name) for name in usable}
        for name, reason in reasons.items():
            entries += all_missing(name, reason) if reason else made[name].result()
    manifest = {
        "command": ["sgl-npu", *arguments],
        "target": request.target,
        "note": found.note,
        "device": found.device,
        "versions": {name: version(name) for name in ("sgl-npu", "torch", "torch-npu", "transformers", "diffusers")},
        "python": sys.version.split()[0],
        **{name: value for name, value in asdict(request).items() if name not in ("target", "out", "asked")},
        "inner": inner,
        "files": [_present(entry) for entry in entries if not entry.missing],
        "missing": [_missing(entry) for entry in entries if entry.missing],
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _rewritten(request: Request) -> Exported:
    """The part that needs no torch_npu; but transformers and diffusers import one that is installed, broken or not."""
    try:
        return export_part(request, REWRITE)
    except (ImportError, RuntimeError):
        if reason := broken():
            raise ExportError(f"{request.target}: {reason}") from None
        raise


def export_part(request: Request, part: str) -> Exported:
    """Compile with the inner compiler `part`, in this process, and write its files."""
    dtype = parse_dtype(request.dtype)
    setting = Setting(request.seq, request.batch, dtype, request.layers, asked=request.asked)
    target = load_target(request.target, setting)
    with telling_call_errors(request.target, target):
        found = compile_only(target, parse_options(_options_of(request, part)), request.dynamic)
    return Exported(target.note, found.device, write_files(found, part, Path(request.out)))


def _options_of(request: Request, part: str) -> dict[str, Any]:
    """The rewritten graph alone has no inner compiler that the options could be for."""
    options = {**request.options, "inner": part}
    if part == REWRITE:
        options.pop("inner_options", None)
    return options


def _clear(out: Path) -> None:
    """Make the folder; what an earlier export listed in its manifest is removed."""
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / MANIFEST
    if manifest.is_file():
        for row in json.loads(manifest.read_text(encoding="utf-8")).get("files", []):
            (out / Path(row["file"]).name).unlink(missing_ok=True)


def _present(entry: Entry) -> dict[str, Any]:
    return {"file": entry.file, "what": entry.what, "part": entry.part, "size": entry.size}


def _missing(entry: Entry) -> dict[str, Any]:
    return {"file": entry.file, "what": entry.what, "part": entry.part, "why": entry.missing}


def answer(asked: Path, answered: Path) -> None:
    """The other side: do one part, and leave the list of its files."""
    question = json.loads(asked.read_text(encoding="utf-8"))
    request, part = Request(**question["request"]), question["part"]
    try:
        entries = export_part(request, part).entries
    except Exception as error:
        entries = [*all_missing(part, one_line(error)), failure_log([error], part, Path(request.out))]
    answered.write_text(json.dumps([asdict(entry) for entry in entries]), encoding="utf-8")
