"""From the user's `Parallel` to process groups: which ranks share a sequence, and where among them this one is."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import fx
from torch._dispatch.python import no_python_dispatcher
from torch._dynamo.exc import ShortenTraceback
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sgl_npu.compiler.options import OptionsError, Parallel
from sgl_npu.passes.parallel import ParallelSetting
from sgl_npu.runtime.sequence import Axis, SequenceMesh

_meshes: dict[tuple, tuple[dist.ProcessGroup, DeviceMesh]] = {}


class DifferentGraphsError(ShortenTraceback, RuntimeError):
    """The ranks that share a sequence have compiled different graphs. Dynamo hands it to the user as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


@dataclass(frozen=True)
class SequenceRanks:
    """The setting of the parallel pass and the process group of all ranks that share a sequence."""

    setting: ParallelSetting
    group: dist.ProcessGroup

    @property
    def labels(self) -> dict[str, str]:
        """What to call the process groups: their names differ from rank to rank."""
        mesh = self.setting.mesh
        return {mesh.blocks.group: "blocks", mesh.ulysses.group: "ulysses", mesh.whole.group: "sequence"}


def sequence_ranks(parallel: Parallel, device_type: str) -> SequenceRanks | None:
    """The ranks that share a sequence; None if each has its own. Raises OptionsError for what cannot be.

    Makes process groups the first time, so all ranks must come here.
    """
    if parallel.ranks == 1:
        return None
    require_process_group(parallel)
    name, size = parallel.blocks
    sizes = _sizes(parallel)
    mesh = _named(parallel.mesh, sizes) if parallel.mesh is not None else _all_ranks(sizes, device_type)
    axes = {key: Axis(value, mesh.get_group(key).group_name) for key, value in sizes.items()}
    whole = mesh.get_group() if len(sizes) == 1 else _whole_group(mesh)
    alone = Axis(1, whole.group_name)
    grid = SequenceMesh(axes.get(name, alone), axes.get("ulysses", alone), Axis(parallel.ranks, whole.group_name))
    block, piece = (mesh.get_local_rank(key) if key in sizes else 0 for key in (name, "ulysses"))
    schemes = ("ulysses", "ring", "kv_gather") if name == "degree" else ("ulysses",) if size == 1 else (name,)
    setting = ParallelSetting(
        grid,
        (block, piece),
        schemes,
        shard=parallel.shard,
        placement=parallel.placement,
        max_gather=parallel.max_gather,
    )
    return SequenceRanks(setting, whole)


def require_process_group(parallel: Parallel) -> None:
    """Raise OptionsError if ranks are to share a sequence and there are none."""
    if parallel.ranks > 1 and not (dist.is_available() and dist.is_initialized()):
        raise OptionsError(
            f"parallel: {_text(_sizes(parallel))} needs a process group, and there is none; start the program with "
            "torchrun and call torch.distributed.init_process_group, or leave parallel out"
        )


def _sizes(parallel: Parallel) -> dict[str, int]:
    """The axes of the grid that have more than one rank, by name."""
    axes = (parallel.blocks, ("ulysses", parallel.ulysses))
    return {name: size for name, size in axes if size > 1}


def _text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def _all_ranks(sizes: dict[str, int], device_type: str) -> DeviceMesh:
    """All ranks of the world as a mesh, made once for every process group of the world."""
    world, product = dist.get_world_size(), 1
    for size in sizes.values():
        product *= size
    if world != product:
        raise OptionsError(
            f"parallel: {_text(sizes)} is {product} ranks, but the world has {world}; make the product {world}, or "
            f"pass mesh, a DeviceMesh with dimensions named {' and '.join(sizes)} beside those of other parallelism"
        )
    key, group = (device_type, tuple(sizes.items())), _world()
    if key not in _meshes or _meshes[key][0] is not group:
        _meshes[key] = group, init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return _meshes[key][1]


def _named(mesh: DeviceMesh, sizes: dict[str, int]) -> DeviceMesh:
    """The part of the user's mesh that has the dimensions of these names."""
    names = mesh.mesh_dim_names or ()
    for name, size in sizes.items():
        if name not in names:
            raise OptionsError(
                f"parallel: {name} = {size}, but the mesh has no dimension {name!r} "
                f"(it has {', '.join(names) or 'none'} by name); name one so in init_device_mesh, or set {name} to 1"
            )
        if mesh[name].size() != size:
            raise OptionsError(
                f"parallel: {name} = {size}, but dimension {name!r} of the mesh has {mesh[name].size()} ranks; "
                "make them equal"
            )
    if mesh.get_coordinate() is None:
        raise OptionsError(
            f"parallel: rank {dist.get_rank()} is not in the mesh, which has ranks {mesh.mesh.flatten().tolist()}; "
            "compile without parallel on the ranks outside"
        )
    order = [name for name in names if name in sizes]
    if order != list(sizes):
        raise OptionsError(
            f"parallel: the mesh has its dimensions in the order {', '.join(order)}; {' must come before '.join(sizes)}"
        )
    return mesh[tuple(sizes)] if len(sizes) > 1 else mesh[next(iter(sizes))]


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None  # checked before anything asks for ranks
    return group


def _whole_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of a mesh of two dimensions."""
    if mesh.size() == dist.get_world_size():
        return _world()
    return mesh._flatten("sgl_npu_sequence").get_group()  # private in torch 2.13; no public way makes one group of two


def check_same_graph(text: str, ranks: SequenceRanks, lengths: Sequence[int | None] = ()) -> None:
    """Raise on every rank if one has another graph: their collectives would wait for each other forever.

    `lengths` are those that the graph's symbols have in the call that it is compiled for.
    """
    found: list[str | None] = [None] * ranks.setting.mesh.size
    mine = _digest(f"{_comparable(text, set(ranks.labels.values()))}\n{lengths}")
    # Under the Python dispatcher, which AOTAutograd compiles in, torch starts a collective with the GIL held; gloo's
    # thread may want it to let go of the last one while it holds the lock that starting needs (torch 2.13).
    with unset_fake_temporarily(), no_python_dispatcher():
        dist.all_gather_object(found, mine, group=ranks.group)
    if len(set(found)) > 1:
        graphs = ", ".join(f"{digest} on rank {rank}" for rank, digest in enumerate(found))
        raise DifferentGraphsError(
            f"parallel: the ranks have compiled different graphs ({graphs}): every rank must call the same model "
            "with inputs of the same shapes and dtypes, with the same options, and take the same branches"
        )


def lengths_at_hand(graph: fx.Graph) -> list[int | None]:
    """What the symbolic sizes of the inputs are in the call that is being compiled; None for those that have no value.

    No later call is compared: that would be a message for each.
    """
    values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    sizes = [size for x in values for size in (x.shape if isinstance(x, torch.Tensor) else [x])]
    return [size.node.hint for size in sizes if isinstance(size, torch.SymInt)]


@contextlib.contextmanager
def same_on_all_ranks(ranks: SequenceRanks | None) -> Iterator[None]:
    """Tell the other ranks of an error in the body: they wait to compare graphs, and would wait in vain."""
    try:
        yield
    except Exception as error:
        if ranks is not None:
            # Where all ranks fail alike each raises its own error, otherwise the others learn that graphs differ.
            with contextlib.suppress(DifferentGraphsError):
                check_same_graph(f"{type(error).__name__}", ranks)
        raise


def _comparable(text: str, labels: Container[str]) -> str:
    """The text without what differs between ranks that agree: groups of other parallelism, addresses of inputs."""
    text = _GROUP.sub(lambda found: found[1] + (found[2] if found[2] in labels else "another group"), text)
    return _ADDRESS.sub("", text)


# The name of a group is the last argument of torch's collectives and the third of ours.
_GROUP = re.compile(
    r"(_c10d_functional\.(?!wait_tensor)\w+\(.*, |sgl_npu\.ring_shift\([^,]*, [^,]*, )([^,()\n]+)(?=[,)])"
)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def rank_tensor(setting: ParallelSetting, device: torch.device) -> torch.Tensor:
    """The value of the input that the parallel pass adds."""
    with unset_fake_temporarily():
        return torch.tensor(setting.rank, dtype=torch.int64, device=device)
