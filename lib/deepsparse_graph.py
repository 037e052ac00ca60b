"""An exported ONNX graph as DeepSparse reads it: the same function in the operators that torch 1.x wrote for BERT.

DeepSparse 1.8 compiles what it recognises and hands the rest to another runtime, which cuts its graph into pieces. Of
the graph that today's exporter writes it recognises no LayerNormalization, no GELU whose half comes first, no mask
built with GatherND, and hardly anything of a graph that ends in Split. Written as here, it compiles all of a BERT.
"""

from pathlib import Path
from typing import Any

import numpy as np

IR_VERSION = 8  # of ONNX files: it reads none newer than 9
MASKED = -10_000.0  # added to the scores of padded positions; what torch 1.x's exports of BERT add
MASK = "attention_mask"


def readable(source: Path, target: Path) -> None:
    """Write the graph in ``source`` again, in an older file version and in the operators that DeepSparse compiles."""
    import onnx

    model = onnx.load(source)
    model.ir_version = IR_VERSION
    graph = _Graph(model.graph)
    graph.replace("LayerNormalization", _layer_norm)
    graph.replace("Erf", _gelu)
    graph.replace("Split", _columns)
    if any(given.name == MASK for given in model.graph.input):
        graph.replace("Where", _mask)
    graph.write()
    onnx.save(model, target)


class _Graph:
    """Nodes and constants of an ONNX graph while they are replaced."""

    def __init__(self, proto: Any) -> None:
        from onnx import numpy_helper

        self.proto = proto
        self.nodes: list[Any] = list(proto.node)
        self._scalars = {
            tensor.name: float(numpy_helper.to_array(tensor).reshape(()))
            for tensor in proto.initializer
            if int(np.prod(tensor.dims)) == 1
        }
        self._made: dict[str, np.ndarray] = {}

    def replace(self, kind: str, rewrite: Any) -> None:
        """Ask ``rewrite(self, node)`` for the nodes to stand where each node of ``kind`` stands; None leaves it."""
        for node in [node for node in self.nodes if node.op_type == kind]:
            instead = rewrite(self, node)
            if instead is not None:
                at = next(i for i, other in enumerate(self.nodes) if other is node)
                self.nodes[at : at + 1] = instead

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self._made[name] = np.array(value, dtype)
        return name

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one number; None for anything else."""
        return self._scalars.get(name)

    def only_user(self, node: Any, kind: str) -> Any | None:
        """The node that alone uses the only output of ``node``, if it is of ``kind``."""
        users = [other for other in self.nodes if node.output[0] in other.input]
        return users[0] if len(users) == 1 and users[0].op_type == kind else None

    def depends_on(self, name: str) -> set[str]:
        """The graph's inputs from which the tensor ``name`` is computed."""
        makers = {output: node for node in self.nodes for output in node.output}
        inputs, seen, left = {given.name for given in self.proto.input}, {name}, [name]
        while left:
            maker = makers.get(left.pop())
            for needed in () if maker is None else maker.input:
                if needed not in seen:
                    seen.add(needed)
                    left.append(needed)
        return seen & inputs

    def write(self) -> None:
        """Put the nodes that the outputs need, and the constants, back into the graph."""
        from onnx import numpy_helper

        needed, kept = {output.name for output in self.proto.output}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        del self.proto.node[:]
        self.proto.node.extend(reversed(kept))
        del self.proto.value_info[:]  # the shapes noted beside the replaced nodes
        constants = [tensor for tensor in self.proto.initializer if tensor.name in needed]
        del self.proto.initializer[:]
        self.proto.initializer.extend(constants)
        self.proto.initializer.extend(numpy_helper.from_array(value, name) for name, value in self._made.items())


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    from onnx.helper import make_node

    return make_node(kind, inputs, [output], **attributes)


def _layer_norm(graph: _Graph, node: Any) -> list[Any] | None:
    """Layer normalisation over the last axis of (batch, length, hidden), in single steps."""
    if len(node.input) != 3:
        return None
    given, scale, bias = node.input
    result = node.output[0]
    value = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
    epsilon = graph.constant(f"epsilon_{value:g}", value)
    axis, square = graph.constant("normalised_axis", [-1], np.int64), graph.constant("square", 2)
    steps = ("mean", "centred", "squares", "variance", "safe", "root", "unit", "scaled")
    mean, centred, squares, variance, safe, root, unit, scaled = (f"{result}_{step}" for step in steps)
    return [
        _node("ReduceMean", [given, axis], mean),
        _node("Sub", [given, mean], centred),
        _node("Pow", [centred, square], squares),
        _node("ReduceMean", [squares, axis], variance),
        _node("Add", [variance, epsilon], safe),
        _node("Sqrt", [safe], root),
        _node("Div", [centred, root], unit),
        _node("Mul", [unit, scale], scaled),
        _node("Add", [scaled, bias], result),
    ]


def _gelu(graph: _Graph, erf: Any) -> None:
    """Turn x · (½ · (1 + erf)) into (x · (1 + erf)) · ½, in place."""
    chain = [erf]
    for kind in ("Add", "Mul", "Mul"):
        user = graph.only_user(chain[-1], kind)
        if user is None:
            return
        chain.append(user)
    plus_one, halved, product = chain[1:]
    half = next((name for name in halved.input if graph.scalar(name) == 0.5), None)
    given = next((name for name in product.input if name != halved.output[0]), None)
    if half is not None and given is not None:
        halved.input[:] = [given, plus_one.output[0]]
        product.input[:] = [halved.output[0], half]


def _columns(graph: _Graph, split: Any) -> list[Any] | None:
    """Start and end logits taken out of (batch, length, 2) by index; the Squeeze after each Split output goes.

    The axis is 2 and not -1, which DeepSparse's compiler fails on.
    """
    users = [[node for node in graph.nodes if output in node.input] for output in split.output]
    last = any(attribute.name == "axis" and attribute.i in (-1, 2) for attribute in split.attribute)
    if not last or any(len(nodes) != 1 or nodes[0].op_type != "Squeeze" for nodes in users):
        return None
    squeezes = [nodes[0] for nodes in users]
    graph.nodes = [node for node in graph.nodes if not any(node is other for other in squeezes)]
    return [
        _node("Gather", [split.input[0], graph.constant(f"column_{i}", i, np.int64)], squeeze.output[0], axis=2)
        for i, squeeze in enumerate(squeezes)
    ]


def _mask(graph: _Graph, where: Any) -> list[Any] | None:
    """(1 - mask) · ``MASKED``, (batch, 1, 1, length), for the choice between zero and the least number there is."""
    condition, kept, dropped = where.input
    lowest = graph.scalar(dropped)
    if graph.scalar(kept) != 0 or lowest is None or lowest > MASKED or MASK not in graph.depends_on(condition):
        return None
    axes, one = graph.constant("mask_axes", [1, 2], np.int64), graph.constant("one", 1)
    result = where.output[0]
    per_row, number, padded = (f"{result}_{step}" for step in ("per_row", "number", "padded"))
    return [
        _node("Unsqueeze", [MASK, axes], per_row),
        _node("Cast", [per_row], number, to=1),
        _node("Sub", [one, number], padded),
        _node("Mul", [padded, graph.constant("masked", MASKED)], result),
    ]
