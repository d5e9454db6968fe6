"""Distillation: a teacher's scores for the pairs of a training file, from which a smaller model learns."""
