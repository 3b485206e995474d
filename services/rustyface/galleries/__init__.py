"""What datasets hold, as a replica follows it from the broker, and the search in it."""
