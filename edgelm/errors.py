"""Exceptions that EdgeLM raises when an input, a file or the machine is at fault.

Every message says what is wrong, where, and what to do. The command line prints it in one line and exits with status 1.
Any other exception is a bug in EdgeLM, and the command line asks for a report.
"""

from __future__ import annotations


class EdgeLMError(Exception):
    """Base class of every error that a user can cause or fix."""


class ArgumentTypeError(EdgeLMError, TypeError):
    """An argument has the wrong type, or does not exist."""


class ArgumentValueError(EdgeLMError, ValueError):
    """An argument has the right type, but its value is out of range."""


class CheckpointError(EdgeLMError):
    """A checkpoint folder is incomplete or damaged, or its model is not supported."""


class UnsupportedConfigError(CheckpointError):
    """A config field changes the arithmetic in a way that is not implemented."""


class TokenizerError(EdgeLMError):
    """A checkpoint has no usable tokenizer, or its special tokens contradict each other."""


class RecipeError(EdgeLMError):
    """A quantisation recipe is malformed or does not fit the tensors."""


class ExportError(EdgeLMError):
    """The export cannot be done as asked."""


class MemoryLimitError(ExportError):
    """The export needs more memory than the limit."""


class BundleError(EdgeLMError):
    """A bundle is missing a file, damaged, or of a newer format."""


class RuntimeUnavailableError(EdgeLMError):
    """No runtime on this device can run this bundle."""


class ContextLengthError(EdgeLMError):
    """A sequence has more tokens than the model's context."""


class GenerationError(EdgeLMError):
    """A prompt, a message or an option of generation is invalid."""


class GenerationTypeError(GenerationError, ArgumentTypeError):
    """A prompt or an option of generation has the wrong type, or an option does not exist."""


class GenerationValueError(GenerationError, ArgumentValueError):
    """An option of generation is out of range, or has no effect together with the others."""


class QueueFullError(EdgeLMError):
    """Too many requests wait already, of all clients or of this one."""


class TimeLimitError(EdgeLMError):
    """A request took longer than it may."""


class SessionError(EdgeLMError):
    """A session cannot be saved, or a session file is damaged or belongs to something else."""


class ParityError(EdgeLMError):
    """The parity check could not run. A check that fails is a result, not an error."""


class ReportError(EdgeLMError):
    """A file is no report that can be compared, or lacks something."""


class DeviceError(EdgeLMError):
    """A GPU, its driver or one of its libraries is missing, too old, or failed."""


class DeviceMemoryError(DeviceError):
    """The device has too little free memory."""
