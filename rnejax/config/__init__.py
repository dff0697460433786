"""What a run is, as data: one YAML file, checked before anything is computed.

A configuration is a tree of typed sections (pydantic). Values come from the defaults, then from the file, then from
``--key value`` on the command line, with dots for nesting. Whatever is not a key, or not of its type, is a
:class:`ConfigError` that names the key, the value and the nearest valid key. No algorithm sees these objects: the runs
in :mod:`rnejax.runs` turn them into the arguments of the library's functions.
"""

from .reading import ConfigError, describe_keys, dump_config, find_config, load_config, parse_overrides, shipped_configs
from .sections import (
    ClassReward,
    DensityRun,
    Device,
    FunctionReward,
    Grid,
    Guide,
    InkReward,
    ModelRun,
    MoleculeComparison,
    MoleculeData,
    Plain,
    Product,
    ReferenceRun,
    Run,
    SampleRun,
    Section,
    SteerRun,
    Temper,
    TextData,
    Tilt,
    TrainRun,
)

__all__ = [
    "ClassReward",
    "ConfigError",
    "DensityRun",
    "Device",
    "FunctionReward",
    "Grid",
    "Guide",
    "InkReward",
    "ModelRun",
    "MoleculeComparison",
    "MoleculeData",
    "Plain",
    "Product",
    "ReferenceRun",
    "Run",
    "SampleRun",
    "Section",
    "SteerRun",
    "Temper",
    "TextData",
    "Tilt",
    "TrainRun",
    "describe_keys",
    "dump_config",
    "find_config",
    "load_config",
    "parse_overrides",
    "shipped_configs",
]
