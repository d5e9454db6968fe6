"""Models in other forms, checked against what they were made from, and in other places: a model hub."""
