"""`load_plan`: a plan out of its file, checked as a whole."""

from pathlib import Path
from typing import Any

from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.plain_data import from_plain
from attnres_fx.errors import ConfigError, PlanError
from attnres_fx.partition.costs.model_costs import DeviceSpeed, ModelCosts
from attnres_fx.partition.plan.consistency import check_consistency
from attnres_fx.partition.plan.fingerprint import ModelFingerprint
from attnres_fx.partition.plan.options import InputSpec, PlanOptions
from attnres_fx.partition.plan.plan import Plan
from attnres_fx.partition.plan.plan_file import read_content
from attnres_fx.partition.planner.objective import Partition
from attnres_fx.partition.split.routes import StageValue


def load_plan(path: str | Path) -> Plan:
    """Read what `Plan.save` wrote.

    Args:
        path: Of the file.

    Returns:
        The plan.

    Raises:
        PlanError: The file is cut short, edited or of another format, or its parts contradict each other.
    """
    content = read_content(path)
    try:
        return _plan_of(content)
    except PlanError:
        raise
    except Exception as error:  # whatever a part of this library says to what the file holds
        raise PlanError(f"{str(path)!r} was not written by Plan.save ({type(error).__name__}: {error}).") from error


def _plan_of(content: Any) -> Plan:
    kinds = {
        "model": ModelFingerprint,
        "options": PlanOptions,
        "device": DeviceSpeed,
        "costs": ModelCosts,
        "partition": Partition,
        "values": tuple[StageValue, ...],
        "inputs": tuple[InputSpec, ...],
        "notes": tuple[str, ...],
    }
    if not isinstance(content, dict) or content.keys() != {*kinds, "config"}:
        raise PlanError(f"the plan in the file must have the entries config, {', '.join(kinds)}, and no others.")
    try:
        config = AttnResConfig(**content["config"])
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"the plan's config cannot be read: {error}") from error
    plan = Plan(config=config, **{n: from_plain(k, content[n], f"plan.{n}", error=PlanError) for n, k in kinds.items()})
    check_consistency(plan)
    return plan
