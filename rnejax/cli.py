"""The command line: ``rnejax {train,sample,density,steer,finetune,reference,regimes} CONFIG.yaml [--key value ...]``.

Exit status: 0 done; 1 the run failed; 2 the configuration cannot be run; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .config import Run
    from .runs import RunFolder
    from .runs.folder import Output

COMMANDS = {
    "train": ("TrainRun", "train a diffusion model"),
    "sample": ("SampleRun", "draw samples, with their log-densities"),
    "density": ("DensityRun", "estimate log-densities of given points"),
    "steer": ("SteerRun", "sample a target that is not the model's own law"),
    "finetune": ("FinetuneRun", "fine-tune a model into its own posterior under a reward"),
    "regimes": ("RegimesRun", "find out when samples commit to a class, and when to a training point"),
    "reference": ("ReferenceRun", "sample a molecular system by parallel tempering, to compare with"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 2
    if {"-h", "--help"} & set(given.overrides):
        parser.parse_args([given.command, "--help"])

    # After parsing, so that --help needs none of it.
    from .config import ConfigError, load_config
    from .control import RewardError
    from .runs.build import apply_device
    from .runs.folder import Output

    output: Output | None = None
    try:
        config = load_config(_config_class(given.command), given.config, given.overrides)
        apply_device(config.device)
        output = Output(Path(config.output or f"outputs/{Path(given.config).stem}"), given.command, config)
        signal.signal(signal.SIGTERM, _interrupt)
        importlib.import_module(f"rnejax.runs.{given.command}").run(config, output)
    except ConfigError as error:
        print(f"rnejax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return _say_interrupted(_opened(output), str(error))
    except (FloatingPointError, RewardError) as error:  # NaN in a network, a reward or a loss; SMCError is one of these
        return _say_failed(_opened(output), error)
    except Exception as error:  # a mistake of ours, told with its traceback
        _say_failed(_opened(output), error)
        raise
    folder = output.folder
    assert folder is not None, "a run opens its folder"
    folder.finish()
    print(f"Finished. Everything is in {folder.path.resolve()}")
    for picture in folder.pictures:
        print(f"  picture: {picture}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser; ``rnejax COMMAND --help`` lists every key that the command's configuration may have."""
    parser = argparse.ArgumentParser(
        prog="rnejax", description="Density estimation and inference-time control for diffusion models."
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    for name, (_, purpose) in COMMANDS.items():
        command = commands.add_parser(
            name, help=purpose, add_help=False, usage=f"rnejax {name} CONFIG.yaml [--key value ...]"
        )
        command.add_argument("-h", "--help", action=_Keys, command=name)
        command.add_argument("config", help="a YAML file, or the name of a shipped one")
        command.add_argument("overrides", nargs=argparse.REMAINDER, help="--key value, with dots for nesting")
    return parser


class _Version(argparse.Action):
    def __init__(self, **options: Any):
        super().__init__(nargs=0, help="the version, and stop", **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from . import __version__

        print(f"rnejax {__version__}")
        parser.exit()


class _Keys(argparse.Action):
    """Help that is made when it is asked for: it needs pydantic, which is slow to import."""

    def __init__(self, command: str, **options: Any):
        super().__init__(nargs=0, help="the keys of the configuration, and stop", **options)
        self.command = command

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from .config import describe_keys, shipped_configs

        lines = [f"usage: rnejax {self.command} CONFIG.yaml [--key value ...]", "", COMMANDS[self.command][1] + ".", ""]
        lines += [f"Shipped configurations: {', '.join(shipped_configs())}", "", "Keys:"]
        for key, kind, meaning in describe_keys(_config_class(self.command)):
            if not kind:
                lines.append(f"  {key}: {meaning}" if ":" not in key else f"  ({key}) {meaning}")
            else:
                lines += [f"  --{key}  [{kind}]"] + ([f"      {meaning}"] if meaning else [])
        print("\n".join(lines))
        parser.exit()


def _config_class(command: str) -> type[Run]:
    from . import config

    return getattr(config, COMMANDS[command][0])


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt("terminated")


def _opened(output: Output | None) -> RunFolder | None:
    return None if output is None else output.folder


def _say_interrupted(folder: RunFolder | None, reason: str) -> int:
    if folder is None:
        print("rnejax: interrupted before anything was computed", file=sys.stderr)
    else:
        folder.record(interrupted=True)
        print(f"rnejax: {reason or 'interrupted'}; {_what_is_there(folder)}", file=sys.stderr)
    return 130


def _say_failed(folder: RunFolder | None, error: Exception) -> int:
    print(f"rnejax: {error}", file=sys.stderr)
    if folder is not None:
        folder.record(error=f"{type(error).__name__}: {error}")
        print(f"rnejax: {_what_is_there(folder)}", file=sys.stderr)
    return 1


def _what_is_there(folder: RunFolder) -> str:
    return f"what was finished is in {folder.path}: {', '.join(folder.files)}"


if __name__ == "__main__":
    sys.exit(main())
