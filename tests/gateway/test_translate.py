"""Errors of the bus in HTTP."""

import json

from multidict import istr

from bus.errors import Unavailable
from services.gateway.translate import problem, problem_of


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


def test_what_is_no_text_in_a_request_can_still_be_said():
    said = problem(400, "the field 'a\udcff' is not known", field=istr("X-A"), reasons=["\udcff"])
    assert json.loads(said.body)["detail"] == "the field 'a?' is not known"
    assert json.loads(said.body)["field"] == "X-A"
