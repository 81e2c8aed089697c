"""Which ops of this project a piece of code calls."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CalledOps(TorchDispatchMode):
    """Names of the ops of this project that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tensorar":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
