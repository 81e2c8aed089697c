"""An engine's float32 state <-> fragments of parameters; the only file that spells DeepSpeed's tensor internals.

Under ZeRO 1 to 3 a rank holds flat float32 masters, each the end-to-end pieces of several parameters (with padding
between or after them), and the optimiser's state of a master lies like the master itself. Without ZeRO every rank holds
whole parameters, and each writes an even share. So what a rank writes is one contiguous fragment of a parameter at
most, and the ranks' fragments together are every element once: any world size and any stage reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.storage import ArtifactError
from training.engine import Engine
from training.fragment_file import WEIGHTS, FragmentFile, FragmentLayout
from training.tensorar import is_of_base

STEP = "step"
"""Key of the optimiser's own count of steps, which is not a state of elements."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A run of elements that is both in a master and in a flattened parameter."""

    name: str
    start: int
    """Its first element in the flattened parameter."""
    position: int
    """Its first element in the master."""
    num_elements: int


@dataclass(frozen=True, kw_only=True)
class _Master:
    """A float32 tensor that the optimiser steps on, and what it is made of."""

    tensor: Tensor
    pieces: tuple[_Piece, ...]


class Fragments:
    """The fragments that this rank writes: views of the engine's own memory."""

    def __init__(self, engine: Engine) -> None:
        """Find them.

        Args:
            engine: between two steps.
        """
        masters = _masters(engine)
        states = [_states(engine, master) for master in masters]
        self._held = [
            (state, piece) for master, state in zip(masters, states, strict=True) for piece in _written(engine, master)
        ]
        self.layout = FragmentLayout(
            kinds=tuple(states[0]) if states else (WEIGHTS,),
            fragments={piece.name: (piece.start, piece.start + piece.num_elements) for _, piece in self._held},
        )
        self.optimizer_steps = max((_steps(engine, master) for master in masters), default=0)

    def views(self) -> Iterator[Tensor]:
        """Yield the fragments, float32 and one-dimensional, in the order of the file."""
        for kind in self.layout.kinds:
            for state, piece in self._held:
                yield state[kind].narrow(0, piece.position, piece.num_elements)

    def copy_to(self, buffer: Tensor) -> None:
        """Copy the fragments into a flat float32 tensor, in the order of the file; waits for the device."""
        position = 0
        for view in self.views():
            buffer.narrow(0, position, view.numel()).copy_(view, non_blocking=True)
            position += view.numel()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def parameter_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every parameter by name."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in _named_parameters(engine)
    }


def restore_fragments(
    engine: Engine, files: Iterable[FragmentFile], *, optimizer_steps: int, module_warmup_steps: int = 0
) -> None:
    """Fill a fresh engine from a checkpoint's files, of any world size and ZeRO stage; called by every rank.

    Args:
        engine: just built; masters, optimiser state and the weights it computes with are overwritten.
        files: of the checkpoint; the first ones should hold most of what this rank needs, since the rest is only
            opened while something is missing.
        optimizer_steps: steps that the optimiser counts.
        module_warmup_steps: how many of them, the first, left the base model alone, which does not count them.

    Raises:
        ArtifactError: the files do not hold all elements of the engine.
    """
    masters = _masters(engine)
    by_name: dict[str, list[tuple[_Master, _Piece]]] = {}
    for master in masters:
        for piece in master.pieces:
            by_name.setdefault(piece.name, []).append((master, piece))
    missing = sum(piece.num_elements for pieces in by_name.values() for _, piece in pieces)
    for file in files if missing else ():  # each is opened as it comes: no more of them than it takes
        missing -= _restore_from(engine, file, by_name)
        if missing == 0:
            break
    if missing:
        raise ArtifactError(
            f"resume: the files must hold every element of the model, got none of {missing} of them; verify the run "
            "and use another checkpoint"
        )
    if optimizer_steps:
        for master in masters:
            is_of_base_master = any(is_of_base(piece.name) for piece in master.pieces)
            missed_steps = min(optimizer_steps, module_warmup_steps) if is_of_base_master else 0
            _set_steps(engine, master, optimizer_steps - missed_steps)
    _refresh_compute_weights(engine)


def _restore_from(engine: Engine, file: FragmentFile, by_name: dict[str, list[tuple[_Master, _Piece]]]) -> int:
    """Copy what a file holds of this rank's pieces; return how many elements of one kind that were."""
    copies = [
        (name, master, piece, max(start, piece.start), min(end, piece.start + piece.num_elements))
        for name, (start, end) in file.layout.fragments.items()
        for master, piece in by_name.get(name, ())
    ]
    copies = [copy for copy in copies if copy[3] < copy[4]]
    if not copies:
        return 0
    for kind in file.layout.kinds:
        fragments = file.read(kind)
        for name, master, piece, start, end in copies:
            first, values = fragments[name]
            target = _state_of_kind(engine, master, kind).narrow(0, piece.position + start - piece.start, end - start)
            # Copied: torch wants writable memory, and a map's pages may be gone before a device has read them.
            target.copy_(torch.from_numpy(values[start - first : end - first].copy()))
    return sum(end - start for *_, start, end in copies)


def _named_parameters(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, parameter) of what is trained, by the names of the model before torch.compile."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield name.replace("_orig_mod.", ""), parameter


def _masters(engine: Engine) -> list[_Master]:
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in _named_parameters(engine)}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        return [
            _master_of_stage3(optimizer, master, group, names=names)
            for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        pairs = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        return [_master_of_flat(master, group, names=names) for group, master in pairs]
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # ZeRO 1 in bfloat16 that accumulates in float32
        pairs = zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
        return [_master_of_flat(master, group, names=names) for group, master in pairs]
    return [_whole_master(master, names[id(parameter)]) for parameter, master in _replicas(engine)]


def _master_of_stage3(optimizer: Any, master: Tensor, group: list[Any], *, names: dict[int, str]) -> _Master:
    pieces = []
    for parameter in group:
        _, position, partition_size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = partition_size * optimizer._get_param_partition_rank(parameter)
        num_elements = min(partition_size, parameter.ds_numel - start)  # the last partitions are padded
        if num_elements > 0:
            name = names[id(parameter)]
            pieces.append(_Piece(name=name, start=start, position=position, num_elements=num_elements))
    return _Master(tensor=master, pieces=tuple(pieces))


def _master_of_flat(master: Tensor, group: list[Any], *, names: dict[int, str]) -> _Master:
    pieces = [
        _Piece(
            name=names[id(parameter)],
            start=parameter._hp_mapping.lp_fragment_address.start,
            position=parameter._hp_mapping.hp_fragment_address.start,
            num_elements=parameter._hp_mapping.hp_fragment_address.numel,
        )
        for parameter in group
        if parameter._hp_mapping is not None  # it has a part in this rank's partition
    ]
    return _Master(tensor=master, pieces=tuple(pieces))


def _whole_master(master: Tensor, name: str) -> _Master:
    return _Master(tensor=master, pieces=(_Piece(name=name, start=0, position=0, num_elements=master.numel()),))


def _replicas(engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter, its float32 master) without ZeRO, where in float32 they are one."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        yield from ((parameter, parameter) for _, parameter in _named_parameters(engine))
        return
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(parameters, masters, strict=True)


def _is_partitioned(engine: Engine) -> bool:
    return any(
        hasattr(engine.optimizer, masters)
        for masters in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    )


def _written(engine: Engine, master: _Master) -> tuple[_Piece, ...]:
    """Return what this rank writes of a master: all that only it holds, an even share of what all hold."""
    if _is_partitioned(engine):
        return master.pieces
    (piece,) = master.pieces
    start = piece.num_elements * engine.global_rank // engine.world_size
    end = piece.num_elements * (engine.global_rank + 1) // engine.world_size
    if start == end:
        return ()
    return (_Piece(name=piece.name, start=start, position=start, num_elements=end - start),)


def _states(engine: Engine, master: _Master) -> dict[str, Tensor]:
    """Return a master and the optimiser's state of its elements by kind, flat."""
    state = engine.basic_optimizer.state.get(master.tensor, {})
    found = {WEIGHTS: master.tensor.detach().view(-1)}
    for kind, value in state.items():
        if kind != STEP and isinstance(value, Tensor) and value.numel() == master.tensor.numel():
            assert value.dtype == torch.float32, (kind, value.dtype)
            found[kind] = value.view(-1)
    return found


def _state_of_kind(engine: Engine, master: _Master, kind: str) -> Tensor:
    """Return the flat tensor of a kind to write into; the optimiser makes its state at the first step, we before it."""
    if kind == WEIGHTS:
        return master.tensor.detach().view(-1)
    state = engine.basic_optimizer.state[master.tensor]
    if kind not in state:
        state[kind] = torch.zeros_like(master.tensor, memory_format=torch.preserve_format, requires_grad=False)
    value: Tensor = state[kind]
    return value.view(-1)


def _steps(engine: Engine, master: _Master) -> int:
    return int(engine.basic_optimizer.state.get(master.tensor, {}).get(STEP, 0))


def _set_steps(engine: Engine, master: _Master, optimizer_steps: int) -> None:
    """Set the optimiser's count, a scalar where torch's AdamW keeps it: on the device if fused, else on the CPU."""
    group = engine.basic_optimizer.param_groups[0]
    is_on_device = group.get("fused") or group.get("capturable")
    device = master.tensor.device if is_on_device else torch.device("cpu")
    state = engine.basic_optimizer.state[master.tensor]
    state[STEP] = torch.tensor(float(optimizer_steps), dtype=torch.float32, device=device)


@torch.no_grad()
def _refresh_compute_weights(engine: Engine) -> None:
    """Make the weights that the engine computes with equal to the masters, cast; a collective under ZeRO."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()
        for sub_group_id in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group_id)
        if optimizer.persistent_parameters:  # small ones are kept whole: gathered again from the partitions
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for parameter, master in _replicas(engine):
            parameter.data.copy_(master.data)
