"""What models there are, whether their files are sound, and how they go."""
