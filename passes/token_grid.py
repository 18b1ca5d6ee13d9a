"""The frames, rows and columns of the tokens that an attention of a video or picture model attends.

What the user says comes first; else the grid that query and key were made of, as `grid_evidence` finds it in the graph.
Query and key have to agree, so text that attends itself, and what attends text, has no grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from sgl_npu.lowering.sparse.token_grid import GridSetting, TokenGrid
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.grid_evidence import Found, GridEvidence, Shape
from sgl_npu.passes.site import AttentionSite, Refusal, place
from sgl_npu.runtime.sizes import Size, known

_HOW_TO_SAY = (
    "give attention_config latent_shape = (frames, height, width) in tokens, or patch_size where the model's input is "
    "the latent (B, C, T, H, W) or (B, C, H, W); text_len and prefix say which tokens are no video"
)


def find_grid(
    graph: fx.Graph, site: AttentionSite, setting: GridSetting, evidence: GridEvidence | None = None
) -> TokenGrid | Refusal:
    """The grid of a site, or why it has none that is known for every length that its graph may meet. Adds no guard.

    `evidence` is shared by the sites of one graph.
    """
    query, key = site.tensor("query"), site.tensor("key")
    assert query is not None and key is not None
    length = query.size(2)
    if not known(key.size(2) == length):
        return Refusal(f"{length} tokens attend {key.size(2)} others: a grid is that of tokens which attend each other")
    if setting.latent_shape is not None:
        words = f"latent_shape = {_text(setting.latent_shape)}"
        return _said(setting.latent_shape, setting, length, words, "latent_shape")
    if setting.patch_size is not None:
        return _of_latents(graph, setting.patch_size, setting, length)
    return _inferred(graph, site, length, setting, GridEvidence() if evidence is None else evidence)


def _said(shape: Shape, setting: GridSetting, length: Size, words: str, source: str) -> TokenGrid | Refusal:
    text = setting.text_len or 0
    before = text if setting.prefix is None else setting.prefix
    grid = TokenGrid(*shape, before, text - before, source)
    if known(grid.length == length):
        return grid
    return Refusal(f"{words} with text_len = {text} is {grid.length} tokens, but the attention has {length}")


def _of_latents(
    graph: fx.Graph, patch: tuple[int, int, int], setting: GridSetting, length: Size
) -> TokenGrid | Refusal:
    """The grid of the input that has the right number of patches."""
    answers = []
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() not in (4, 5) or _is_weight(node):
            continue
        latent = (1, *value.shape[2:])[-3:] if value.dim() == 4 else tuple(value.shape[2:])
        t, h, w = (size // p for size, p in zip(latent, patch, strict=True))
        words = f"patch_size = {_text(patch)} of an input {_text(value.shape)}"
        answers.append(_said((t, h, w), setting, length, words, f"patch_size of input {node.name}"))
    grids = [x for x in answers if isinstance(x, TokenGrid)]
    shapes = list(dict.fromkeys(_grid_text(x) for x in grids))
    if len(shapes) > 1:
        return Refusal(f"patch_size = {_text(patch)} fits two inputs, as {shapes[0]} and as {shapes[1]}; {_HOW_TO_SAY}")
    if grids:
        return grids[0]
    none = Refusal(f"patch_size = {_text(patch)}: the graph has no input (B, C, T, H, W) or (B, C, H, W)")
    return next((x for x in answers if isinstance(x, Refusal)), none)


def _is_weight(node: fx.Node) -> bool:
    return any(user.target is aten.convolution.default and user.args[1] is node for user in node.users)


def _inferred(
    graph: fx.Graph, site: AttentionSite, length: Size, setting: GridSetting, evidence: GridEvidence
) -> TokenGrid | Refusal:
    query, key = (evidence.grids(node, 2) for name in ("query", "key") if (node := site.argument(name)) is not None)
    every = [x for x in query if any(x.same(other) for other in key)]
    found = [x for x in every if not x.chosen]
    mixed = next((x for x in found if x.shape is None), None)
    if mixed is not None:
        return Refusal(f"the tokens are in no order of frames, rows and columns of {_place(mixed.node)}", mixed.node)
    if not found:
        return Refusal(f"nothing in the graph says what frames, rows and columns the tokens have; {_HOW_TO_SAY}")
    chosen = next((x for x in (*query, *key) if x.chosen and any(x.overlaps(other, length) for other in found)), None)
    if chosen is not None:
        return Refusal(f"its rows are chosen one by one from different tokens by {_place(chosen.node)}", chosen.node)
    elsewhere = _patches(graph) if all(x.positions for x in found) else None
    if elsewhere is not None:
        return Refusal(
            f"the tokens have positions in a grid ({_place(found[0].node)}), but were not made of the patches that the "
            f"graph has ({_place(elsewhere)}); {_HOW_TO_SAY}",
            elsewhere,
        )
    finest = max(found, key=lambda x: sum(not known(size == 1) for size in x.shape or ()))
    other = next((x for x in found if not _is_coarser(x, finest)), None)
    grid = _grid(finest)
    if other is not None:
        both = f"{_grid_text(grid)} ({grid.source}) and {_grid_text(_grid(other))} ({_place(other.node)})"
        return Refusal(f"the graph has two grids for the tokens, {both}; {_HOW_TO_SAY}", other.node)
    return _contradiction(setting, grid) or grid


@dataclass(frozen=True)
class Contradiction(Refusal):
    """The user says otherwise than the graph: not a matter of one site, if no other agrees."""


def _contradiction(setting: GridSetting, grid: TokenGrid) -> Contradiction | None:
    """`text_len` or `prefix` that is not what the graph joins with the video, for any of its lengths."""
    text, prefix = setting.text_len, setting.prefix
    if text is not None and known(grid.before + grid.after != text):
        return Contradiction(
            f"text_len = {text}, but {grid.before + grid.after} tokens are no video: {_grid_text(grid)}"
        )
    if prefix is not None and known(grid.before != prefix):
        return Contradiction(f"prefix = {prefix}, but {grid.before} tokens stand before the video: {_grid_text(grid)}")
    return None


def _patches(graph: fx.Graph) -> fx.Node | None:
    """A convolution over rows and columns."""
    found = graph.find_nodes(op="call_function", target=aten.convolution.default)
    return next((node for node in found if node.meta["val"].dim() > 3), None)


def _grid(found: Found) -> TokenGrid:
    assert found.shape is not None
    return TokenGrid(*found.shape, found.before, found.after, _place(found.node))


def _place(node: fx.Node) -> str:
    return f"input {node.name}" if node.op == "placeholder" else place(node)


def _is_coarser(one: Found, finest: Found) -> bool:
    """Whether a grid is the finest one with dimensions merged, or that grid itself."""
    assert one.shape is not None and finest.shape is not None
    _, h, w = one.shape
    t, height, width = finest.shape
    allowed = (1, width, height * width, t * height * width)
    placed = known(one.before == finest.before) and known(one.after == finest.after)
    return placed and all(any(known(inner == x) for x in allowed) for inner in (w, h * w))


def _text(sizes: Iterable[Size]) -> str:
    return f"({', '.join(str(size) for size in sizes)})"


def _grid_text(grid: TokenGrid) -> str:
    shape = _text((grid.frames, grid.height, grid.width))
    return f"{shape} after {grid.before} and before {grid.after} other tokens"
