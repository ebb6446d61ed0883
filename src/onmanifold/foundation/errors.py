"""The errors a user of onmanifold can meet. Each says what was found and what was expected."""


class OnManifoldError(Exception):
    """Base of all errors that onmanifold raises on purpose."""


class InputError(OnManifoldError, ValueError):
    """An argument has the wrong range, shape, dtype, device or label."""


class ConfigError(InputError):
    """An experiment file or a component's specification is wrong."""


class DataError(OnManifoldError):
    """A file or dataset is missing, truncated or foreign, or could not be written."""


class CheckpointError(OnManifoldError):
    """A checkpoint is damaged, or belongs to another model or run."""


class DivergenceError(OnManifoldError):
    """The training loss became NaN or infinite, or grew beyond reason."""
