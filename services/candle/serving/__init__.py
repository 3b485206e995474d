"""Models that answer: from the body of a request through a batch and back."""
