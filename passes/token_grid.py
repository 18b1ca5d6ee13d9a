"""Where the tokens of a video are in the sequence of an attention."""

from __future__ import annotations

from torch import fx

from sgl_npu.lowering.sparse.token_grid import GridSetting, TokenGrid
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.sizes import known


def find_grid(graph: fx.Graph, site: AttentionSite, setting: GridSetting) -> TokenGrid | Refusal:
    """The grid that the user gives."""
    query = site.tensor("query")
    if setting.latent_shape is None or query is None:
        return Refusal("no latent_shape is given")
    before = setting.text_len if setting.prefix is None else setting.prefix
    grid = TokenGrid(*setting.latent_shape, before, setting.text_len - before, source="latent_shape")
    return grid if known(grid.length == query.size(2)) else Refusal(f"the grid has {grid.length} tokens")
