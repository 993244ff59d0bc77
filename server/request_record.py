"""What is known of one HTTP request for its log line."""

import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.types import Scope

_KEY = "blockserve.record"
_VISIBLE = re.compile(r"[!-~]{1,128}")


@dataclass
class RequestRecord:
    """Filled in by whoever handles the request."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Ours, and unique. A client's own id is never used as a key."""
    client_id: str | None = None
    """The client's name for the request: echoed and logged."""
    started: float = field(default_factory=time.monotonic)
    fields: dict[str, object] = field(default_factory=dict)
    """Goes into the log line as it is."""

    @property
    def echoed_id(self) -> str:
        """What the client finds in the x-request-id header."""
        return self.client_id or self.id

    def take_client_id(self, value: str) -> None:
        """Note the client's id. One that a header could not carry back is ignored."""
        if _VISIBLE.fullmatch(value):
            self.client_id = value


def attach_record(scope: Scope, record: RequestRecord) -> None:
    """Make the record that of the request with this scope."""
    scope[_KEY] = record


def record_of(scope: Scope) -> RequestRecord:
    """The request's record."""
    record = scope[_KEY]
    assert isinstance(record, RequestRecord)
    return record
