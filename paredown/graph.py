"""A network that anyone wrote, as a graph of ATen operators and its tensors: what can be cut is read off the
operators, and what is left is written down again without the code that it came from.

The graph is a `torch.fx.GraphModule`. Its tensors keep the names of the network's state dict; every operator's
arguments are spelled out in the order of its schema; `node.meta["shape"]` is the shape that the example gave.
"""

from __future__ import annotations

import copy
import hashlib
import operator
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from paredown.errors import UnsupportedModel
from paredown.types import canonical_json

_TENSOR = re.compile(r"[\w-]+(\.[\w-]+)*")  # its name: "layers.0.conv1.weight"
_KINDS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_PLAIN: dict[str, Any] = {"getitem": operator.getitem, "add": operator.add, "sub": operator.sub, "mul": operator.mul}
_PLAIN |= {"floordiv": operator.floordiv, "neg": operator.neg, "truediv": operator.truediv}
_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
NORMS = {"batch_norm": 5, "instance_norm": 5, "dropout": 2, "dropout_": 2}  # where an operator is told that it trains


def trace(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """The network in eval mode, with a free batch size; its tensors are the module's own, nothing is copied.

    `example` [B, ...] is one input, with B of 2 or more. Raises UnsupportedModel with torch's reason where neither
    torch.export nor torch.fx can follow the code, and where it has operators that are not of ATen.
    """
    if isinstance(module, fx.GraphModule) and all("shape" in node.meta for node in module.graph.nodes):
        return module
    if not isinstance(module, nn.Module):
        raise UnsupportedModel(f"a torch.nn.Module is wanted, and a {type(module).__name__} is given")
    training = [one for one in module.modules() if one.training]
    try:
        program = _exported(module.eval(), example)
    finally:
        for one in training:  # not all at once: some may have been in eval mode
            one.training = True
    return _graph_of(program, module)


def _exported(module: nn.Module, example: Tensor) -> ExportedProgram:
    def export(one: nn.Module, strict: bool) -> ExportedProgram:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(one, (example,), dynamic_shapes=({0: Dim("batch")},), strict=strict)

    ways: Sequence[Callable[[], ExportedProgram]] = (
        lambda: export(module, False),
        lambda: export(module, True),
        lambda: export(fx.symbolic_trace(module), False),
    )
    reasons = []
    for way in ways:
        try:
            return way()
        except Exception as error:  # whatever the user's code or the tracer raises: the reason is shown below
            reasons.append(" ".join(str(error).split())[:300])
    raise UnsupportedModel(f"{type(module).__name__} cannot be traced: {reasons[0]}")


def _graph_of(program: ExportedProgram, module: nn.Module) -> fx.GraphModule:
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    tensors |= {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    states = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in _STATE:
            states[spec.arg.name] = cast(str, spec.target)
    mutated = set(program.graph_signature.buffers_to_mutate.values())
    if mutated:
        raise UnsupportedModel(f"the network changes its own tensor {sorted(mutated)[0]!r} while it runs")
    graph, seen, used = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Tensor]()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in states:
            name = states[node.name]
            if not node.users:
                continue
            if name not in tensors:
                raise UnsupportedModel(f"the network has a tensor {name!r} that is in none of its modules")
            used[name] = tensors[name]
            seen[node] = graph.get_attr(name)
        elif node.op == "call_function" and _is_check(node):
            continue
        elif node.op == "output":
            answers = node.args[0]
            if len(answers) != 1 or not isinstance(answers[0], fx.Node):
                raise UnsupportedModel(f"the network gives {len(answers)} outputs; one tensor is supported")
            seen[node] = graph.output(seen[answers[0]])
        else:
            seen[node] = graph.node_copy(node, lambda n: seen[n])
            if node.op == "call_function":
                _spell_out(seen[node])
        seen[node].meta = {"shape": _shape(node.meta.get("val"))}
        _with_sizes(seen[node])
    return fx.GraphModule(used, graph, type(module).__name__).eval()


def _is_check(node: fx.Node) -> bool:
    """Whether a node only asserts something about shapes."""
    return "assert" in str(node.target) or "sym_constrain" in str(node.target)


def _spell_out(node: fx.Node) -> None:
    """All arguments in the order of the schema, with its defaults; those that have no place there stay named."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    if node.target.namespace != "aten":
        raise UnsupportedModel(f"the network has the operator {node.target}, which is none of ATen's")
    args, kwargs = list(node.args), dict(node.kwargs)
    for argument in node.target._schema.arguments[len(args) :]:
        if not argument.kwarg_only:
            args.append(kwargs.pop(argument.name, argument.default_value))
    node.args, node.kwargs = tuple(args), kwargs


def _with_sizes(node: fx.Node) -> None:
    """A chunk or a split into equal parts becomes one into parts of stated sizes, and a slice counts from the
    front what it counted from the end, except along the batch.
    """
    name = operator_of(node) if node.op == "call_function" else ""
    if name in ("chunk", "split") and node.args[2] != 0:
        sizes = [shape[cast(int, node.args[2])] for shape in node.meta["shape"]]
        node.target, node.args = torch.ops.aten.split_with_sizes.default, (node.args[0], sizes, node.args[2])
    if name == "slice" and node.args[1] != 0:
        x, dim, *bounds, step = cast(tuple[Any, ...], node.args)
        size = x.meta["shape"][dim]
        node.args = (x, dim, *(b + size if isinstance(b, int) and b < 0 else b for b in bounds), step)


def _shape(value: Any) -> Any:
    """Of tensors, sizes as numbers; of lists of tensors, a list of them; None of anything else."""
    if isinstance(value, Tensor):
        return tuple(int(size.node.hint) if isinstance(size, torch.SymInt) else int(size) for size in value.shape)
    if isinstance(value, list | tuple):
        return tuple(_shape(one) for one in value)
    return None


def measure_shapes(model: fx.GraphModule) -> None:
    """Writes the shapes of all values anew, after the network's tensors or sizes have changed; nothing is computed."""

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            n.meta = {"shape": _shape(value)}
            return value

    inputs = [node.meta["shape"] for node in model.graph.nodes if node.op == "placeholder"]
    first = next(model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        Shapes(model).run(*(torch.empty(shape, dtype=first.dtype, device=first.device) for shape in inputs))


def fingerprint(model: fx.GraphModule) -> str:
    """sha256 of the operators with their arguments, and of the names and shapes of the tensors."""
    nodes = [{key: value for key, value in node.items() if key != "shape"} for node in to_json(model)]
    tensors = sorted((name, list(tensor.shape)) for name, tensor in model.state_dict().items())
    return hashlib.sha256(canonical_json([nodes, tensors]).encode()).hexdigest()


def operator_of(node: fx.Node) -> str:
    """The name of what a node does: "conv2d", "add" (also in place), "getitem"."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.removeprefix("aten::")).removesuffix("_")
    return str(getattr(node.target, "__name__", node.target))


def copied(model: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares nothing."""
    return copy.deepcopy(model)


def run_seeing(
    model: fx.GraphModule,
    x: Tensor,
    names: Collection[str],
    before: Callable[[str, Tensor], Tensor] | None = None,
    after: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """The network's answer; of the nodes named, `before(name, its first input)` gives what they read instead, and
    `after(name, its value)` sees what they make.
    """

    class Seeing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.name not in names:
                return super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if before:
                args = (before(n.name, args[0]), *args[1:])
            value = self.call_function(n.target, args, kwargs)
            if after:
                after(n.name, value)
            return value

    return cast(Tensor, Seeing(model).run(x))


def tensor_of(model: fx.GraphModule, node: Any) -> Tensor:
    """The parameter or buffer that a node stands for."""
    name = str(node.target)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors[name] if name in tensors else model.get_buffer(name)


def writes_over(node: fx.Node) -> bool:
    """Whether an operator changes what it reads, as relu_ does."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def in_training(model: fx.GraphModule) -> fx.GraphModule:
    """The same network, of the same tensors, whose batch norm takes its statistics from the batch and learns them, and
    whose dropout drops.
    """
    graph = copy.deepcopy(model.graph)
    for node in graph.nodes:
        place = NORMS.get(operator_of(node)) if node.op == "call_function" else None
        if place is not None and node.args[place] is False:
            node.update_arg(place, True)
    return fx.GraphModule(model, graph, "Training")


# ---------------------------------------------------------------------------------------------------- written and read


def to_json(model: fx.GraphModule) -> list[dict[str, Any]]:
    """The graph without its tensors, as plain JSON types: a node each, in order."""
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _name(node),
            "args": [_written(one) for one in node.args],
            "kwargs": {name: _written(one) for name, one in node.kwargs.items()},
            "shape": node.meta["shape"],
        }
        for node in model.graph.nodes
    ]


def from_json(nodes: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The network again, with these tensors under its names; parameters where they are parameters.

    Only operators of ATen and arithmetic on sizes are called. Raises UnsupportedModel for anything else, and for names
    that would not stay names in the Python that torch.fx makes of a graph.
    """
    graph, seen, used = fx.Graph(), dict[str, fx.Node](), dict[str, Tensor]()
    for one in nodes:
        _check_names(one)
        kind, name = one["op"], one["name"]
        args = tuple(_read(value, seen) for value in one["args"])
        kwargs = {key: _read(value, seen) for key, value in one["kwargs"].items()}
        if kind not in ("placeholder", "get_attr", "call_function", "output"):
            raise UnsupportedModel(f"a graph holds no node of the kind {kind!r}")
        if kind == "get_attr":
            if one["target"] not in tensors:
                raise UnsupportedModel(f"the graph reads {one['target']!r}, which is not among its tensors")
            used[one["target"]] = tensors[one["target"]]
        target = _function(one["target"]) if kind == "call_function" else one["target"]
        seen[name] = graph.create_node(kind, target, args, kwargs, name)
        seen[name].meta = {"shape": _tuples(one["shape"])}
    graph.lint()
    return fx.GraphModule(used, graph, "Network").eval()


def _check_names(node: Mapping[str, Any]) -> None:
    target, strange = str(node["target"]), [name for name in node["kwargs"] if not name.isidentifier()]
    if node["op"] == "get_attr" and not _TENSOR.fullmatch(target):
        strange.append(target)
    if node["op"] == "placeholder" and not target.isidentifier():
        strange.append(target)
    if strange:
        raise UnsupportedModel(f"{strange[0]!r} is no name that a graph may hold")


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if node.op != "call_function":
        return str(node.target)
    for name, function in _PLAIN.items():
        if node.target is function:
            return name
    raise UnsupportedModel(f"the network has the function {node.target}, which cannot be written down")


def _function(name: str) -> Any:
    if name in _PLAIN:
        return _PLAIN[name]
    space, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    if space != "aten" or not packet or not hasattr(torch.ops.aten, packet):
        raise UnsupportedModel(f"{name!r} is no operator of ATen")
    found = getattr(torch.ops.aten, packet)
    if overload not in found.overloads():
        raise UnsupportedModel(f"{name!r} is no operator of ATen")
    return getattr(found, overload)


def _written(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_written(one) for one in value]
    if isinstance(value, _KINDS):
        return {"torch": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedModel(f"an operator's argument {value!r} cannot be written down")


def _read(value: Any, seen: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(one, seen) for one in value]
    if not isinstance(value, Mapping):
        return value
    if "node" in value:
        if value["node"] not in seen:
            raise UnsupportedModel(f"the graph reads {value['node']!r} before it is made")
        return seen[value["node"]]
    found = getattr(torch, str(value.get("torch")), None)
    return found if isinstance(found, _KINDS) else torch.device(value["torch"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
