"""Every error a caller may meet. `str(error)` is one line that says what is wrong, with the numbers, and what to do."""


class JaxpagedError(Exception):
    """The root: catch this to catch all of ours."""


class CheckpointError(JaxpagedError):
    """A checkpoint cannot be read or written. Has several lines only where it lists tensors."""


class ConfigError(JaxpagedError, ValueError):
    """The engine cannot run as configured."""


class RequestError(JaxpagedError, ValueError):
    """A prompt or its sampling parameters cannot be served."""


class PoolError(JaxpagedError):
    """The page pool was asked for what it cannot give."""


class TooLongError(RequestError):
    """A prompt, or it and the answer asked for, of more tokens than the model or the engine takes."""


class QueueFullError(JaxpagedError):
    """As many requests wait as may; the same request can be served later."""


class EngineDeadError(JaxpagedError):
    """The engine has failed or was stopped, and serves nothing any more."""


class AsleepError(JaxpagedError):
    """The engine was asked for a step while it sleeps."""
