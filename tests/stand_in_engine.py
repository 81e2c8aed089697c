"""A small model with AdamW in the place of a DeepSpeed engine at ZeRO 0, for tests of how states become files."""

from types import SimpleNamespace
from typing import Any

import torch


class Model(torch.nn.Module):
    """Sizes that no number of ranks divides, one smaller than some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(5, 7)
        self.input_encoder = torch.nn.Linear(3, 1)


def engine_of(*, rank: int = 0, world_size: int = 1, seed: int = 0, num_steps: int = 0) -> Any:
    """What fragments read of an engine without ZeRO, where every rank holds all parameters in float32."""
    torch.manual_seed(seed)
    module = Model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(num_steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=optimizer, global_rank=rank, world_size=world_size
    )


def states_of(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights and of all that the optimiser keeps."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = parameter.detach().clone()
        for kind, value in engine.basic_optimizer.state.get(parameter, {}).items():
            found[f"{kind} of {name}"] = value.clone()
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def partition_of(*, rank: int, world_size: int) -> tuple[Any, slice]:
    """What fragments read of an engine under ZeRO 1 or 2, and which of all elements end to end its rank holds."""
    module = Model()
    sizes = [parameter.numel() for parameter in module.parameters()]
    length = -(-sum(sizes) // world_size)  # the last one is padded
    own = slice(rank * length, (rank + 1) * length)
    first = 0
    for parameter, size in zip(module.parameters(), sizes, strict=True):
        start, end = max(first, own.start), min(first + size, own.stop)
        of_weights = SimpleNamespace(start=start - first)
        of_master = SimpleNamespace(start=start - own.start, numel=end - start)
        mapping = SimpleNamespace(lp_fragment_address=of_weights, hp_fragment_address=of_master)
        parameter._hp_mapping = mapping if start < end else None  # type: ignore[attr-defined]
        first += size
    master = torch.nn.Parameter(torch.zeros(length))
    optimizer = SimpleNamespace(
        bit16_groups=[list(module.parameters())],
        single_partition_of_fp32_groups=[master],
        num_refreshed=0,
    )

    def update_lp_params() -> None:
        optimizer.num_refreshed += 1

    optimizer.update_lp_params = update_lp_params
    basic_optimizer = torch.optim.AdamW([master])
    engine = SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=basic_optimizer, global_rank=rank, world_size=world_size
    )
    return engine, own
