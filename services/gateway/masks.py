"""What of a message is not for whoever may only look."""

import msgspec

from bus.messages import Job


def without_query(job: Job) -> Job:
    """Return a job without the query of its address: a presigned one has its secret there."""
    if job.request is None:
        return job
    address, mark, _ = job.request.url.partition("?")
    if not mark:
        return job
    request = msgspec.structs.replace(job.request, url=f"{address}?...")
    return msgspec.structs.replace(job, request=request)
