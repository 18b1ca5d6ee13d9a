"""`python -m benchmarks.plots`: the pictures of benchmarks/README.md, from what was measured last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.check import Rows, number, read_tables

FOLDER = Path(__file__).parent / "img"
BLUE, ORANGE, GREY = "#2a6099", "#a8620f", "#8a9099"


def layer(axes: Axes, rows: Rows) -> None:
    """Times faster than plain Inductor over the length."""
    for dtype, colour in (("float32", BLUE), ("bfloat16", ORANGE)):
        mine = [row for row in rows if row["dtype"] == dtype]
        lengths = [int(row["S"]) for row in mine]
        axes.plot(lengths, [number(row["Inductor / ours"]) for row in mine], "o-", color=colour, label=dtype)
        axes.plot(
            lengths,
            [number(row["Inductor / ours"]) / number(row["hand-called SDPA / ours"]) for row in mine],
            ":", color=colour, label=f"{dtype}, SDPA called by hand",
        )  # fmt: skip
    _over_length(axes, (int(row["S"]) for row in rows))
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set(title="Llama attention layer written by hand, CPU", ylabel="times faster than plain Inductor")


def memory(axes: Axes, rows: Rows) -> None:
    """Peak memory over the length."""
    rows = [row for row in rows if row["dtype"] == "bfloat16"]
    lengths = [int(row["S"]) for row in rows]
    for column, name, colour in (("peak MB: Inductor", "plain Inductor", GREY), ("ours", "ours", BLUE)):
        axes.plot(lengths, [number(row[column]) for row in rows], "o-", color=colour, label=name)
    _over_length(axes, lengths)
    axes.set(title="Peak memory of that layer, bfloat16", ylabel="MB", yscale="log")


def sequence(axes: Axes, rows: Rows) -> None:
    """Efficiency of two ranks over the length."""
    rows = [row for row in rows if row["causal"] and row["dtype"] == "float32" and row["pages"] == "fresh"]
    styles = {
        "ring, inductor": (BLUE, "-"),
        "kv_gather, inductor": (ORANGE, "-"),
        "torch ring, all-gather": (GREY, ":"),
    }
    for scheme, (colour, line) in styles.items():
        mine = [row for row in rows if row["scheme"] == scheme]
        axes.plot([r["length"] for r in mine], [r["efficiency"] for r in mine], f"o{line}", color=colour, label=scheme)
    _over_length(axes, (row["length"] for row in rows))
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set(title="Two ranks, causal, zigzag, float32", ylabel="efficiency in CPU seconds")


def sparse(axes: Axes, rows: Rows) -> None:
    """Speed-up of sparse attention beside the inverse of its density."""
    for method, colour in (("rain_fusion_attn", BLUE), ("block_sparse_attn", ORANGE)):
        mine = sorted((100 / number(r["density"]), number(r["speed-up"])) for r in rows if r["method"] == method)
        axes.plot(*zip(*mine, strict=True), "o", color=colour, label=method)
    ideal = [1, max(100 / number(row["density"]) for row in rows)]
    axes.plot(ideal, ideal, ":", color=GREY, label="1 / density")
    axes.set(title="Sparse attention, CPU, 8k and 16k tokens", xlabel="1 / density", ylabel="speed-up over dense")


PLOTS: dict[str, tuple[str, Callable[[Axes, Rows], None]]] = {
    "layer": ("layer", layer),
    "memory": ("layer", memory),
    "sequence": ("sequence_efficiency", sequence),
    "sparse": ("sparse_speed", sparse),
}


def _over_length(axes: Axes, lengths: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted(set(lengths))
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_xlabel("tokens")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    plt.rcParams.update(
        {"svg.hashsalt": "sgl_npu", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    tables = read_tables()
    for name, (table, draw) in PLOTS.items():
        figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
        draw(axes, tables[table])
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
