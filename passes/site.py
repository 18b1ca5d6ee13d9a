"""One attention of a model: what is known about it while passes work, and what the report says of it afterwards."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import fx

from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sizes import Size

META_KEY = "sgl_npu_site"  # in node.meta["custom"], which AOTAutograd carries from Dynamo's nodes to its own


@dataclass
class SiteRecord:
    """What happened at one attention. `refusals` holds (kernel or pass, clause) in the order tried."""

    id: int
    spelling: str
    module: str = ""
    source: str = ""
    op: str = ""
    kernel: str = ""
    fused: bool = False
    mask: str = ""
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    dtype: str = ""
    lse_used: bool = False
    backward: str = ""
    refusals: list[tuple[str, str]] = field(default_factory=list)

    @property
    def shapes(self) -> tuple[tuple[str, ...], ...]:
        """Shapes of query, key and value, sizes as text: numbers or torch's symbols."""
        return self.query, self.key, self.value


@dataclass(frozen=True)
class Refusal:
    """Why a pass leaves a site alone. `node` is the deepest node it reached."""

    reason: str
    node: fx.Node | None = None


_TENSORS = ("query", "key", "value", "mask", "bias", "sinks")


@dataclass(frozen=True)
class AttentionSite:
    """A canonical node and its arguments by name; sizes and numbers as the fake values have them."""

    node: fx.Node
    record: SiteRecord

    def argument(self, name: str) -> fx.Node | None:
        """The node of a tensor argument, None where it was not given."""
        index = _TENSORS.index(name)
        args = self.node.args
        found = args[index] if index < len(args) else self.node.kwargs.get(name)
        assert found is None or isinstance(found, fx.Node)
        return found

    def set_argument(self, name: str, node: fx.Node) -> None:
        index = _TENSORS.index(name)
        if index < len(self.node.args):
            self.node.update_arg(index, node)
        else:
            self.node.update_kwarg(name, node)

    def clear_argument(self, name: str) -> None:
        index = _TENSORS.index(name)
        if index < len(self.node.args):
            self.node.update_arg(index, None)
        else:
            self.node.kwargs = {key: value for key, value in self.node.kwargs.items() if key != name}

    def tensor(self, name: str) -> torch.Tensor | None:
        """The fake value of a tensor argument."""
        node = self.argument(name)
        return None if node is None else node.meta["val"]

    @property
    def lower(self) -> Size | None:
        return _value(self.node.kwargs.get("lower"))

    @property
    def upper(self) -> Size | None:
        return _value(self.node.kwargs.get("upper"))

    def output(self, index: int) -> fx.Node | None:
        """The getitem of `out` (0) or `lse` (1), None where nobody uses it."""
        return next((user for user in self.node.users if user.args[1] == index and user.users), None)


def _value(argument):
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def site_id(node: fx.Node) -> int | None:
    return (node.meta.get("custom") or {}).get(META_KEY)


def mark_site(node: fx.Node, record: SiteRecord) -> None:
    """Tie a node, and what AOTAutograd traces from it, to its record."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), META_KEY: record.id}


def find_sites(graph: fx.Graph, records: dict[int, SiteRecord]) -> list[AttentionSite]:
    """Every canonical node of the graph with its record; a node without one (called directly) gets a new record."""
    sites = []
    for node in graph.find_nodes(op="call_function", target=attention):
        record = records.get(-1 if (found := site_id(node)) is None else found)
        if record is None:
            record = SiteRecord(max(records, default=-1) + 1, "sgl_npu::attention", *where(node))
            records[record.id] = record
            mark_site(node, record)
        sites.append(AttentionSite(node, record))
    return sites


def where(node: fx.Node) -> tuple[str, str]:
    """(dotted module path, "file:line") of the code that made the node, as far as Dynamo recorded it."""
    stack = node.meta.get("nn_module_stack") or {}
    module = ""
    for path, _ in stack.values():
        module = _dotted(path)
    frames = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")
    ]
    source = ""
    if frames:
        name, _, line = frames[-1].removeprefix('File "').partition('", line ')
        source = f"{name.rsplit('/', 1)[-1]}:{line.split(',')[0]}"
    return module, source


_PLUMBING = ("_modules", "__dict__")


def _dotted(path: str) -> str:
    """L['self']._modules['layers']._modules['0'].attn as layers.0.attn: the first name is a local variable."""
    names = re.findall(r"\w+", path.removeprefix("L[").removeprefix("G["))
    return ".".join(name for name in names[1:] if name not in _PLUMBING)


def shape_text(tensor: torch.Tensor) -> tuple[str, ...]:
    return tuple(str(size) for size in tensor.shape)


def mask_text(site: AttentionSite) -> str:
    """The mask in the report's words: full, causal, band(lower, upper), tensor, "causal & tensor", with "+ bias"."""
    lower, upper = site.lower, site.upper
    query, key = site.tensor("query"), site.tensor("key")
    assert query is not None and key is not None
    words = []
    if lower is None and upper is not None and str(upper) == "0":
        words.append("causal")
    elif lower is None and upper is not None and str(upper) == str(key.size(2) - query.size(2)):
        words.append("causal (bottom-right)")
    elif lower is not None or upper is not None:
        words.append(f"band({'-inf' if lower is None else lower}, {'inf' if upper is None else upper})")
    if site.argument("mask") is not None:
        words.append("tensor")
    text = " & ".join(words) or "full"
    return f"{text} + bias" if site.argument("bias") is not None else text
