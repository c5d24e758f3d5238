"""`AttnResConfig`: what it accepts, and that each refusal names the option."""

from dataclasses import FrozenInstanceError, replace

import pytest

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import AttnResError, ConfigError

REFUSED = [
    ({"variant": "dense"}, r"variant must be one of full, block, local; it is 'dense'"),
    ({"variant": "Block"}, "variant"),
    ({"variant": ""}, "variant"),
    ({"variant": None}, "variant"),
    ({"output": "max"}, r"output must be one of sum, mean; it is 'max'"),
    ({"output": None}, "output"),
    ({"num_blocks": 0}, "num_blocks.*at least 1; it is 0"),
    ({"num_blocks": -3}, "num_blocks.*it is -3"),
    ({"num_blocks": 2.0}, r"num_blocks.*it is 2\.0"),
    ({"num_blocks": "4"}, "num_blocks.*it is '4'"),
    ({"num_blocks": True}, "num_blocks.*it is True"),
    ({"block_size": 0}, "block_size.*at least 1; it is 0"),
    ({"block_size": -1}, "block_size.*it is -1"),
    ({"block_size": 1.5}, r"block_size.*it is 1\.5"),
    ({"block_size": False}, "block_size.*it is False"),
    ({"boundaries": (0, 4)}, r"boundaries.*at least 1.*\(0, 4\)"),
    ({"boundaries": (-2, 4)}, r"boundaries.*\(-2, 4\)"),
    ({"boundaries": (4, 2)}, r"boundaries must rise.*\(4, 2\)"),
    ({"boundaries": (2, 2)}, r"boundaries must rise.*\(2, 2\)"),
    ({"boundaries": (2.0, 4.0)}, "boundaries must be sublayer indices"),
    ({"boundaries": (True, 4)}, "boundaries must be sublayer indices"),
    ({"boundaries": "24"}, "boundaries.*sublayer indices; it is '24'"),
    ({"boundaries": {2, 4}}, "boundaries"),
    ({"boundaries": 4}, "boundaries.*sublayer indices; it is 4"),
    ({"num_blocks": 4, "block_size": 2}, "num_blocks and block_size.*give one of them"),
    ({"num_blocks": 4, "boundaries": (2,)}, "num_blocks and boundaries"),
    ({"block_size": 4, "boundaries": (2,)}, "block_size and boundaries"),
    ({"num_blocks": 4, "block_size": 2, "boundaries": (2,)}, "num_blocks and block_size and boundaries"),
    ({"variant": "full", "num_blocks": 4}, "variant='full'.*num_blocks"),
    ({"variant": "full", "block_size": 4}, "variant='full'.*block_size"),
    ({"variant": "full", "boundaries": (4,)}, "variant='full'.*boundaries"),
    ({"eps": -1e-6}, "eps.*not negative; it is -1e-06"),
    ({"eps": float("nan")}, "eps.*nan"),
    ({"eps": float("inf")}, "eps.*inf"),
    ({"eps": None}, "eps.*None"),
    ({"eps": "1e-6"}, "eps.*'1e-6'"),
    ({"eps": True}, "eps.*True"),
    ({"streams": None}, "streams"),
    ({"streams": ()}, "streams"),
    ({"streams": ("main", 3)}, "streams"),
    ({"query": "dynamic"}, "query must be one of static, input; it is 'dynamic'"),
    ({"weights": "relu"}, "weights must be one of softmax, sigmoid, static; it is 'relu'"),
    ({"heads": 0}, "heads.*at least 1; it is 0"),
    ({"heads": None}, "heads.*it is None"),
    ({"heads": 2.0}, r"heads.*it is 2\.0"),
    ({"source_bias": 1}, "source_bias must be True or False; it is 1"),
    ({"value_norm": None, "output": "mean"}, "value_norm.*it is None"),
    ({"key_norm": "no"}, "key_norm.*it is 'no'"),
    ({"window_keeps_root": 0, "window": 2, "output": "mean"}, "window_keeps_root.*it is 0"),
    ({"scale": 0.0}, r"scale.*above 0; it is 0\.0"),
    ({"scale": -1}, "scale.*it is -1"),
    ({"scale": float("nan")}, "scale.*nan"),
    ({"scale": True}, "scale.*True"),
    ({"window": 0}, "window.*at least 1; it is 0"),
    ({"window": True}, "window.*it is True"),
    *(
        ({"weights": "static", **option}, f"weights='static'.*{next(iter(option))}=.* means nothing")
        for option in ({"query": "input"}, {"heads": 2}, {"source_bias": True}, {"key_norm": False}, {"scale": 2.0})
    ),
    ({"window_keeps_root": False}, "window_keeps_root=False means nothing without a window"),
    ({"variant": "local", "window": 4, "output": "mean"}, "variant='local'.*is a window already"),
    ({"window": 1, "window_keeps_root": False, "output": "mean"}, "leaves one source to a read"),
    ({"window": 8}, "window=8.*leaves out older terms.*output='sum' cannot start.*choose output='mean'"),
    ({"value_norm": True}, "value_norm=True.*output='sum' cannot start as the original"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_a_value_that_means_nothing_is_refused_by_the_name_of_its_option(options, message):
    with pytest.raises(ConfigError, match=message):
        AttnResConfig(**options)


def test_config_errors_are_the_librarys_and_value_errors():
    with pytest.raises(AttnResError):
        AttnResConfig(num_blocks=0)
    with pytest.raises(ValueError):
        AttnResConfig(num_blocks=0)


def test_defaults_are_block_sum_and_main():
    config = AttnResConfig()
    assert (config.variant, config.output, config.eps, config.streams) == ("block", "sum", 1e-6, "main")
    assert (config.num_blocks, config.block_size, config.boundaries) == (None, None, None)


@pytest.mark.parametrize("variant", ["block", "local"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_blocks": 1}, {"block_size": 1}, {"boundaries": ()}, {"boundaries": (1, 2, 9)}],
    ids=str,
)
def test_each_way_to_give_blocks_is_accepted_alone(variant, options):
    config = AttnResConfig(variant=variant, **options)
    assert all(getattr(config, name) == value for name, value in options.items())


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        AttnResConfig("block")


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="blocks"):
        AttnResConfig(blocks=4)


@pytest.mark.parametrize("name", ["variant", "num_blocks", "boundaries", "eps", "streams"])
def test_a_config_cannot_be_changed(name):
    config = AttnResConfig()
    with pytest.raises(FrozenInstanceError):
        setattr(config, name, getattr(config, name))


def test_a_changed_copy_is_checked_again():
    config = AttnResConfig(num_blocks=4)
    assert replace(config, num_blocks=None, block_size=2).block_size == 2
    with pytest.raises(ConfigError, match="num_blocks and block_size"):
        replace(config, block_size=2)


def test_equal_configs_are_equal_and_hash_alike_whatever_sequences_they_were_given():
    lists = AttnResConfig(boundaries=[2, 4], streams=["encoder", "decoder"], eps=0)
    tuples = AttnResConfig(boundaries=(2, 4), streams=("encoder", "decoder"), eps=0.0)
    assert lists == tuples and hash(lists) == hash(tuples)
    assert lists != AttnResConfig(boundaries=(2, 5), streams=("encoder", "decoder"), eps=0.0)


def test_changing_the_list_given_as_boundaries_does_not_change_the_config():
    given = [2, 4]
    config = AttnResConfig(boundaries=given)
    given.append(3)
    assert config.boundaries == (2, 4)
