"""Evaluation: predict, gather, score."""
