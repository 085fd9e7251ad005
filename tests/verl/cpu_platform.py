"""verl on a CPU, by way of its own plugins: VERL_PLATFORM=cpu and this among its modules."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformCUDA):
    """What the engine asks of a device, answered by a CPU; collectives go through gloo."""

    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")

    @property
    def device_module(self) -> ModuleType:
        return torch.cpu

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def empty_cache(self) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"
