"""Estimates before a run is started: its memory, its time, and which layouts are worth trying. Needs no torch."""
