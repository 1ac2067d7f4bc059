"""Figures and one self-contained page from what a run wrote. Imports no torch."""
