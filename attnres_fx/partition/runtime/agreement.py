"""What all ranks of a pipeline must have alike, compared before it matters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from attnres_fx._version import __version__
from attnres_fx.errors import PipelineError
from attnres_fx.partition.plan.plan import Plan
from attnres_fx.partition.split.stages import Stages


def facts_of(stages: Stages, plan: Plan, **options: Any) -> dict[str, str]:
    """What a pipeline was built from, in words.

    Args:
        stages: Of this rank.
        plan: This rank's.
        **options: Of `build_pipeline`.

    Returns:
        By name: versions, the conversion, the plan as far as it decides what travels, and the options.
    """
    made_for = stages.made_for
    facts: dict[str, Any] = {"attnres_fx": __version__, "torch": torch.__version__}
    facts |= made_for.config.to_data() | {"blocks": [(b.stream, b.starts) for b in made_for.blocks]}
    facts |= {"schedule": str(plan.schedule), "num_microbatches": plan.num_microbatches}
    facts |= {"values that travel": ", ".join(f"{v.name} from {v.produced} to {v.used}" for v in stages.values)}
    return {name: str(value) for name, value in (facts | options).items()}


def facts_of_ranks(facts: Mapping[str, str], group: dist.ProcessGroup) -> list[Mapping[str, str]]:
    """The facts of all ranks of a group, in the order of the ranks; every one of them calls it.

    Args:
        facts: This rank's, in words by name.
        group: The ranks.
    """
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, dict(facts), group=group)
    return gathered


def require_same(gathered: Sequence[Mapping[str, str]], advice: str) -> None:
    """Refuse, on every rank alike, ranks that differ.

    Args:
        gathered: The facts of each.
        advice: What to do where they differ.

    Raises:
        PipelineError: Some of the facts differ; it names up to three of them.
    """
    names = dict.fromkeys(name for facts in gathered for name in facts)
    differ = [n for n in names if len({facts.get(n, "") for facts in gathered}) > 1]
    if differ:
        raise PipelineError(f"the ranks differ in {'; '.join(_said(n, gathered) for n in differ[:3])}. {advice}")


def _said(name: str, gathered: Sequence[Mapping[str, str]]) -> str:
    """A difference: rank 0 and the first rank that has another value."""
    first = gathered[0].get(name, "nothing")
    rank = next(i for i, each in enumerate(gathered) if each.get(name, "nothing") != first)
    return f"{name} (rank 0: {first:.80}, rank {rank}: {gathered[rank].get(name, 'nothing'):.80})"
