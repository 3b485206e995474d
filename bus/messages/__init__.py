"""The payload of every subject, as frozen structs.

Adding an optional field is compatible; a field is never given a new meaning. Readers pass over
fields that they do not know. Plugin states are camelCase on the wire, capability payloads
snake_case: clients of the system that this one grew out of rely on both. Times are UTC.
"""

from bus.messages.base import *  # noqa: F403
from bus.messages.faces import *  # noqa: F403
from bus.messages.feeds import *  # noqa: F403
from bus.messages.galleries import *  # noqa: F403
from bus.messages.jobs import *  # noqa: F403
from bus.messages.models import *  # noqa: F403
from bus.messages.plugins import *  # noqa: F403
from bus.messages.repository import *  # noqa: F403
