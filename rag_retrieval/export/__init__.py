"""Models in other forms and other places: exported, and uploaded to a model hub."""
