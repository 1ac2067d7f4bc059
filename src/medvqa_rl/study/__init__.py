"""Experiments: a matrix of arms, seeds and test sets, planned, run and collected. Imports no torch."""
