"""What a run will need before it is started: memory, time, and which layouts are worth trying. Needs no torch."""
