"""Any module as ZeRO wants it: its parameters declared, dealt to units, and brought to the device."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from trilith import comm
from trilith.config import Config
from trilith.errors import TrilithError
from trilith.models.base import LocalParameter
from trilith.models.layer_stage import is_lookup
from trilith.precision import DTYPES
from trilith.sharding import Piece, ShardSpec, contiguous_strides, whole
from trilith.topology import Topology

ROOT_UNIT = "root"
LISTS = (nn.ModuleList, nn.ModuleDict)  # never called themselves


class Declared:
    """Any module with its parameters declared: each whole on every rank, named as the module names it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._branches = branches_of(module)
        self.local_parameters = tuple(
            _local_parameter(name, parameter, self.home_of(name) or ROOT_UNIT)
            for name, parameter in module.named_parameters()
            if parameter.is_floating_point()
        )

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module.named_parameters`."""
        return self._module.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As `nn.Module.named_buffers`."""
        return self._module.named_buffers(prefix, recurse, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        """As `nn.Module.get_submodule`."""
        return self._module.get_submodule(target)

    def home_of(self, name: str) -> str:
        """The module that the unit of the parameter called `name` belongs to: see `branches_of`."""
        path: list[str] = []
        for part in name.split(".")[:-1]:
            if ".".join(path) not in self._branches:
                break
            path.append(part)
        # A list is never called itself: what lies in it directly belongs to the module that holds it.
        while path and isinstance(self._module.get_submodule(".".join(path)), LISTS):
            path.pop()
        return ".".join(path)

    def homes(self) -> None:
        """In which order they are called is not known before the first step."""
        return None

    def home(self, path: str) -> nn.Module:
        """The module at `path`."""
        return self._module.get_submodule(path)

    def blocks(self) -> dict[str, nn.Module]:
        """The modules of which there are several in a row, by path."""
        lists = [path for path in sorted(self._branches) if _is_list(self._module.get_submodule(path))]
        found = {
            f"{path}.{name}".lstrip("."): child
            for path in lists
            for name, child in self._module.get_submodule(path).named_children()
        }
        return {path: child for path, child in found.items() if path not in self._branches}

    def weightless_backwards(self) -> tuple[str, ...]:
        """Modules that only look up rows."""
        return tuple(name for name, module in self._module.named_modules() if is_lookup(module))


def branches_of(module: nn.Module) -> frozenset[str]:
    """The paths of modules whose children are units of their own: the model itself, and what holds lists of blocks.

    A block of a list is a unit, whatever it holds, unless it is a list itself.
    """
    found = {""}

    def walk(path: str, here: nn.Module) -> bool:
        is_list = _is_list(here)
        children = {f"{path}.{name}".lstrip("."): child for name, child in here.named_children()}
        inside = [walk(name, child) for name, child in children.items() if not is_list or isinstance(child, LISTS)]
        if is_list or any(inside):
            found.add(path)
            return True
        return False

    walk("", module)
    return frozenset(found)


def _is_list(module: nn.Module) -> bool:
    """Whether a module holds blocks: a list, or a Sequential in which some class that has parts comes twice."""
    if isinstance(module, nn.Sequential):
        kinds = [type(child) for child in module if next(child.children(), None) is not None]
        return len(set(kinds)) < len(kinds)
    return isinstance(module, LISTS)


def _local_parameter(name: str, parameter: nn.Parameter, unit: str) -> LocalParameter:
    shape = tuple(parameter.shape)
    spec = ShardSpec(name, shape, (Piece(whole(shape), 0, contiguous_strides(shape)),))
    # Norm weights and biases are vectors: decay is for matrices, unless a parameter group says otherwise.
    return LocalParameter(name, shape, (spec,), (), unit, len(shape) > 1, (), 0)


def place(module: nn.Module, config: Config, topology: Topology) -> None:
    """Bring the module to the device, its buffers to their dtype, and everything to the values of data rank 0.

    What is on the meta device stays there.
    """
    for parameter in module.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(topology.device)
    buffer_dtype = DTYPES[config.data_types.buffer_dtype]
    for name, buffer in list(module.named_buffers()):
        if not buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            dtype = buffer_dtype if buffer.is_floating_point() else buffer.dtype
            module.get_submodule(path)._buffers[leaf] = buffer.to(topology.device, dtype).contiguous()
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            give_to_all(tensor.detach(), topology)


def require_values(module: nn.Module) -> None:
    """Raises TrilithError where something is on the meta device."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise TrilithError(f"{name} is on the meta device and has no values: give the model its values first")


def give_to_all(tensor: Tensor, topology: Topology) -> None:
    """The values of data rank 0, on every data rank."""
    for group in (topology.replicate, topology.dp):
        comm.broadcast(tensor, 0, group)
