"""Errors of the bus in HTTP."""

import json

from bus.errors import Unavailable
from services.gateway.translate import problem_of


def test_details_of_an_error_are_members_of_the_problem_but_never_in_place_of_ours():
    details = {"state": "loading", "progress": 0.5, "status": 200, "detail": "x", "field": "y"}
    said = json.loads(problem_of(Unavailable("m is loading", details=details)).body)
    assert said == {
        "type": "urn:bkg:problem:unavailable",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "m is loading",
        "state": "loading",
        "progress": 0.5,
    }
