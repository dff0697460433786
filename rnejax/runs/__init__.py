"""The runs behind the command line: from a configuration to one folder of numbers, arrays and pictures.

A run first makes sure that it can finish (the model loads, the target is one, the folder can be written, pictures can
be drawn), then computes, and writes every part as soon as it is there, so that an interrupted run leaves what it had
finished.
"""

from .folder import RunFolder

__all__ = ["RunFolder"]
