"""`--dry-run`: what a run would do, found out without starting it."""
