"""Models larger than a rank's memory: built without weights, then given values unit by unit and sharded at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from trilith.errors import TrilithError
from trilith.rng import stream_key
from trilith.topology import Topology
from trilith.zero.declared import Declared, give_to_all
from trilith.zero.sharded import ShardedModel

InitFunction = Callable[[nn.Module], object]
_FIX = (
    "Give its module a reset_parameters method, hand initialize an init_fn that sets what lies in a module, or build it "
    "with values"
)


@contextmanager
def empty_weights() -> Iterator[None]:
    """Modules built within it have parameters on the meta device, which take no memory; buffers have their values.

    `trilith.initialize` gives them values: see `materialise`.
    """

    def forget(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(forget)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def make_buffers(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Give buffers on the meta device storage, marked as without values, and return them by name.

    Raises TrilithError for one whose values could not be told from none.
    """
    made = {}
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            if buffer.dtype == torch.bool or buffer.is_complex():
                raise TrilithError(
                    f"buffer {name} is on the meta device. Build the model within trilith.empty_weights(): buffers keep "
                    "their values there"
                )
            path, _, leaf = name.rpartition(".")
            made[name] = torch.full(buffer.shape, _no_value(buffer.dtype), dtype=buffer.dtype, device=device)
            module.get_submodule(path)._buffers[leaf] = made[name]
    return made


def meta_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those on the meta device, by name.

    Raises TrilithError for one that is not floating point: it would be no part of a unit.
    """
    found = {name: parameter for name, parameter in module.named_parameters() if parameter.is_meta}
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise TrilithError(f"parameter {name} ({parameter.dtype}) is on the meta device. Build it with values")
    return found


class Initialiser:
    """Gives parameters that are on the meta device, and buffers that were, their values, one unit after the other."""

    def __init__(self, module: nn.Module, topology: Topology, seed: int, init_fn: InitFunction | None = None) -> None:
        """Before the module is sharded. Buffers get storage here."""
        self._module, self._topology, self._seed, self._init_fn = module, topology, seed, init_fn
        self._dtypes = {name: parameter.dtype for name, parameter in meta_parameters(module).items()}
        self._buffers = frozenset(make_buffers(module, topology.device))

    def run(self, declared: Declared, sharded: ShardedModel) -> None:
        """Initialise, home by home, and hand each value to its shards; storage for one home is all it takes besides.

        A module is initialised after its children by `init_fn`; without one by its `reset_parameters`, and then by the
        `_init_weights` of the module around it that has one (transformers). What lies around several units, and only
        there, is not called. Random values follow from the seed and the home's path, whatever the data degree.

        Raises TrilithError for a parameter or a buffer that is left without values.
        """
        homes = {name: declared.home_of(name) for name in self._dtypes}
        owners = {name.rpartition(".")[0] for name in self._buffers}
        wanted = dict.fromkeys([*homes.values(), *(declared.home_of(f"{path}.x".lstrip(".")) for path in owners)])
        for home in wanted:
            self._fill(home, declared, sharded, [name for name, its in homes.items() if its == home])

    def _fill(self, home: str, declared: Declared, sharded: ShardedModel, names: list[str]) -> None:
        """Initialise what belongs to one home, in storage of its own; `names` are the parameters that need values."""
        inside = {
            path: module
            for path, module in self._module.named_modules()
            if _lies_in(path, home) and declared.home_of(f"{path}.x".lstrip(".")) == home
        }
        needy = {name.rpartition(".")[0] for name in names} | {
            name.rpartition(".")[0] for name in self._buffers if name.rpartition(".")[0] in inside
        }
        called = [path for path in inside if any(_lies_in(owner, path) for owner in needy)]
        scratch = self._swap_in(inside)
        try:
            self._initialise([(path, inside[path]) for path in reversed(called)], home)
            values = self._module_values(names)
        finally:
            for module, leaf, parameter in scratch:
                module._parameters[leaf] = parameter
        for name, value in values.items():
            give_to_all(value, self._topology)
            sharded.assign(0, name, value)
        buffers = dict(self._module.named_buffers())
        for name in self._buffers & {f"{path}.{leaf}".lstrip(".") for path in inside for leaf in inside[path]._buffers}:
            _require_values(f"buffer {name}", buffers[name])
            give_to_all(buffers[name], self._topology)

    def _swap_in(self, inside: dict[str, nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter | None]]:
        """Give the modules parameters with storage, marked as without values; what they had, to be put back."""
        made: dict[int, nn.Parameter] = {}
        before: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        for path, module in inside.items():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                before.append((module, leaf, parameter))
                if id(parameter) not in made:
                    dtype = self._dtypes.get(f"{path}.{leaf}".lstrip("."), parameter.dtype)
                    fill = _no_value(dtype)
                    empty = torch.full(parameter.shape, fill, dtype=dtype, device=self._topology.device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[leaf] = made[id(parameter)]
        return before

    def _initialise(self, modules: list[tuple[str, nn.Module]], home: str) -> None:
        low, high = stream_key(self._seed, "unit", home)
        device = self._topology.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed((low | high << 32) >> 1)
            for path, module in modules:
                if self._init_fn is not None:
                    self._init_fn(module)
                    continue
                for name in ("reset_parameters", "_reset_parameters"):
                    if callable(getattr(module, name, None)):
                        getattr(module, name)()
                        break
                outer = self._around(path)
                if outer is not None:
                    outer._init_weights(module)  # type: ignore[operator]

    def _around(self, path: str) -> nn.Module | None:
        """The nearest module around `path`, or there, that initialises others."""
        parts = path.split(".") if path else []
        for count in range(len(parts), -1, -1):
            module = self._module.get_submodule(".".join(parts[:count]))
            if callable(getattr(module, "_init_weights", None)):
                return module
        return None

    def _module_values(self, names: list[str]) -> dict[str, Tensor]:
        values = {}
        for name in names:
            path, _, leaf = name.rpartition(".")
            parameter = self._module.get_submodule(path)._parameters[leaf]
            assert parameter is not None
            _require_values(f"parameter {name}", parameter)
            values[name] = parameter.detach()
        return values


def _lies_in(path: str, outer: str) -> bool:
    return outer in ("", path) or path.startswith(f"{outer}.")


def _no_value(dtype: torch.dtype) -> float | int:
    """What stands for no value."""
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _require_values(what: str, tensor: Tensor) -> None:
    lacks = tensor.isnan() if tensor.is_floating_point() else tensor == _no_value(tensor.dtype)
    if bool(lacks.any()):
        raise TrilithError(f"{what} was on the meta device and nothing has given it values. {_FIX}")
