# SPDX-License-Identifier: MIT
"""Errors that a user can act on; the command line turns each into one message and an exit code."""

from __future__ import annotations


class FastMqaError(Exception):
    """Base of all errors of this package: what was given, what is accepted, what to do.

    ``exit_code`` is what ``fastmqa-export`` ends with; 2 is click's own code for wrong usage too.
    """

    exit_code = 1


class ConfigError(FastMqaError):
    """A value or a combination of values that the op, a module or a command does not accept."""

    exit_code = 2


class SourceError(FastMqaError):
    """A SOURCE that cannot be loaded: unknown name, incomplete checkpoint, unreadable file."""

    exit_code = 2


class ModelFileError(FastMqaError):
    """A file that is no ONNX model, or an ONNX model that is not what the command needs."""

    exit_code = 2


class ExportError(FastMqaError):
    """A model that cannot be exported; the message names the layer and the reason."""


class OutputError(FastMqaError):
    """A result that cannot be written: no permission, no space, not a folder."""


class KernelError(FastMqaError):
    """CUDA refused a launch, or a library of kernels is not what it should be."""


class EngineError(FastMqaError):
    """An engine that cannot be built or loaded; the message gives TensorRT's reason."""


class MismatchError(FastMqaError):
    """Two runtimes differ by more than the error budget."""


class MissingDependencyError(FastMqaError):
    """Something needed is not installed; the message names the command that installs it."""

    exit_code = 3
