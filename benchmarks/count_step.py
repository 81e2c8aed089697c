"""What a training step must compute and move, counted: the tables of docs/performance.md, as Markdown.

`python benchmarks/count_step.py parts` (FLOPs, least bytes and the H100's predicted time of every part),
`... encoder` and `... decoder` (the algebra that each could use), `... kernels` (predicted times of our own kernels).
Nothing is measured here. `--keeps-one-of 4` counts offsets >= 1 on every fourth position.

Least bytes: every matrix product reads its operands and writes its result once, in forward and in both products of
backward; what is elementwise rides along with them; attention keeps its scores to itself; logits are never stored.

B batch, T positions, K window_size, D model_dim, N heads, H head_dim, V codebook_size.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from training.config import SIZES, ModelConfig
from training.flops import FLOPS_PER_MULTIPLY_ADD, FORWARD_AND_BACKWARD, model_flops_per_sample
from training.gpt import feed_forward_dim
from training.tensorar import has_tables, module_hidden_dim

H100_BYTES_PER_S = 3.35e12
H100_FLOPS_PER_S = 989e12
WIDTH = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Forward and backward of a micro batch."""

    flops: float
    bytes: float

    @property
    def predicted_s(self) -> float:
        """On an H100 at its full rates, whichever bounds."""
        return max(self.flops / H100_FLOPS_PER_S, self.bytes / H100_BYTES_PER_S)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)


def product(rows: float, inner: float, columns: float, *, keeps_result: bool = True) -> Cost:
    """(rows, inner) @ (inner, columns), its two products of backward too; the bytes of three products."""
    operands = rows * inner + inner * columns + (rows * columns if keeps_result else 0)
    return Cost(
        flops=FORWARD_AND_BACKWARD * FLOPS_PER_MULTIPLY_ADD * rows * inner * columns,
        bytes=FORWARD_AND_BACKWARD * WIDTH * operands,
    )


def moved(num_elements: float) -> Cost:
    """Elements that are written or read once, each."""
    return Cost(flops=0, bytes=WIDTH * num_elements)


NOTHING = Cost(flops=0, bytes=0)


def base_stack(config: ModelConfig, batch: int) -> Cost:
    """All blocks."""
    rows, dim, length = batch * config.num_positions, config.dim, config.num_positions
    hidden = feed_forward_dim(dim)
    of_attention = FORWARD_AND_BACKWARD * FLOPS_PER_MULTIPLY_ADD * rows * 2 * length * dim
    # Forward reads q, k, v and writes the output; backward reads all and the gradient, and writes three.
    attention = Cost(flops=of_attention, bytes=WIDTH * rows * dim * (4 + 8))
    block = product(rows, dim, 3 * dim) + attention + product(rows, dim, dim)
    block = block + product(rows, dim, 2 * hidden) + product(rows, hidden, dim)
    return Cost(flops=config.layers * block.flops, bytes=config.layers * block.bytes)


def window_making(config: ModelConfig, batch: int) -> Cost:
    """Codes in, noised windows out, int64; about 100 integer operations a draw are not FLOPs."""
    return Cost(flops=0, bytes=8 * batch * config.num_positions * (1 + config.window_size))


def embedding(config: ModelConfig, batch: int) -> Cost:
    """The residual code: a row read and written, its gradient read and added to the table's."""
    return moved(batch * config.num_positions * config.dim * 4)


def feed_forward(config: ModelConfig, rows: float) -> Cost:
    """Of either module."""
    hidden = module_hidden_dim(config)
    return product(rows, config.dim, 2 * hidden) + product(rows, hidden, config.dim)


def encoder_paths(config: ModelConfig, batch: int) -> dict[str, Cost]:
    """The input encoder's ways to score, weigh and project K codes; the last projection and feed-forward are in all."""
    dim, heads, size, num_codes = config.dim, config.heads, config.window_size, config.codebook_size
    rows = batch * (config.num_positions - 1)
    end = product(rows, dim, dim) + feed_forward(config, rows)
    keys, mixed = rows * size * dim, rows * heads * dim
    score_flops = FORWARD_AND_BACKWARD * FLOPS_PER_MULTIPLY_ADD * rows * size * heads * dim
    # Rows of the table read in forward and again in backward, and the table's gradient written once.
    gathers = moved(2 * keys + num_codes * dim)
    scores = Cost(flops=score_flops, bytes=0)
    mixing = scores + scores + gathers
    values = Cost(flops=FORWARD_AND_BACKWARD * FLOPS_PER_MULTIPLY_ADD * rows * dim * dim, bytes=0)
    weights = moved(FORWARD_AND_BACKWARD * dim * dim)
    tables = product(num_codes, dim, dim + heads) + moved(2 * keys + 3 * rows * dim)
    return {
        "keys and values of every offset": product(rows * size, dim, 2 * dim) + gathers + moved(4 * keys) + end,
        "values of every offset, keys folded": product(rows * size, dim, dim + heads) + gathers + moved(4 * keys) + end,
        "mixed before the values, through memory": mixing + values + weights + moved(5 * mixed + 3 * rows * dim) + end,
        "mixed before the values, in cache": mixing + values + weights + moved(keys + 3 * rows * dim) + end,
        "tables of (code, offset)": product(num_codes * size, dim, dim + heads)
        + moved(2 * keys + 3 * rows * dim)
        + end,
        "tables of codes": tables + end,
    }


def decoder_paths(config: ModelConfig, batch: int, *, keeps_one_of: int = 1) -> dict[str, Cost]:
    """The output decoder's ways from a state to K states, or to those that are scored."""
    dim, heads = config.dim, config.heads
    size = 1 + (config.window_size - 1) / keeps_one_of
    rows = batch * config.num_positions
    end = feed_forward(config, rows * size)
    joint = product(rows * (size + 1), dim, 4 * dim) + moved(12 * rows * (size + 1) * dim)
    gates = product(rows, dim, config.window_size * heads)
    spread = FORWARD_AND_BACKWARD * FLOPS_PER_MULTIPLY_ADD * rows * size * heads * dim
    per_head = product(rows, dim, dim) + moved(2 * rows * heads * dim) + moved(3 * rows * heads * dim)
    return {
        "joint attention, all projections": joint + end,
        "a gate a head": product(rows, dim, dim) + gates + product(rows * size, dim, dim) + end,
        "a gate a head after the last projection": product(rows, dim, dim)
        + gates
        + per_head
        + Cost(flops=spread, bytes=WIDTH * 3 * rows * size * dim)
        + end,
    }


def heads_and_loss(config: ModelConfig, batch: int, *, keeps_one_of: int) -> Cost:
    """K heads and cross-entropy, logits never stored; offsets >= 1 on one of `keeps_one_of` positions."""
    rows = batch * config.num_positions
    rows_kept = rows * (1 + (config.window_size - 1) / keeps_one_of)
    return product(rows_kept, config.dim, config.codebook_size, keeps_result=False)


def parts(config: ModelConfig, batch: int, *, keeps_one_of: int) -> dict[str, Cost]:
    """A step, the paths of the modules being what the model takes."""
    is_by_tables = has_tables(codebook_size=config.codebook_size, num_windows=batch * (config.num_positions - 1))
    path = "tables of codes" if is_by_tables else "mixed before the values, in cache"
    modules = {
        "input encoder": encoder_paths(config, batch)[path],
        "output decoder": decoder_paths(config, batch, keeps_one_of=keeps_one_of)["a gate a head"],
    }
    has_modules = config.window_size > 1
    return {
        "base stack": base_stack(config, batch),
        "window making": window_making(config, batch) if has_modules else NOTHING,
        "embedding": embedding(config, batch),
        **(modules if has_modules else dict.fromkeys(modules, NOTHING)),
        "heads and cross-entropy": heads_and_loss(config, batch, keeps_one_of=keeps_one_of),
    }


def config_of(size: Any, *, window_size: int) -> ModelConfig:
    """A named size at 256 codes of 16,384."""
    return ModelConfig(size=size, window_size=window_size)


def number(value: float) -> str:
    """Three digits, or whole."""
    return "0" if value == 0 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(header: list[str], lines: list[list[str]]) -> None:
    """Print one in Markdown."""
    for cells in (header, ["---", *["---:"] * (len(header) - 1)], *lines):
        print(f"| {' | '.join(cells)} |")
    print()


def print_parts(batch: int, window_size: int, keeps_one_of: int) -> None:
    """One table a unit, sizes as columns."""
    sizes = list(SIZES)
    configs = [config_of(size, window_size=window_size) for size in sizes]
    costs = [parts(config, batch, keeps_one_of=keeps_one_of) for config in configs]
    for cost, config in zip(costs, configs, strict=True):
        counted = model_flops_per_sample(config, micro_batch_size=batch, scored_stride=keeps_one_of)
        assert abs(sum_of(cost).flops / batch / counted - 1) < 0.005, (sum_of(cost).flops / batch, counted)
    bases = [sum_of(parts(config_of(size, window_size=1), batch, keeps_one_of=1)) for size in sizes]
    units = {
        "GFLOP a sample": lambda cost: number(cost.flops / batch / 1e9),
        "MB a sample": lambda cost: number(cost.bytes / batch / 1e6),
        "H100, predicted us a sample": lambda cost: number(cost.predicted_s / batch * 1e6),
    }
    for unit, show in units.items():
        lines = [[name, *(show(cost[name]) for cost in costs)] for name in costs[0]]
        lines.append(["whole step", *(show(sum_of(cost)) for cost in costs)])
        lines.append(["base model's whole step", *(show(base) for base in bases)])
        table([unit, *sizes], lines)
    ratios = [sum_of(cost).flops / base.flops for cost, base in zip(costs, bases, strict=True)]
    table(["FLOPs over the base model's", *sizes], [["whole step", *(f"{ratio:.3f}" for ratio in ratios)]])


def sum_of(costs: dict[str, Cost]) -> Cost:
    """Of all parts."""
    return sum(costs.values(), NOTHING)


def print_paths(which: str, batch: int, window_size: int) -> None:
    """Products in d^2 a position's forward, bytes and predicted time a sample, for B and 3B."""
    paths = encoder_paths if which == "encoder" else decoder_paths
    lines = []
    sizes = ("B", "XL", "3B")
    configs = [config_of(size, window_size=window_size) for size in sizes]
    for name in paths(configs[0], batch):
        costs = [paths(config, batch)[name] for config in configs]
        per_position = costs[0].flops / 6 / batch / configs[0].num_positions / configs[0].dim ** 2
        shown = [f"{cost.flops / batch / 1e9:.2f} / {cost.bytes / batch / 1e6:.1f}" for cost in costs]
        times = [
            f"{1e6 * cost.flops / batch / H100_FLOPS_PER_S:.1f} + {1e6 * cost.bytes / batch / H100_BYTES_PER_S:.1f}"
            for cost in costs
        ]
        lines.append([name, f"{per_position:.2f}", *shown, *times])
    header = [
        which,
        "d^2 a position (B)",
        *(f"{size}: GFLOP / MB" for size in sizes),
        *(f"{size}: us" for size in sizes),
    ]
    table(header, lines)


def print_kernels(batch: int, window_size: int) -> None:
    """Bytes and predicted times of our own kernels, a micro batch."""
    lines = []
    for size in SIZES:
        config = config_of(size, window_size=window_size)
        rows, dim = batch * 255, config.dim
        keys, mixed = rows * window_size * dim, rows * config.heads * dim
        forward = moved(keys + mixed)
        backward = moved(keys + mixed + config.codebook_size * dim)
        shown = [f"{cost.bytes / 1e6:,.1f} / {1e6 * cost.predicted_s:,.1f}" for cost in (forward, backward)]
        noise = window_making(config, batch)
        lines.append([size, *shown, f"{noise.bytes / 1e6:.2f} / {1e6 * noise.predicted_s:.2f}"])
    table(["MB / us a micro batch", "mix_windows forward", "mix_windows backward", "noise_windows"], lines)


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=["parts", "encoder", "decoder", "kernels"])
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--window-size", type=int, default=4)
    parser.add_argument("--keeps-one-of", type=int, default=1, help="positions on which offsets >= 1 are scored")
    options = parser.parse_args()
    if options.table == "parts":
        print_parts(options.micro_batch_size, options.window_size, options.keeps_one_of)
    elif options.table == "kernels":
        print_kernels(options.micro_batch_size, options.window_size)
    else:
        print_paths(options.table, options.micro_batch_size, options.window_size)


if __name__ == "__main__":
    main()
