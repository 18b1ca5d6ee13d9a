"""One attention of a model: what is known about it while passes work, and what the report says of it afterwards."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.nn.attention import flex_attention

from sgl_npu.runtime import serving
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sizes import Size

_WRAPPERS = tuple(f'File "{module.__file__}"' for module in (serving, flex_attention))
META_KEY = "sgl_npu_site"  # in node.meta["custom"], which AOTAutograd carries from Dynamo's nodes to its own


@dataclass
class SiteRecord:
    """What happened at one attention. `refusals` holds (kernel or pass, clause) in the order tried.

    `tensor_mask` names what is no band in the mask: documents, chunks, prefix, or just tensor. `empty_rows` says
    whether a row may attend nothing: never, possible (data or sizes decide), some (always); "" where nobody asked.
    `averages_empty_rows`: the model's formula gives such a row the average of all values, and so does what replaces it.
    `deepest` is where the matcher stopped at one that it left alone: an op and its line. `guards` names the buffers
    whose values were used in a proof; they are compared at every call.
    `scheme` is how the ranks of a sequence share the attention ("" where they do not), `sent` the bytes that one rank
    sends for one call, a number or a formula of torch's symbols, and `collectives` the messages that takes,
    or why it takes none.
    `sparse` says what an attention with a sparse kernel leaves out, and of which grid. `rotary` says what became of the
    norms and rotary embeddings of its query and key, "" where the platform has no kernel for them.
    """

    id: int
    spelling: str
    module: str = ""
    source: str = ""
    op: str = ""
    kernel: str = ""
    fused: bool = False
    mask: str = ""
    tensor_mask: str = ""
    empty_rows: str = ""
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    dtype: str = ""
    lse_used: bool = False
    backward: str = ""
    averages_empty_rows: bool = False
    deepest: str = ""
    scheme: str = ""
    sent: str = ""
    collectives: str = ""
    sparse: str = ""
    rotary: str = ""
    guards: list[str] = field(default_factory=list)
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


def record_of(node: fx.Node, records: dict[int, SiteRecord]) -> SiteRecord | None:
    """The record that a node is tied to, if it is to any."""
    found = site_id(node)
    return None if found is None else records.get(found)


def new_record(node: fx.Node, spelling: str, records: dict[int, SiteRecord]) -> SiteRecord:
    """A further record, of an attention that `node` is part of."""
    record = SiteRecord(max(records, default=-1) + 1, spelling, *where(node))
    records[record.id] = record
    return record


def mark_site(node: fx.Node, record: SiteRecord) -> None:
    """Tie a node, and what AOTAutograd traces from it, to its record."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), META_KEY: record.id}


def find_sites(graph: fx.Graph, records: dict[int, SiteRecord]) -> list[AttentionSite]:
    """Every canonical node of the graph with its record; a node without one (called directly) gets a new record."""
    sites = []
    for node in graph.find_nodes(op="call_function", target=attention):
        record = record_of(node, records)
        if record is None:
            record = new_record(node, "sgl_npu::attention", records)
            mark_site(node, record)
        sites.append(AttentionSite(node, record))
    return sites


def where(node: fx.Node) -> tuple[str, str]:
    """(dotted module path, "file:line") of the code that made the node, as far as Dynamo recorded it."""
    stack = node.meta.get("nn_module_stack") or {}
    module = ""
    for path, _ in stack.values():
        module = dotted(path)
    frames = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")
    ]
    source = ""
    frames = [line for line in frames if not line.startswith(_WRAPPERS)]  # what called them counts
    if frames:
        name, _, line = frames[-1].removeprefix('File "').partition('", line ')
        source = f"{name.rsplit('/', 1)[-1]}:{line.split(',')[0]}"
    return module, source


_PLUMBING = ("_modules", "_buffers", "__dict__")


def dotted(path: str) -> str:
    """L['self']._modules['layers']._modules['0'].attn as layers.0.attn: the first name is a variable, or a global."""
    names = re.findall(r"\w+", path)
    names = names[2:] if path.startswith(("L[", "G[")) else names
    return ".".join(name for name in names if name not in _PLUMBING)


def place(node: fx.Node | None) -> str:
    """A node of a graph in the report's words: its op and the line it comes from."""
    if node is None:
        return ""
    source = where(node)[1]
    return f"{str(node.target).removesuffix('.default')}{f' at {source}' if source else ''}"


def shape_text(tensor: torch.Tensor) -> tuple[str, ...]:
    return tuple(str(size) for size in tensor.shape)


def mask_text(site: AttentionSite) -> str:
    """The mask in the report's words: full, causal, band(lower, upper), tensor, "causal & documents", with "+ bias"."""
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
        words.append(site.record.tensor_mask or "tensor")
    text = " & ".join(words) or "full"
    return f"{text} + bias" if site.argument("bias") is not None else text
