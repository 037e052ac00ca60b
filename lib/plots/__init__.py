"""Figures of single papers, drawn from the frames of ``lib.analysis``; the house style is in ``lib.figures``."""
