"""Which model a request means: there is one, under one or more names."""

from server.app_state import AppState
from server.errors import ApiError
from server.protocol import show


def served_model(state: AppState, asked: str | None) -> str:
    """The name that the answer gives the model: the one asked for, or the first. Raises ApiError 404."""
    names = state.model_names
    if asked is None:
        return names[0]
    if asked not in names:
        raise unknown_model(asked)
    return asked


def unknown_model(name: str) -> ApiError:
    """404: the client asked for a model that is not served here."""
    message = f"the model {show(name)} is not served here; GET /v1/models lists what is"
    return ApiError(404, message, param="model", code="model_not_found")
