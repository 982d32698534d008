"""The fit of the planner's time model to published results, and the projections of docs/scaling.md."""
