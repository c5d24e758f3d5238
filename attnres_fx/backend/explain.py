"""`explain`: what the backend has done for a model."""

from dataclasses import dataclass, field

from torch import nn

from attnres_fx.backend.attachment import require_attached, unwrapped
from attnres_fx.backend.compile_log import CompiledGraph
from attnres_fx.config import RewriteConfig
from attnres_fx.report_page import ReportPage, Shown
from attnres_fx.shown import counted

__all__ = ["Explanation", "explain"]


@dataclass(repr=False)
class Explanation(Shown):
    """Report of what the backend has done for a model so far; `print` it.

    Attributes:
        model: The name of its class.
        config: What it was attached with.
        reads: The names of its reads, in execution order.
        graphs: Graphs compiled for it.
    """

    model: str
    config: RewriteConfig
    reads: tuple[str, ...]
    graphs: list[CompiledGraph] = field(default_factory=list)

    def _page(self) -> ReportPage:
        head = (
            f"{self.model}: attached, {self.config.summary}, "
            f"{counted(len(self.reads), 'read')}, {counted(len(self.graphs), 'graph')} compiled"
        )
        rows = [
            {
                "graph": i,
                "mode": g.mode or "either",
                "grad": "on" if g.grad else "off",
                "inputs": " ".join(g.inputs),
                "reads": g.reads,
                "inner": g.inner,
                "kernels": g.kernels,
                "passes": "; ".join(g.changed),
            }
            for i, g in enumerate(self.graphs)
        ]
        return ReportPage((head,), rows, wrapped=("inputs", "kernels", "passes"))


def explain(model: nn.Module) -> Explanation:
    """What the backend has done for an attached model: graphs, reads, passes, kernels.

    Models that are attached alike share their graphs, and so what is reported of them. A graph that Dynamo compiled
    for a model that no longer exists, and uses again for this one, is not listed.

    Args:
        model: An attached model, or what `torch.compile` returned for one.

    Returns:
        A report, empty of graphs before the first call of the model.

    Raises:
        AttachError: The model is not attached.
    """
    attached = require_attached(model)
    name = type(unwrapped(model)).__name__
    return Explanation(name, attached.config, attached.reads.names, attached.graphs)
