"""What EdgeLM raises when the input, the file or the machine is at fault.

Every message says what is wrong, where, and what to do about it. The command line prints it in one line and exits
with 1; a bug in EdgeLM itself raises something else, of which the command line asks for a report.
"""

from __future__ import annotations


class EdgeLMError(Exception):
    """Base of every error a user can cause or mend."""


class ArgumentTypeError(EdgeLMError, TypeError):
    """An argument of the wrong type, or one that there is not."""


class ArgumentValueError(EdgeLMError, ValueError):
    """An argument of the right type whose value is out of range."""


class CheckpointError(EdgeLMError):
    """A checkpoint folder is incomplete, damaged or of another model."""


class UnsupportedConfigError(CheckpointError):
    """A config field changes the arithmetic in a way that is not implemented."""


class TokenizerError(EdgeLMError):
    """No usable tokenizer, or its special tokens contradict each other."""


class RecipeError(EdgeLMError):
    """A quantisation recipe is malformed or does not fit the tensors."""


class ExportError(EdgeLMError):
    """The export cannot be done as asked."""


class MemoryLimitError(ExportError):
    """The work does not fit into the memory that was allowed."""


class BundleError(EdgeLMError):
    """A bundle is missing a file, damaged, or of a newer format."""


class RuntimeUnavailableError(EdgeLMError):
    """No runtime on this device can run this bundle."""


class ContextLengthError(EdgeLMError):
    """More tokens than the model's context holds."""


class GenerationError(EdgeLMError):
    """Sampling options or messages that cannot be used."""


class GenerationTypeError(GenerationError, ArgumentTypeError):
    """A prompt or an option of generation of the wrong type, or an option that there is not."""


class GenerationValueError(GenerationError, ArgumentValueError):
    """An option of generation whose value is out of range, or that would do nothing beside the others."""


class ParityError(EdgeLMError):
    """The parity check could not be carried out (a failed check is a result, not an error)."""


class DeviceError(EdgeLMError):
    """A GPU, its driver or a library of it is missing, too old, or failed."""


class DeviceMemoryError(DeviceError):
    """The device has not enough memory free."""
