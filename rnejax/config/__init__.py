"""What a run is, as data: one YAML file, checked before anything is computed.

A configuration is a tree of typed sections (pydantic). Values come from the defaults, then from the file, then from
``--key value`` on the command line, with dots for nesting. Whatever is not a key, or not of its type, is a
`ConfigError` that names the key, the value and the nearest valid key. No algorithm sees these objects: the runs
in `rnejax.runs` turn them into the arguments of the library's functions.
"""

from .basics import Device, Grid, ModelRun, Run, Section
from .finetuning import EachClassReward, FinetuneRun, Infilling, Modes, Policy, Pretrained
from .molecules import MoleculeComparison
from .reading import ConfigError, describe_keys, dump_config, find_config, load_config, parse_overrides, shipped_configs
from .regimes import MixtureStudy, ModelStudy, RegimesRun, TrainedStudy
from .sections import DensityRun, ReferenceRun, SampleRun, SteerRun
from .targets import (
    ClassReward,
    FunctionReward,
    Guide,
    InkReward,
    LengthReward,
    Plain,
    Product,
    PromptReward,
    Temper,
    Tilt,
    TopicReward,
    WordReward,
)
from .training import MoleculeData, TextData, TrainRun

__all__ = [
    "ClassReward",
    "ConfigError",
    "DensityRun",
    "Device",
    "EachClassReward",
    "FinetuneRun",
    "FunctionReward",
    "Grid",
    "Guide",
    "Infilling",
    "InkReward",
    "LengthReward",
    "MixtureStudy",
    "ModelRun",
    "ModelStudy",
    "Modes",
    "MoleculeComparison",
    "MoleculeData",
    "Plain",
    "Policy",
    "Pretrained",
    "Product",
    "PromptReward",
    "ReferenceRun",
    "RegimesRun",
    "Run",
    "SampleRun",
    "Section",
    "SteerRun",
    "Temper",
    "TextData",
    "Tilt",
    "TopicReward",
    "TrainRun",
    "TrainedStudy",
    "WordReward",
    "describe_keys",
    "dump_config",
    "find_config",
    "load_config",
    "parse_overrides",
    "shipped_configs",
]
