"""Where to cut a model into blocks and pipeline stages, what that costs, and the stages themselves."""

from attnres_fx.partition.costs.model_costs import CarriedValue, DeviceSpeed, ModelCosts, StreamCost, SublayerCost

__all__ = ["CarriedValue", "DeviceSpeed", "ModelCosts", "StreamCost", "SublayerCost"]
