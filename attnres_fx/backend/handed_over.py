"""What a graph of an attached model hands over: its description, its queries, and which modules are the model's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from attnres_fx.backend.attached_class import HELD, registered_models
from attnres_fx.backend.attachment import ATTRIBUTE, Attachment, ReadKey
from attnres_fx.config import RewriteConfig
from attnres_fx.errors import BackendError
from attnres_fx.ops.marker import PARAMETERS
from attnres_fx.passes.graph.module_paths import ModulePaths, Steps, path_steps, paths_by_id


@dataclass(frozen=True)
class HandedOver:
    """What the calls of attached modules in one graph hand over. A model's call holds those of its parts.

    Attributes:
        about: Description of the outermost of them, as text.
        config: What the model was attached with.
        weights: The tensors of each read, by their names.
        homes: For each stream the path of the innermost module whose call runs all of it.
        calls: The nodes that hand over; they are to be erased.
    """

    about: str
    config: RewriteConfig
    weights: Mapping[ReadKey, Mapping[str, Node]]
    homes: Mapping[str, str]
    calls: tuple[Node, ...]


def handed_over(gm: GraphModule) -> HandedOver:
    """What a graph hands over.

    Raises:
        BackendError: Two attached models do so, or one holds other tensors than its description says.
    """
    calls = tuple(n for n in gm.graph.nodes if n.target is PARAMETERS)
    about = str(calls[0].args[1])
    first = Attachment.from_text(about)
    weights: dict[ReadKey, Mapping[str, Node]] = {}
    for call in calls:
        attachment = Attachment.from_text(str(call.args[1]))
        tensors: Sequence[Node] = call.args[0]  # type: ignore[assignment]
        for key, held in _weights(attachment, tensors):
            same = attachment.config == first.config and attachment.homes == first.homes
            if not same or weights.setdefault(key, held) != held:
                raise BackendError(
                    "two attached models are in one compiled graph: compile each of them in place "
                    "(attnres_fx.compile), and leave what calls them uncompiled."
                )
    return HandedOver(about, first.config, weights, dict(first.homes), calls)


def _weights(attachment: Attachment, tensors: Sequence[Node]) -> Iterator[tuple[ReadKey, Mapping[str, Node]]]:
    if len(tensors) != sum(map(len, attachment.tensors)):
        reads = len(attachment.reads)
        raise BackendError(f"model.attnres holds {len(tensors)} tensors for {reads} reads: attach the model anew.")
    nodes = iter(tensors)
    for key, names in zip(attachment.reads, attachment.tensors, strict=True):
        yield key, {name: next(nodes) for name in names}


def module_paths(calls: Sequence[Node]) -> ModulePaths:
    """The paths of the modules of the model whose calls these are.

    Dynamo keys the modules of a node by their ids, and the attached models are known: so a module is recognised
    however the call came to it. For what a model does not register, the path is what Dynamo writes behind the model.
    """
    by_id: dict[str, str] = {}
    roots: list[tuple[Steps, str]] = []
    for call in calls:
        about = str(call.args[1])
        for model in registered_models():
            attached, path = model.__dict__.get(HELD, (None, None))
            if path == "" and about in attached.abouts.values():
                by_id |= paths_by_id(model)
        root = _root(call, Attachment.from_text(about).part)
        roots += [root] if root is not None and root not in roots else []
    return ModulePaths(by_id, tuple(roots))


def _root(call: Node, part: str) -> tuple[Steps, str] | None:
    """How Dynamo writes the module that hands over, from where its first query comes; and its path in the model."""
    tensors: Sequence[Node] = call.args[0]  # type: ignore[assignment]
    source = getattr(tensors[0], "_dynamo_source", None) if tensors else None
    if source is None:
        return None
    steps = path_steps(str(source.name() if callable(source.name) else source.name))
    for i, step in enumerate(steps):
        if step == HELD:
            return steps[:i], part
        if step == ATTRIBUTE and steps[i + 1 : i + 2] == ("reads",):
            return steps[:i], ""
    return None


def is_outside(node: Node, calls: Sequence[Node]) -> bool:
    """Whether a node was made by code outside of the attached model, which a larger compiled function calls."""
    inside_a_call = any(c.meta.get("nn_module_stack") for c in calls)
    return inside_a_call and not node.meta.get("nn_module_stack")


def runs_module(gm: GraphModule, path: str) -> bool:
    """Whether some node of a graph was made in a call of the module at a path."""
    return any(
        path == where or where.startswith(f"{path}.")
        for node in gm.graph.nodes
        for where, _ in (node.meta.get("nn_module_stack") or {}).values()
    )
